"""SMoLoRA (ICCV 2025) as fused kernels behind a drop-in layer: continual tuning without dual forgetting."""

from . import reference
from .backends import backend_info, use_backend
from .config import SMoLoRAConfig
from .instructions.encoder import InstructionEncoder
from .methods import (
    MIXTURES,
    BranchLoRAConfig,
    EprojConfig,
    FusedBranchLoRA,
    FusedEproj,
    FusedLiLoRA,
    FusedMoECL,
    FusedMoELoRA,
    FusedRoutedLoRA,
    FusedSMoLoRA,
    LiLoRAConfig,
    MoECLConfig,
    MoELoRAConfig,
    RoutedLoRAConfig,
)
from .methods.selector import TaskSelector
from .routing import Routing
from .tuner import SMoLoRAModel, discriminator_loss, fit_routers, routing_report

__version__ = "0.1.0"

__all__ = [
    "MIXTURES",
    "BranchLoRAConfig",
    "EprojConfig",
    "FusedBranchLoRA",
    "FusedEproj",
    "FusedLiLoRA",
    "FusedMoECL",
    "FusedMoELoRA",
    "FusedRoutedLoRA",
    "FusedSMoLoRA",
    "InstructionEncoder",
    "LiLoRAConfig",
    "MoECLConfig",
    "MoELoRAConfig",
    "RoutedLoRAConfig",
    "Routing",
    "SMoLoRAConfig",
    "SMoLoRAModel",
    "TaskSelector",
    "backend_info",
    "discriminator_loss",
    "fit_routers",
    "reference",
    "routing_report",
    "use_backend",
]
