"""The interface of a method of continual tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from ...recipe import Recipe, TaskRecipe
from ...tuner.model import DEFAULT_TARGETS


@dataclass(frozen=True)
class Stage:
    """A part of a run: training on some tasks, then evaluation.

    Args:
        name: its folder in the run's folder.
        train: the tasks that it trains on, possibly none.
        test: the tasks that are evaluated after it.
        starts_from: the stage whose adapter it starts from; None for a new adapter.
        table: folder for its answers; None for its own.
    """

    name: str
    train: tuple[TaskRecipe, ...]
    test: tuple[TaskRecipe, ...]
    starts_from: Stage | None = None
    table: str | None = None


class Method:
    """A method of continual tuning. By default it is sequential, with one adapter that is tuned on task after task.

    There is one object per run, and its hooks are called in the order of the stages. They are not called again for a
    stage that a killed process has finished, so `save_state` must write what later stages need of it.

    Args:
        recipe: the recipe of the run.
    """

    name: ClassVar[str]
    takes_instructions: ClassVar[bool] = False  # its model's forward takes `instruction_embeds`
    metrics_method: ClassVar[str | None] = None  # as `continual_metrics` takes it

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    # ---- the course of the run

    def stages(self) -> list[Stage]:
        """The stages of the upstream tasks. Each evaluates all tasks seen so far."""
        tasks = self.recipe.tasks
        stages: list[Stage] = []
        for k, task in enumerate(tasks, 1):
            previous = stages[-1] if stages else None
            stages.append(Stage(f"stage-{k}-{task.name}", (task,), tuple(tasks[:k]), previous))
        return stages

    def downstream(self) -> list[Stage]:
        """The stages of the downstream tasks, each from the last upstream one, with one folder of answers per table."""
        last = self.stages()[-1]
        return [
            Stage(f"downstream-{table}/{task.name}", self.few_shot(task), (task,), last, f"downstream-{table}")
            for table, tasks in self.recipe.downstream.items()
            for task in tasks
        ]

    def few_shot(self, task: TaskRecipe) -> tuple[TaskRecipe, ...]:
        """The tasks that a downstream stage trains on."""
        return () if task.train is None else (task,)

    def matrix(self, scores: list[dict[str, float]]) -> list[list[float]]:
        """The accuracy or MIF matrix, from the figures of each finished stage by task."""
        return [[row[task.name] for task in stage.test] for stage, row in zip(self.stages(), scores, strict=False)]

    # ---- the model of a stage

    def adapter(self, base: nn.Module) -> PeftConfig | None:
        """The configuration of a new adapter; None for a method without adapters."""
        raise NotImplementedError  # there is no default

    def start(self, base: nn.Module, previous: Path | None) -> nn.Module:
        """The model that a stage trains.

        Args:
            base: the base model, on its device.
            previous: folder of the adapter to start from; None for a new one.
        """
        if previous is not None:
            return PeftModel.from_pretrained(base, previous, is_trainable=True)
        config = self.adapter(base)
        if config is None:
            raise ValueError(f"the method {self.name} trains nothing")
        return get_peft_model(base, config)

    def load(self, base: nn.Module, adapter: Path | None) -> nn.Module:
        """The model that is evaluated after a stage."""
        return base if adapter is None else PeftModel.from_pretrained(base, adapter)

    def targets(self, base: nn.Module) -> Any:
        """The modules that get adapters, the same for all methods."""
        chosen = self.recipe.adapter.get("target_modules")
        config: Any = base.config
        kind = config.model_type
        if chosen is None and kind not in DEFAULT_TARGETS:
            raise ValueError(f"adapter.target_modules must be given for a model of type {kind!r}")
        return chosen or DEFAULT_TARGETS[kind]

    def settings(self) -> dict[str, Any]:
        """Sections of the recipe as this method uses them, for the results."""
        rank, alpha = baseline_rank(self.recipe)
        return {"adapter": {}, "baseline": {"rank": rank, "alpha": alpha}}

    # ---- hooks for methods that need more than an adapter

    def extra_samples(self, stage: Stage, states: list[Path]) -> list[tuple[TaskRecipe, int]]:
        """Samples to train on besides the stage's own, such as replayed ones: (task, index in its training file) each.

        Args:
            stage: the stage that starts.
            states: folders with the state of each earlier stage.
        """
        return []

    def prepare(self, model: nn.Module, stage: Stage, states: list[Path]) -> None:
        """Called before a stage is trained, with the folders of the earlier stages' state."""

    def extra_loss(self, model: nn.Module, inputs: dict[str, Any], outputs: Any) -> Tensor | None:
        """A term for the loss of a micro-batch. Terms are averaged over the micro-batches of a step."""
        return None

    def save_state(self, model: nn.Module, stage: Stage, folder: Path) -> None:
        """Called after a stage is trained, to write what later stages need into an existing folder."""


def baseline_rank(recipe: Recipe) -> tuple[int, float]:
    """Rank and alpha of a baseline's LoRA.

    By default the rank is r (M + N), as many trainable parameters as SMoLoRA's experts have, and alpha gives the same
    scaling.
    """
    config = recipe.adapter_config()
    rank = recipe.baseline.rank or config.r * (config.num_vu_experts + config.num_if_experts)
    return rank, recipe.baseline.alpha or config.scaling * rank
