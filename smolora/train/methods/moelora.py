"""MoELoRA (CoIN): a mixture of LoRA experts, weighted for each token."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from torch import nn

from ...methods import MoELoRAConfig
from .base import Method, baseline_rank


class MoELoRA(Method):
    """One token-wise mixture, tuned on task after task. Its experts split the baselines' rank."""

    name = "moelora"

    def adapter(self, base: nn.Module) -> PeftConfig:
        config = self.recipe.adapter_config()
        rank, alpha = baseline_rank(self.recipe)
        experts = self.experts()
        if rank % experts:
            raise ValueError(f"baseline.rank must be a multiple of the {experts} experts of moelora, got {rank}")
        return MoELoRAConfig(
            r=rank // experts,
            lora_alpha=alpha / experts,
            lora_dropout=config.lora_dropout,
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
