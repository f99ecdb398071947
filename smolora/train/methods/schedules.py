"""The course of a run: which stages there are, and which adapter each starts from."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ...recipe import Recipe, TaskRecipe
from .stage import Stage


class Sequential:
    """One adapter that is tuned on task after task. Each stage evaluates all tasks seen so far.

    Args:
        recipe: the recipe of the run.
    """

    metrics_method: ClassVar[str | None] = None  # as `continual_metrics` takes it

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def stages(self) -> list[Stage]:
        """The stages of the upstream tasks."""
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


class OnePerTask(Sequential):
    """One adapter per task, which alone answers the task's questions, so nothing is forgotten."""

    metrics_method = "dirlora"

    def stages(self) -> list[Stage]:
        return [dataclasses.replace(stage, test=stage.train, starts_from=None) for stage in super().stages()]

    def matrix(self, scores: list[dict[str, float]]) -> list[list[float]]:
        own = [next(iter(figures.values())) for figures in scores]
        return [own[: k + 1] for k in range(len(own))]


class Joint(Sequential):
    """One adapter, tuned on all tasks at once."""

    def stages(self) -> list[Stage]:
        tasks = tuple(self.recipe.tasks)
        return [Stage("stage-1-multitask", tasks, tasks)]


class NoTraining(Sequential):
    """No training: the model is evaluated as it is."""

    def stages(self) -> list[Stage]:
        return [Stage("stage-0-zeroshot", (), tuple(self.recipe.tasks))]

    def few_shot(self, task: TaskRecipe) -> tuple[TaskRecipe, ...]:
        return ()
