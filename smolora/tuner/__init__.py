"""PEFT methods: `peft.get_peft_model(model, config)` with the configuration of any mixture."""

from .block import MixtureBlock, discriminator_loss
from .fitting import fit_routers
from .layer import MixtureLayer
from .linear import MixtureLinear
from .model import MODELS, MixtureModel, SMoLoRAModel
from .report import LayerRouting, routing_report

__all__ = [
    "MODELS",
    "LayerRouting",
    "MixtureBlock",
    "MixtureLayer",
    "MixtureLinear",
    "MixtureModel",
    "SMoLoRAModel",
    "discriminator_loss",
    "fit_routers",
    "routing_report",
]
