"""PEFT's LoRA: one adapter tuned on task after task, one per task, or one for all tasks at once."""

from __future__ import annotations

import dataclasses

from peft import LoraConfig, PeftConfig
from torch import nn

from .base import Method, Stage, baseline_rank


class SeqLoRA(Method):
    """One LoRA, tuned on task after task."""

    name = "seqlora"

    def adapter(self, base: nn.Module) -> PeftConfig:
        rank, alpha = baseline_rank(self.recipe)
        return LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=self.recipe.adapter_config().lora_dropout,
            target_modules=self.targets(base),
            exclude_modules=self.recipe.adapter.get("exclude_modules"),
        )


class DirLoRA(SeqLoRA):
    """One LoRA per task, which alone answers the task's questions, so nothing is forgotten."""

    name = "dirlora"
    metrics_method = "dirlora"

    def stages(self) -> list[Stage]:
        return [dataclasses.replace(stage, test=stage.train, starts_from=None) for stage in super().stages()]

    def matrix(self, scores: list[dict[str, float]]) -> list[list[float]]:
        own = [next(iter(figures.values())) for figures in scores]
        return [own[: k + 1] for k in range(len(own))]


class Multitask(SeqLoRA):
    """One LoRA, tuned on all tasks at once."""

    name = "multitask"

    def stages(self) -> list[Stage]:
        tasks = tuple(self.recipe.tasks)
        return [Stage("stage-1-multitask", tasks, tasks)]
