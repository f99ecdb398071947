"""The methods that run on the engine. A new one is a file in this folder, and a line here."""

from .base import Mixture
from .branchlora import BRANCHLORA, BranchLoRAConfig, FusedBranchLoRA
from .eproj import EPROJ, EprojConfig, FusedEproj
from .lilora import LILORA, FusedLiLoRA, LiLoRAConfig
from .moecl import MOECL, FusedMoECL, MoECLConfig
from .moelora import MOELORA, FusedMoELoRA, MoELoRAConfig
from .routedlora import ROUTEDLORA, FusedRoutedLoRA, RoutedLoRAConfig
from .smolora import SMOLORA, FusedSMoLoRA, SMoLoRAConfig

MIXTURES: dict[str, Mixture] = {
    mixture.name: mixture
    for mixture in (
        SMOLORA,
        MOELORA,
        ROUTEDLORA,
        BRANCHLORA,
        LILORA,
        MOECL,
        EPROJ,
    )
}

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
    "LiLoRAConfig",
    "MoECLConfig",
    "MoELoRAConfig",
    "RoutedLoRAConfig",
    "SMoLoRAConfig",
]
