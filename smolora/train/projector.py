"""The projector trained in full beside an adapter, as CoIN does. PEFT saves its copy of it with the adapter."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from torch import nn

PROJECTOR = "multi_modal_projector"


def train_projector_in_full(base: nn.Module, config: PeftConfig | None) -> None:
    """Have a new adapter train and save the projector too, or read back the one that an earlier stage saved.

    The base's projector becomes float32, since 16 bits lose the small steps of training. PEFT's copy takes its data
    type, so that what an earlier stage saved is read without rounding.

    Args:
        base: the base model, changed in place.
        config: of the new adapter, changed in place; None where a saved one is read.

    Raises:
        ValueError: the model has no projector.
    """
    found = [module for name, module in base.named_modules() if name.rpartition(".")[2] == PROJECTOR]
    if not found:
        raise ValueError(f"training.full_projector needs a model with a {PROJECTOR}, got {type(base).__name__}")
    for module in found:
        module.float()
    if config is not None:
        settings: Any = config
        settings.modules_to_save = [PROJECTOR]  # PEFT gives no adapter to what is in it
