"""The projector trained at a rate of its own, or in full beside an adapter as CoIN does.

PEFT saves its copy of a projector in full with the adapter.
"""

from __future__ import annotations

import re
from typing import Any

from peft import PeftConfig
from torch import nn

from ..backbones.families import FAMILIES, Family, family_of


def projector_family(base: nn.Module, key: str) -> Family:
    """Return the family of a model whose projector is known.

    Args:
        base: the base model.
        key: of the recipe, which needs the projector.

    Raises:
        ValueError: the model's type is not known, or has no projector.
    """
    family = family_of(getattr(base, "config", None))
    if family is None or family.connector is None:
        known = ", ".join(name for name, each in FAMILIES.items() if each.connector is not None)
        kind = getattr(getattr(base, "config", None), "model_type", None)
        raise ValueError(
            f"{key} needs a model whose projector is known, which are those of type {known}; got {type(base).__name__}"
            f" of type {kind!r}"
        )
    return family


def train_projector_in_full(base: nn.Module, config: PeftConfig | None) -> None:
    """Have a new adapter train and save the projector too, or read back the one that an earlier stage saved.

    The base's projector becomes float32, since 16 bits lose the small steps of training. PEFT's copy takes its data
    type, so that what an earlier stage saved is read without rounding.

    Args:
        base: the base model, changed in place.
        config: of the new adapter, changed in place; None where a saved one is read.

    Raises:
        ValueError: the model has no projector that is known.
    """
    pattern = re.compile(rf"(.*\.)?({projector_family(base, 'training.full_projector').connector})")
    found = {name: module for name, module in base.named_modules() if pattern.fullmatch(name)}
    for module in found.values():
        module.float()
    if config is not None:
        settings: Any = config
        settings.modules_to_save = list(found)  # PEFT gives no adapter to what is in it
