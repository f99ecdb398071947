"""SMoLoRA (ICCV 2025) as fused kernels behind a drop-in layer: continual tuning without dual forgetting."""

from . import reference
from .backends import backend_info, use_backend
from .config import SMoLoRAConfig
from .layer import FusedSMoLoRA
from .routing import Routing

__all__ = ["FusedSMoLoRA", "Routing", "SMoLoRAConfig", "backend_info", "reference", "use_backend"]
