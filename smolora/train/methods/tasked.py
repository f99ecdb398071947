"""Adapters with parts for each task: which task a sample counts as, in training and when it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from ...methods.selector import Features, TaskSelector
from ...recipe import Recipe, TaskRecipe
from ...recipe.schema import SECTION
from .adapter import Adapter
from .stage import StageWork, in_eval_mode


@dataclass(frozen=True, config=SECTION)
class TaskedOptions:
    """Options of an adapter with parts for each task.

    Args:
        task: which task a question is answered as: "selector", that whose keys are nearest, found by the adapter's
            `TaskSelector`; or "oracle", its own, which is given.
    """

    task: Literal["selector", "oracle"] = "selector"


class Tasked(Adapter):
    """An adapter whose forward takes `task_ids`, or finds them with a `TaskSelector`.

    Raises:
        ValueError: as for `Adapter`; or tasks are given, and one that is asked is never trained.
    """

    takes_task_ids = True
    options_class = TaskedOptions

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.text = None if self.is_told else "question"
        for task in recipe.all_tasks:
            if self.is_told and recipe.task_id(task) is None:
                raise ValueError(
                    f"methods.{self.name}.task must be 'selector' where a task is asked that is never trained, got "
                    f"'oracle' with the task {task.name!r}"
                )

    @property
    def is_told(self) -> bool:
        """Whether questions come with their task."""
        return bool(self.options.task == "oracle")

    def answers_as(self, task: TaskRecipe) -> int | None:
        return self.recipe.task_id(task) if self.is_told else None

    @property
    def passes_between_stages(self) -> bool:
        return not self.is_told

    @torch.no_grad()
    def after_stage(self, model: Any, work: StageWork, folder: Path) -> None:
        """Give the stage's tasks their keys."""
        if self.is_told:
            return
        keys = NewKeys(model.selector())
        with in_eval_mode(model):
            for batch in work.batches():
                keys.add(batch["task_ids"], model.sample_features(**batch))
        keys.give(work)


def check_one_process(name: str, work: StageWork) -> None:
    """Check that keys can be trained.

    Args:
        name: of the method.
        work: the stage.

    Raises:
        ValueError: there are several processes. DDP follows the gradients of a forward's outputs alone.
    """
    if work.process.num_processes > 1:
        raise ValueError(
            f"methods.{name}.keys must be 'closed' with several processes, got 'trained' with "
            f"{work.process.num_processes}"
        )


def alignment_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """The alignment loss of trained keys, the mean over a batch's samples."""
    loss: Tensor = model.selector()(batch["task_ids"], *model.sample_features(**batch))
    return loss / len(batch["task_ids"])


class NewKeys:
    """The keys of the tasks of a stage, of the samples that this process has seen so far.

    Args:
        selector: the one that will get them, whose keys have a closed form.
    """

    def __init__(self, selector: TaskSelector) -> None:
        self.selector = selector
        image, text = selector.keys()
        self.part = TaskSelector(selector.num_tasks, image.shape[1], text.shape[1], device=image.device)

    def add(self, task: Tensor, features: Features) -> None:
        """Add samples of several tasks, int (n,)."""
        for number in task.unique().tolist():
            rows = task == number
            self.part.add(number, *(None if part is None else part[rows] for part in features))

    def give(self, work: StageWork) -> None:
        """Give the selector the keys of what all processes have seen."""
        image, text = (work.total(self.part.get_buffer(f"{kind}_sums")) for kind in ("image", "text"))
        for task in work.total(self.part.learned.long()).nonzero().flatten().tolist():
            self.selector.add_sums(task, image[task], text[task])
