"""Stages of a run, and what a method's hooks are given of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...io.files import read_text, write_json
from ...recipe import TaskRecipe


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

    @property
    def number(self) -> int:
        """Number of stages that trained its adapter before."""
        return 0 if self.starts_from is None else self.starts_from.number + 1

    @property
    def is_downstream(self) -> bool:
        """Whether it is a downstream task's, from which no stage starts."""
        return self.table is not None

    @property
    def lineage(self) -> list[Stage]:
        """The trained stages that its adapter goes through before it, oldest first."""
        before = self.starts_from
        return [] if before is None else [*before.lineage, *([before] if before.train else [])]


@dataclass(frozen=True)
class StageWork:
    """A stage at work: its training data, and what the stages before it kept.

    Args:
        stage: the stage.
        kept: folder of each stage that its adapter went through, oldest first, with what the method kept there.
        samples: its own training samples, without those that a hook adds.
        collate: makes a batch of samples.
        batch_size: samples in a batch.
        process: this process, one of several that share the data.
        notes: folder of what `once` found, beside the stage's checkpoints; None to write nothing.
        goes_on: whether the stage goes on from a checkpoint.
    """

    stage: Stage
    kept: tuple[Path, ...]
    samples: Dataset[Any]
    collate: Callable[[Sequence[Any]], dict[str, Any]]
    batch_size: int
    process: PartialState
    notes: Path | None = None
    goes_on: bool = False

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def batches(self, chosen: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        """Iterate over this process's share of the samples, batch by batch, as they are trained on.

        Args:
            chosen: indices of samples, in this order; None for all.

        Yields:
            The arguments of the model's forward, on this process's device.
        """
        indices = range(len(self)) if chosen is None else chosen
        starts = range(0, len(indices), self.batch_size)
        for start in starts[self.process.process_index :: self.process.num_processes]:
            yield self._batch(indices[start : start + self.batch_size])

    def groups(self, chosen: Sequence[int], size: int) -> Iterator[list[dict[str, Any]]]:
        """Iterate over this process's share of groups of samples, whose size depends on no device.

        Args:
            chosen: indices of samples, in this order.
            size: samples of a group; the last has what is left.

        Yields:
            The batches of a group, as in `batches`.
        """
        starts = range(0, len(chosen), size)
        for start in starts[self.process.process_index :: self.process.num_processes]:
            group = chosen[start : start + size]
            yield [self._batch(group[i : i + self.batch_size]) for i in range(0, len(group), self.batch_size)]

    def _batch(self, indices: Sequence[int]) -> dict[str, Any]:
        batch = self.collate([self.samples[index] for index in indices])
        return {name: tensor.to(self.process.device) for name, tensor in batch.items()}

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """Find something out before the first step; a stage that goes on from a checkpoint reads what was found.

        Args:
            name: of the file that keeps it.
            find: returns it, as JSON has it. Called by all processes, or by none.
        """
        path = None if self.notes is None else self.notes / f"{name}.json"
        if path is not None and self.goes_on and path.is_file():
            return json.loads(read_text(path))
        found = find()
        if path is not None and self.process.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found)
        return found

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return values if self.process.num_processes == 1 else torch.as_tensor(reduce(values, "sum"))


def drawn(size: int, count: int, seed: int) -> list[int]:
    """Draw `count` of `size` samples uniformly without replacement, or all where there are fewer; in their order."""
    return sorted(torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].tolist())


def strided(size: int, count: int) -> list[int]:
    """Choose `count` of `size` samples at even distances, or all where there are fewer."""
    count = min(size, count)
    return [place * size // count for place in range(count)]


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Use a model as it answers, without dropout, and put it back into the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """Use the model without what was trained, and leave everything frozen or not as it was."""
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, does in trains:
            parameter.requires_grad_(does)
