"""The base model without adapters."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from torch import nn

from ...recipe import TaskRecipe
from .base import Method, Stage


class ZeroShot(Method):
    """No training: the base model is evaluated."""

    name = "zeroshot"

    def stages(self) -> list[Stage]:
        return [Stage("stage-0-zeroshot", (), tuple(self.recipe.tasks))]

    def few_shot(self, task: TaskRecipe) -> tuple[TaskRecipe, ...]:
        return ()

    def settings(self) -> dict[str, Any]:
        return {"adapter": {}, "baseline": {}}

    def adapter(self, base: nn.Module) -> PeftConfig | None:
        return None
