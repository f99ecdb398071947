"""LiLoRA: one A and one B for all tasks, and a low-rank pair for each task within B."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from peft import PeftConfig
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ...methods import LiLoRAConfig
from ...methods.lilora import LiLoRAExperts
from ...recipe import Recipe
from ...recipe.schema import SECTION, Count, Number
from .adapter import baseline_rank
from .stage import Stage, StageWork
from .tasked import Tasked, TaskedOptions


@dataclass(frozen=True, config=SECTION)
class LiLoRAOptions(TaskedOptions):
    """Options of LiLoRA.

    Args:
        task: as in `TaskedOptions`.
        task_r: rank of a task's pair; None for half of the rank of A, as released.
        regulariser: what holds B from the second task on: "freeze" trains B for the first task only, as released;
            "paper" adds L_reg to the loss, see `LiLoRAExperts.regulariser`.
        regulariser_weight: lambda, the weight of L_reg; the paper's value is not known.
    """

    task_r: Count | None = None
    regulariser: Literal["freeze", "paper"] = "freeze"
    regulariser_weight: Annotated[Number, Field(ge=0)] = 1.0


class LiLoRA(Tasked):
    """LiLoRA, whose A has the baselines' rank R.

    With task_r = R / 2, a layer of d inputs and k outputs trains R d + R / 2 (R + k) numbers a task, besides the B of
    R k that all tasks share; a baseline trains R (d + k).
    """

    name = "lilora"
    options_class = LiLoRAOptions
    options: LiLoRAOptions

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        if self.options.regulariser == "freeze":
            self.check_unused("where regulariser is 'freeze'", "regulariser_weight")
        self._before: tuple[int, int, list[Tensor]] | None = None  # this task, the one before, and the B it left

    def has(self, name: str) -> bool:
        return super().has(name) and (name != "step_term" or self.options.regulariser == "paper")

    def config(self, base: nn.Module) -> PeftConfig:
        rank, alpha = baseline_rank(self.recipe)
        return LiLoRAConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=self.recipe.adapter_config().lora_dropout,
            task_r=self.task_r(),
            num_tasks=self.recipe.num_task_ids,
            instruction_dim=self.recipe.adapter_config().instruction_dim,
            target_modules=self.targets(base),
            exclude_modules=self.recipe.adapter.get("exclude_modules"),
        )

    def task_r(self) -> int:
        """Rank of a task's pair."""
        return self.options.task_r or max(baseline_rank(self.recipe)[0] // 2, 1)

    def used_options(self) -> dict[str, Any]:
        return {**super().used_options(), "task_r": self.task_r()}

    def freeze(self, model: nn.Module, stage: Stage) -> None:
        """Freeze B after the first stage, as released."""
        if self.options.regulariser == "freeze" and stage.number:
            for experts in _experts(model):
                experts.B.requires_grad_(False)

    def before_stage(self, model: nn.Module, work: StageWork) -> None:
        """Keep the B that the stage before left."""
        previous = work.stage.starts_from
        if self.options.regulariser == "paper" and previous is not None:
            task, before = (self.recipe.task_id(stage.train[-1]) for stage in (work.stage, previous))
            assert task is not None and before is not None  # both stages train
            self._before = task, before, [experts.B.detach().clone() for experts in _experts(model)]

    def step_term(self, model: nn.Module, scale: float) -> None:
        """Add the gradient of the weighted L_reg, summed over the layers."""
        if self._before is None:
            return
        task, before, previous = self._before
        for experts, previous_B in zip(_experts(model), previous, strict=True):
            parameters = [experts.B, experts.task_A, experts.task_B]
            with torch.enable_grad():
                term = scale * self.options.regulariser_weight * experts.regulariser(task, before, previous_B)
            for parameter, gradient in zip(parameters, torch.autograd.grad(term, parameters), strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _experts(model: nn.Module) -> Iterator[LiLoRAExperts]:
    """The adapters of a model's layers."""
    return (module for module in model.modules() if isinstance(module, LiLoRAExperts))
