"""SMoLoRA as a PEFT method: `peft.get_peft_model(model, SMoLoRAConfig(...))`."""

from .layer import SMoLoRALayer, SMoLoRALinear
from .model import SMoLoRAModel
from .report import LayerRouting, routing_report

__all__ = ["LayerRouting", "SMoLoRALayer", "SMoLoRALinear", "SMoLoRAModel", "routing_report"]
