"""PEFT's LoRA."""

from __future__ import annotations

from peft import LoraConfig, PeftConfig
from torch import nn

from .adapter import Adapter, baseline_rank


class LoRA(Adapter):
    """PEFT's LoRA."""

    name = "lora"

    def config(self, base: nn.Module) -> PeftConfig:
        rank, alpha = baseline_rank(self.recipe)
        return LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=self.recipe.adapter_config().lora_dropout,
            target_modules=self.targets(base),
            exclude_modules=self.recipe.adapter.get("exclude_modules"),
        )
