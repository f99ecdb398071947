"""Training batches: token ids, labels on the answer only, images, and each sample's instruction embedding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..backbones.base import Backbone, ImageInput
from ..backbones.load import load_backbone
from ..data.format import Conversation, instruction_source, read_conversations
from ..data.images import BrokenImageError
from ..data.prompts import IGNORED_LABEL, Sample, pad
from ..evaluate.instructions import QuestionTexts, TaskInstructions
from ..recipe import Recipe, TaskRecipe
from .methods import Stage


def recipe_backbone(recipe: Recipe) -> Backbone:
    """Load the backbone of a recipe's base model.

    Raises:
        ValueError: `model.prompt` or `evaluation.padding` does not fit the model.
    """
    backbone = load_backbone(recipe.model.path, recipe.model.prompt)
    if recipe.evaluation.padding == "released":
        backbone.cropping()
    return backbone


class TrainingSample(NamedTuple):
    """A sample whose images are not read yet: each is one placeholder in its ids."""

    input_ids: list[int]
    labels: list[int]
    images: tuple[Path, ...]
    instruction: Tensor | None  # (e,)
    task_id: int | None
    record: str  # its file and index


class TaskSamples(Dataset):
    """The samples of a task's training file.

    Args:
        recipe: the recipe.
        task: a task with a training file.
        backbone: makes ids and labels.
        instructions: embeds the task's instructions or questions; None for a model that takes no embeddings.
        chosen: indices of records, in this order; None for all.
        task_id: the task's id, for a model that takes `task_ids`.

    Raises:
        ValueError: a record is malformed, or `training.max_length` cuts off an image or all answers. The message
            names file and index.
    """

    def __init__(
        self,
        recipe: Recipe,
        task: TaskRecipe,
        backbone: Backbone,
        instructions: TaskInstructions | QuestionTexts | None,
        chosen: Sequence[int] | None = None,
        task_id: int | None = None,
    ) -> None:
        self.task_id = task_id
        self.file = recipe.train_file(task)
        self.images = recipe.images(task)
        self.backbone = backbone
        self.max_length = recipe.training.max_length
        everything = read_conversations(self.file)
        self.samples = everything if chosen is None else [everything[index] for index in chosen]
        if not self.samples:
            raise ValueError(f"{self.file}: must hold a record, got none")
        self._check()
        self.table: Tensor | None = None
        if instructions is not None:
            where = getattr(instructions, "where", "last_line")
            try:
                texts = [instruction_source(sample, where) for sample in self.samples]
                self.table, self.rows = instructions.table(texts)
            except ValueError as error:
                raise ValueError(f"{self.file}: {error}") from error

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> TrainingSample:
        sample: Conversation = self.samples[index]
        ids, labels = self._encode(sample)
        return TrainingSample(
            ids,
            labels,
            self._images(sample),
            None if self.table is None else self.table[self.rows[index]],
            self.task_id,
            self._record(sample),
        )

    def _images(self, sample: Conversation) -> tuple[Path, ...]:
        return tuple(self.images / image for image in sample.images)

    def _record(self, sample: Conversation) -> str:
        return f"{self.file}: record {sample.index}"

    def _encode(self, sample: Conversation) -> Sample:
        """Tokenise a sample."""
        try:
            return self.backbone.sample(sample.messages)
        except ValueError as error:
            raise ValueError(f"{self._record(sample)}: {error}") from error

    def _check(self) -> None:
        """Check that all samples can be trained on. Only those that may be too long are tokenised."""
        faults = []
        for sample in self.samples:
            images = self._images(sample)
            if not self.backbone.is_short(sample.messages, images, self.max_length):
                try:
                    encoded = self._encode(sample)
                    lengths = [[self.backbone.feature_token_id] * self.backbone.image_length(image) for image in images]
                    cut(self.backbone.expand_sample(encoded, lengths), self.backbone.feature_token_id, self.max_length)
                except ValueError as error:
                    where = self._record(sample)
                    faults.append(str(error) if str(error).startswith(where) else f"{where}: {error}")
        if faults:
            raise ValueError(faults[0] + (f" (and {len(faults) - 1} more of that file)" if len(faults) > 1 else ""))

    def lengths(self) -> list[int]:
        """Estimate the length of each sample by its words: sorting by length needs no exact count."""
        return [
            sum(len(message.text.split()) for message in sample.messages)
            + sum(self.backbone.image_length(image) for image in self._images(sample))
            for sample in self.samples
        ]

    def most_image_tokens(self) -> int:
        """Return the most ids that stand for the images of a sample."""
        return max(sum(map(self.backbone.image_length, self._images(sample))) for sample in self.samples)


def cut(sample: Sample, feature_token_id: int, limit: int) -> Sample:
    """Cut an expanded sample at the end.

    Raises:
        ValueError: that cuts off an image or all labels.
    """
    ids, labels = sample
    if feature_token_id in ids[limit:]:
        raise ValueError(f"its image does not fit into training.max_length {limit}")
    if any(label != IGNORED_LABEL for label in labels[limit:]) and set(labels[:limit]) <= {IGNORED_LABEL}:
        raise ValueError(f"training.max_length {limit} cuts off all of its answer, it has {len(ids)} tokens")
    return Sample(ids[:limit], labels[:limit])


def check_samples(recipe: Recipe, stages: Iterable[Stage], backbone: Backbone) -> int:
    """Check the samples of all stages before the first one begins.

    Returns:
        The most ids that stand for the images of a sample.

    Raises:
        ValueError: as `TaskSamples` does.
    """
    most = 0
    for task in {task.name: task for stage in stages for task in stage.train}.values():
        most = max(most, TaskSamples(recipe, task, backbone, None).most_image_tokens())
    return most


class StageSamples(Dataset):
    """The samples of a stage: those of several tasks, one after the other, and then those that a method adds.

    Args:
        parts: its own samples, by task.
        extra: samples that the method adds.

    `samples[~i]` is sample i without labels, which fills a batch and teaches nothing.

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
        part, place = self.places[index if index >= 0 else ~index]
        sample = part[place]
        return sample if index >= 0 else sample._replace(labels=[IGNORED_LABEL] * len(sample.labels))


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
        multiple: the last step is filled up to a multiple of this with its shortest sample i, as ~i.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, own: int | None = None, multiple: int = 1
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.own, self.epoch = lengths, batch_size, seed, own, 0
        samples = len(lengths) if own is None else 2 * own
        self.fillers = -samples % multiple

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration shuffles for."""
        self.epoch = epoch

    def __len__(self) -> int:
        return (len(self.lengths) if self.own is None else 2 * self.own) + self.fillers

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
            step = sorted([*order[start:end], *extra[start:end]], key=lambda index: (-self.lengths[index], index))
            yield from step
            if end == len(order):
                yield from [~step[-1]] * self.fillers


def epoch_samples(own: int, extra: int, halves: bool) -> int:
    """Number of samples in an epoch of a stage.

    Args:
        own, extra: number of the stage's own samples, and of those that a method adds.
        halves: whether half of each step's samples are of the added ones.
    """
    return 2 * own if halves and extra else own + extra


class Collator:
    """Collates samples into a batch, padded on the right. An image that several of them share is read once.

    Args:
        backbone: reads images and joins them.
        max_length: samples are cut to this many tokens.
        dtype: data type of the pixels.
    """

    def __init__(self, backbone: Backbone, max_length: int, dtype: torch.dtype) -> None:
        self.backbone, self.max_length, self.dtype = backbone, max_length, dtype

    def __call__(self, samples: Sequence[TrainingSample]) -> dict[str, Any]:
        """input_ids, attention_mask, labels (B, S), the images' tensors (for a LLaVA pixel_values, (images, 3, height,
        width)), and for a model that takes them instruction_embeds (B, e) and task_ids (B,).

        Raises:
            ValueError: an image is missing or broken, or does not fit into a sample. The message names the record.
        """
        backbone, images = self.backbone, self._read(samples)
        whole = []
        for sample in samples:
            ids_of = [images[path].ids for path in sample.images]
            try:
                expanded = backbone.expand_sample(Sample(sample.input_ids, sample.labels), ids_of)
                whole.append(cut(expanded, backbone.feature_token_id, self.max_length))
            except ValueError as error:
                raise ValueError(f"{sample.record}: {error}") from error
        ids, mask = pad([sample.input_ids for sample in whole], backbone.pad_token_id, left=False)
        labels, _ = pad([sample.labels for sample in whole], IGNORED_LABEL, left=False)
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        batch |= backbone.join(images[path] for sample in samples for path in sample.images)
        batch |= backbone.token_inputs(ids)
        if samples[0].instruction is not None:
            batch["instruction_embeds"] = torch.stack([s.instruction for s in samples if s.instruction is not None])
        if samples[0].task_id is not None:
            batch["task_ids"] = torch.tensor([s.task_id for s in samples])
        return batch

    def _read(self, samples: Sequence[TrainingSample]) -> dict[Path, ImageInput]:
        """Read the images of the samples, with pixels in the data type."""
        images: dict[Path, ImageInput] = {}
        for sample in samples:
            for path in sample.images:
                if path not in images:
                    try:
                        ids, tensors = self.backbone.read(path)
                    except BrokenImageError as error:
                        raise ValueError(f"{sample.record}: {error}") from error
                    images[path] = ImageInput(
                        ids, {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in tensors.items()}
                    )
        return images
