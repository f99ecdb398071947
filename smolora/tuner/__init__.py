"""SMoLoRA as a PEFT method: `peft.get_peft_model(model, SMoLoRAConfig(...))`."""

from .layer import SMoLoRALayer, SMoLoRALinear
from .model import SMoLoRAModel

__all__ = ["SMoLoRALayer", "SMoLoRALinear", "SMoLoRAModel"]
