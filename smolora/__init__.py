"""SMoLoRA (ICCV 2025) as fused kernels behind a drop-in layer: continual tuning without dual forgetting."""

from . import reference
from .backends import backend_info, use_backend
from .config import SMoLoRAConfig
from .instruction import InstructionEncoder
from .layer import FusedSMoLoRA
from .routing import Routing
from .tuner import SMoLoRAModel, routing_report

__all__ = [
    "FusedSMoLoRA",
    "InstructionEncoder",
    "Routing",
    "SMoLoRAConfig",
    "SMoLoRAModel",
    "backend_info",
    "reference",
    "routing_report",
    "use_backend",
]
