"""PEFT methods: `peft.get_peft_model(model, SMoLoRAConfig(...))`, and MoELoRA to compare with."""

from .layer import SMoLoRALayer, SMoLoRALinear
from .model import SMoLoRAModel
from .moelora import MoELoRAConfig, MoELoRAModel
from .report import LayerRouting, routing_report

__all__ = [
    "LayerRouting",
    "MoELoRAConfig",
    "MoELoRAModel",
    "SMoLoRALayer",
    "SMoLoRALinear",
    "SMoLoRAModel",
    "routing_report",
]
