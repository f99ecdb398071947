"""Replay (Chaudhry et al. 2019, a tiny episodic memory): later stages train on some samples of each earlier task."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from ...io.files import read_text, write_json
from ...recipe import Recipe, TaskRecipe
from ...recipe.schema import SECTION, Count, Number
from .add_on import AddOn
from .stage import Stage, StageWork, drawn

FILE = "replay.json"
PER_TASK = 500


@dataclass(frozen=True, config=SECTION)
class ReplayOptions:
    """Options of replay.

    Args:
        per_task: samples of a task that are kept, or all where it has fewer; None for 500, unless `fraction` is given.
        fraction: share of a task's training samples that is kept, in place of `per_task`.
        mode: "concat" adds the kept samples to the stage's own and shuffles all of them, so each occurs once an epoch;
            "joint" takes half of each step's samples from the kept ones, again and again until the stage's own are used
            up, which takes twice the steps of the stage alone.
    """

    per_task: Count | None = None
    fraction: Annotated[Number, Field(gt=0, le=1)] | None = None
    mode: Literal["concat", "joint"] = "concat"


class Replay(AddOn):
    """Samples of earlier tasks that later stages train on again, each with its own instruction and task.

    They are drawn uniformly without replacement after the task's stage, by a seed that depends on the recipe's and on
    the task's name. Only their indices are kept. Stages downstream train on their own few samples alone: nothing is
    asked of earlier tasks after them.

    Raises:
        ValueError: both sizes are given; or a batch cannot be halved.
    """

    name = "replay"
    only_sequential = True
    options_class = ReplayOptions
    options: ReplayOptions

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        options = self.options
        if options.per_task is not None and options.fraction is not None:
            raise ValueError(
                "methods.replay must have per_task or fraction, got "
                f"per_task {options.per_task} and fraction {options.fraction}"
            )
        self.half_extra = options.mode == "joint"
        sizes = {"training.batch_size": recipe.training.batch_size}
        sizes |= {f"{task.name}.batch_size": task.batch_size or 2 for task in recipe.all_tasks}
        for key, size in sizes.items():
            if self.half_extra and size % 2:
                raise ValueError(f"{key} must be even with methods.replay.mode 'joint', got {size}")

    def size(self, samples: int) -> int:
        """Number of samples that are kept of a task with so many."""
        if self.options.fraction is not None:
            return math.ceil(self.options.fraction * samples)
        return min(self.options.per_task or PER_TASK, samples)

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        if self.options.fraction is None:
            settings["methods"][self.name]["per_task"] = self.options.per_task or PER_TASK
        return settings

    def draw(self, task: TaskRecipe, samples: int) -> list[int]:
        """Draw the samples of a task that are kept, as indices in its training file, in their order."""
        seed = zlib.crc32(f"{self.recipe.seed} {task.name}".encode())
        return drawn(samples, self.size(samples), seed)

    # ---- hooks

    def extra_samples(self, stage: Stage, kept: tuple[Path, ...]) -> list[tuple[TaskRecipe, int]]:
        if stage.is_downstream:
            return []
        tasks = {task.name: task for task in self.recipe.all_tasks}
        memory = [json.loads(read_text(folder / FILE)) for folder in kept]
        return [(tasks[name], index) for part in memory for name, indices in part.items() for index in indices]

    def num_extra_samples(self, stage: Stage, sizes: Mapping[str, int]) -> int:
        if stage.is_downstream:
            return 0
        return sum(self.size(sizes[task.name]) for earlier in stage.lineage for task in earlier.train)

    def after_stage(self, model: nn.Module, work: StageWork, folder: Path) -> None:
        """Draw the stage's samples."""
        if work.stage.is_downstream:
            return
        (task,) = work.stage.train  # of a stage of one task after another
        if work.process.is_main_process:
            write_json(folder / FILE, {task.name: self.draw(task, len(work))})
