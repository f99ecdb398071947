"""The interface of a method: what it may decide about a run of tasks."""

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
    """A part of a run: training on some tasks, then questions.

    Args:
        name: its folder in the run's.
        train: the tasks that it trains on; without any it trains nothing.
        test: the tasks that are asked after it.
        starts_from: the stage whose adapter it starts from; None to start anew.
        table: the folder of its answers; None for its own.
    """

    name: str
    train: tuple[TaskRecipe, ...]
    test: tuple[TaskRecipe, ...]
    starts_from: Stage | None = None
    table: str | None = None


class Method:
    """A method of continual tuning: sequential by default, with one adapter that goes from task to task.

    A method is made once a run and asked in the order of its stages. A stage that was finished by a killed process is
    not asked again, so what a later stage needs of it must be in `save_state`'s folder.

    Args:
        recipe: the run.
    """

    name: ClassVar[str]
    takes_instructions: ClassVar[bool] = False  # its model's forward takes `instruction_embeds`
    metrics_method: ClassVar[str | None] = None  # as `continual_metrics` takes it

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    # ---- the course of the run

    def stages(self) -> list[Stage]:
        """The stages of the upstream tasks; each asks all tasks seen so far."""
        tasks = self.recipe.tasks
        stages: list[Stage] = []
        for k, task in enumerate(tasks, 1):
            previous = stages[-1] if stages else None
            stages.append(Stage(f"stage-{k}-{task.name}", (task,), tuple(tasks[:k]), previous))
        return stages

    def downstream(self) -> list[Stage]:
        """The stages of the downstream tasks, each from the last upstream one; a table's answers lie together."""
        last = self.stages()[-1]
        return [
            Stage(f"downstream-{table}/{task.name}", self.few_shot(task), (task,), last, f"downstream-{table}")
            for table, tasks in self.recipe.downstream.items()
            for task in tasks
        ]

    def few_shot(self, task: TaskRecipe) -> tuple[TaskRecipe, ...]:
        """What a downstream task trains on."""
        return () if task.train is None else (task,)

    def matrix(self, scores: list[dict[str, float]]) -> list[list[float]]:
        """The accuracy (or MIF) matrix, from each finished stage's figures by task."""
        return [[row[task.name] for task in stage.test] for stage, row in zip(self.stages(), scores, strict=False)]

    # ---- the model of a stage

    def adapter(self, base: nn.Module) -> PeftConfig | None:
        """The configuration of a new adapter; None for a method without."""
        raise NotImplementedError  # every method says it: there is no default

    def start(self, base: nn.Module, previous: Path | None) -> nn.Module:
        """The model that a stage trains.

        Args:
            base: the base model, on its device.
            previous: the adapter that it starts from; None for a new one.
        """
        if previous is not None:
            return PeftModel.from_pretrained(base, previous, is_trainable=True)
        config = self.adapter(base)
        if config is None:
            raise ValueError(f"the method {self.name} trains nothing")
        return get_peft_model(base, config)

    def load(self, base: nn.Module, adapter: Path | None) -> nn.Module:
        """The model that answers after a stage, from the stage's adapter."""
        return base if adapter is None else PeftModel.from_pretrained(base, adapter)

    def targets(self, base: nn.Module) -> Any:
        """The modules that adapters are put in: the same for all methods."""
        chosen = self.recipe.adapter.get("target_modules")
        kind = base.config.model_type
        if chosen is None and kind not in DEFAULT_TARGETS:
            raise ValueError(f"adapter.target_modules must be given for a model of type {kind!r}")
        return chosen or DEFAULT_TARGETS[kind]

    def settings(self) -> dict[str, Any]:
        """Sections of the recipe as this method takes them, for the results: what is not used is left out."""
        rank, alpha = new_rank(self.recipe)
        return {"adapter": {}, "baseline": {"rank": rank, "alpha": alpha}}

    # ---- room for more than an adapter

    def extra_samples(self, stage: Stage, states: list[Path]) -> list[tuple[TaskRecipe, int]]:
        """Samples to train on besides the stage's own: (task, index in its training file) each, as a replay would.

        Args:
            stage: the stage that begins.
            states: folders with the state of each earlier stage.
        """
        return []

    def prepare(self, model: nn.Module, stage: Stage, states: list[Path]) -> None:
        """Called before a stage's training, with the earlier stages' folders."""

    def extra_loss(self, model: nn.Module, inputs: dict[str, Any], outputs: Any) -> Tensor | None:
        """A term to add to the loss of a micro-batch; the mean over a step's micro-batches counts."""
        return None

    def save_state(self, model: nn.Module, stage: Stage, folder: Path) -> None:
        """Called after a stage's training: put into the folder, which exists, what later stages need."""


def new_rank(recipe: Recipe) -> tuple[int, float]:
    """Rank and alpha of a baseline's LoRA.

    By default the rank is r (M + N), as many trainable parameters as SMoLoRA's experts have, and alpha gives the same
    scaling.
    """
    config = recipe.adapter_config()
    rank = recipe.baseline.rank or config.r * (config.num_vu_experts + config.num_if_experts)
    return rank, recipe.baseline.alpha or config.scaling * rank
