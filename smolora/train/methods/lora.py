"""PEFT's LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from .adapter import Adapter, baseline_rank


class LoRA(Adapter):
    """PEFT's LoRA."""

    name = "lora"
    variant: ClassVar[Mapping[str, Any]] = {}  # further arguments of its configuration

    def config(self, base: nn.Module) -> LoraConfig:
        rank, alpha = baseline_rank(self.recipe)
        return LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=self.recipe.adapter_config().lora_dropout,
            target_modules=self.targets(base),
            exclude_modules=self.recipe.adapter.get("exclude_modules"),
            **self.variant,
        )


def lora_layers(model: nn.Module) -> Iterator[Any]:
    """The layers with a LoRA, in the model's order."""
    return (module for module in model.modules() if isinstance(module, LoraLayer))
