"""How many numbers of a model train."""

from __future__ import annotations

from torch import nn

from ..methods.base import MixtureExperts


def num_trainable(model: nn.Module) -> int:
    """Count the numbers that train; of a parameter whose slices train one by one, the slices that do."""
    experts = [module for module in model.modules() if isinstance(module, MixtureExperts)]
    counted = {id(parameter) for module in experts for parameter in module.parameters(recurse=False)}
    others = (p for p in model.parameters() if p.requires_grad and id(p) not in counted)
    return sum(module.num_trained() for module in experts) + sum(p.numel() for p in others)
