"""Training batches: token ids, labels on the answer only, images, and each sample's instruction embedding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..data.format import Conversation, read_conversations
from ..data.images import BrokenImageError, ImageTransform
from ..data.prompts import IGNORED_LABEL, PromptEncoder, Sample, pad
from ..evaluate.instructions import QuestionTexts, TaskInstructions
from ..recipe import Recipe, TaskRecipe
from .methods import Stage


class TrainingSample(NamedTuple):
    """A sample whose image is not read yet."""

    input_ids: list[int]
    labels: list[int]
    image: Path | None
    instruction: Tensor | None  # (e,)
    task_id: int | None
    record: str  # its file and index


class TaskSamples(Dataset):
    """The samples of a task's training file.

    Args:
        recipe: the recipe.
        task: a task with a training file.
        encoder: makes ids and labels.
        instructions: embeds the task's instructions or questions; None for a model that takes no embeddings.
        chosen: indices of records, in this order; None for all.
        task_id: the task's id, for a model that takes `task_ids`.

    Raises:
        ValueError: a record is malformed, or `training.max_length` cuts off its image or all of its answer. The message
            names file and index.
    """

    def __init__(
        self,
        recipe: Recipe,
        task: TaskRecipe,
        encoder: PromptEncoder,
        instructions: TaskInstructions | QuestionTexts | None,
        chosen: Sequence[int] | None = None,
        task_id: int | None = None,
    ) -> None:
        self.task_id = task_id
        self.file = recipe.train_file(task)
        self.images = recipe.images(task)
        self.encoder = encoder
        self.max_length = recipe.training.max_length
        everything = read_conversations(self.file)
        self.samples = everything if chosen is None else [everything[index] for index in chosen]
        if not self.samples:
            raise ValueError(f"{self.file}: must hold a record, got none")
        self._check()
        self.table: Tensor | None = None
        if instructions is not None:
            self.table, self.rows = instructions.table([sample.text for sample in self.samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> TrainingSample:
        sample: Conversation = self.samples[index]
        ids, labels = self._encode(sample)
        return TrainingSample(
            ids,
            labels,
            None if sample.image is None else self.images / sample.image,
            None if self.table is None else self.table[self.rows[index]],
            self.task_id,
            f"{self.file}: record {sample.index}",
        )

    def _encode(self, sample: Conversation) -> Sample:
        """Tokenise a sample, and cut it at `max_length`."""
        limit, record = self.max_length, f"{self.file}: record {sample.index}"
        try:
            ids, labels = self.encoder.expand_sample(
                self.encoder.sample(sample.text, sample.answer, sample.image is not None)
            )
        except ValueError as error:
            raise ValueError(f"{record}: {error}") from error
        if self.encoder.image_token_id in ids[limit:]:
            raise ValueError(f"{record}: its image does not fit into training.max_length {limit}")
        if all(label == IGNORED_LABEL for label in labels[:limit]):
            raise ValueError(
                f"{record}: training.max_length {limit} cuts off all of its answer, it has {len(ids)} tokens"
            )
        return Sample(ids[:limit], labels[:limit])

    def _check(self) -> None:
        """Check that all samples can be trained on. Only those that may be too long are tokenised."""
        faults = []
        for sample in self.samples:
            if not self.encoder.is_short(sample.text, sample.answer, sample.image is not None, self.max_length):
                try:
                    self._encode(sample)
                except ValueError as error:
                    faults.append(str(error))
        if faults:
            raise ValueError(faults[0] + (f" (and {len(faults) - 1} more of that file)" if len(faults) > 1 else ""))

    def lengths(self) -> list[int]:
        """Estimate the length of each sample by its words: sorting by length needs no exact count."""
        features = self.encoder.image_features
        return [
            len(sample.text.split()) + len(sample.answer.split()) + features * (sample.image is not None)
            for sample in self.samples
        ]


def check_samples(recipe: Recipe, stages: Iterable[Stage], encoder: PromptEncoder) -> None:
    """Check the samples of all stages before the first one begins.

    Raises:
        ValueError: as `TaskSamples` does.
    """
    for task in {task.name: task for stage in stages for task in stage.train}.values():
        TaskSamples(recipe, task, encoder, None)


class StageSamples(Dataset):
    """The samples of a stage: those of several tasks, one after the other, and then those that a method adds.

    Args:
        parts: its own samples, by task.
        extra: samples that the method adds.

    Attributes:
        own: number of its own samples.
    """

    def __init__(self, parts: Sequence[TaskSamples], extra: Sequence[TaskSamples] = ()) -> None:
        self.places = [(part, index) for part in (*parts, *extra) for index in range(len(part))]
        self.lengths = [length for part in (*parts, *extra) for length in part.lengths()]
        self.own = sum(map(len, parts))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> TrainingSample:
        part, place = self.places[index]
        return part[place]


class GlobalBatches(Sampler[int]):
    """The order of samples in an epoch: shuffled, cut into optimiser steps, and sorted by length within each step.

    So a device's batches hold samples of similar length, and the samples of a step depend neither on the sorting nor on
    the number of devices.

    Args:
        lengths: lengths of the samples.
        batch_size: samples per optimiser step, over all devices.
        seed: seed of the shuffling, which differs from epoch to epoch.
        own: number of the first samples that half of each step is taken from; the other half is taken from the samples
            after them, which are gone through again and again until the own ones are used up. None for no halves.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, own: int | None = None) -> None:
        self.lengths, self.batch_size, self.seed, self.own, self.epoch = lengths, batch_size, seed, own, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration shuffles for."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) if self.own is None else 2 * self.own

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.own or len(self.lengths), generator=generator).tolist()
        extra: list[int] = []
        while self.own is not None and len(extra) < self.own:
            drawn = torch.randperm(len(self.lengths) - self.own, generator=generator)
            extra += (drawn + self.own).tolist()
        size = self.batch_size if self.own is None else self.batch_size // 2
        for start in range(0, len(order), size):
            end = min(start + size, len(order))
            step = [*order[start:end], *extra[start:end]]
            yield from sorted(step, key=lambda index: (-self.lengths[index], index))


def epoch_samples(own: int, extra: int, halves: bool) -> int:
    """Number of samples in an epoch of a stage.

    Args:
        own, extra: number of the stage's own samples, and of those that a method adds.
        halves: whether half of each step's samples are of the added ones.
    """
    return 2 * own if halves and extra else own + extra


class Collator:
    """Collates samples into a batch, padded on the right. An image that several of them share is decoded once.

    Args:
        transform: makes pixels of an image.
        pad_token_id: token id for the padding.
        dtype: data type of the pixels.
    """

    def __init__(self, transform: ImageTransform, pad_token_id: int, dtype: torch.dtype) -> None:
        self.transform, self.pad_token_id, self.dtype = transform, pad_token_id, dtype

    def __call__(self, samples: Sequence[TrainingSample]) -> dict[str, Any]:
        """input_ids, attention_mask, labels (B, S), pixel_values (images, 3, height, width), and for a model that takes
        them instruction_embeds (B, e) and task_ids (B,).

        Raises:
            ValueError: an image is missing or broken. The message names the record.
        """
        ids, mask = pad([sample.input_ids for sample in samples], self.pad_token_id, left=False)
        labels, _ = pad([sample.labels for sample in samples], IGNORED_LABEL, left=False)
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        pixels: dict[Path, Tensor] = {}
        for sample in samples:
            if sample.image is not None and sample.image not in pixels:
                try:
                    pixels[sample.image] = self.transform(sample.image).to(self.dtype)
                except BrokenImageError as error:
                    raise ValueError(f"{sample.record}: {error}") from error
        if pixels:
            batch["pixel_values"] = torch.stack([pixels[s.image] for s in samples if s.image is not None])
        if samples[0].instruction is not None:
            batch["instruction_embeds"] = torch.stack([s.instruction for s in samples if s.instruction is not None])
        if samples[0].task_id is not None:
            batch["task_ids"] = torch.tensor([s.task_id for s in samples])
        return batch
