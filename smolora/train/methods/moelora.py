"""MoELoRA (CoIN): a mixture of LoRA experts, weighted for each token."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from torch import nn

from ...methods import MoELoRAConfig
from .adapter import Adapter, baseline_rank


class MoELoRA(Adapter):
    """One token-wise mixture. Its experts split the baselines' rank."""

    name = "moelora"

    def config(self, base: nn.Module) -> PeftConfig:
        rank, alpha = baseline_rank(self.recipe)
        experts = self.experts()
        if rank % experts:
            raise ValueError(f"baseline.rank must be a multiple of the {experts} experts of moelora, got {rank}")
        return MoELoRAConfig(
            r=rank // experts,
            lora_alpha=alpha / experts,
            lora_dropout=self.recipe.adapter_config().lora_dropout,
            num_experts=experts,
            target_modules=self.targets(base),
            exclude_modules=self.recipe.adapter.get("exclude_modules"),
        )

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        return {**settings, "baseline": {**settings["baseline"], "experts": self.experts()}}

    def experts(self) -> int:
        """Number of experts."""
        config = self.recipe.adapter_config()
        return self.recipe.baseline.experts or config.num_vu_experts + config.num_if_experts
