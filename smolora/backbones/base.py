"""What a backbone is: how one kind of model is given conversations and images, and how its answers are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.format import Message
from ..data.prompts import Sample


class ImageInput(NamedTuple):
    """An image as a model takes it.

    Attributes:
        ids: the token ids that stand for it in the text.
        tensors: arguments of the model's forward by name. The first dimension is that of a batch.
    """

    ids: list[int]
    tensors: dict[str, Tensor]


class Backbone(ABC):
    """Conversations as token ids, images as tensors, and answers as text.

    In `prompt` and `sample` an image is one placeholder. `expand` replaces it by the ids of what `read` gives.

    Attributes:
        style: its name in a recipe's `model.prompt`.
        tokenizer: the language model's.
        image_token_id: the placeholder of an image.
        feature_token_id: stands for each feature of an image in its ids.
        pad_token_id: fills a batch.
        stop_token_ids: the ids that end an answer.
        stop_texts: texts that end an answer, each of any number of ids.
        image_tokens: how many ids stand for any image; None if that depends on the image.
    """

    style: ClassVar[str]
    tokenizer: Any
    image_token_id: int
    feature_token_id: int
    pad_token_id: int
    stop_token_ids: list[int]
    stop_texts: tuple[str, ...] = ()
    image_tokens: int | None = None

    @classmethod
    @abstractmethod
    def load(cls, folder: str | Path, config: Any, tokenizer: Any) -> Backbone:
        """Load the backbone of a model's folder.

        Args:
            folder: the folder.
            config: its configuration.
            tokenizer: its tokenizer.

        Raises:
            ValueError: this kind of backbone does not fit the model.
        """

    # ---- text

    @abstractmethod
    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Encode a conversation that ends with the user's message, up to where the answer begins.

        Raises:
            ValueError: the conversation cannot be written in this style.
        """

    @abstractmethod
    def sample(self, messages: Sequence[Message]) -> Sample:
        """Encode a conversation that ends with an answer. Only answers and what ends each have labels.

        Raises:
            ValueError: the conversation cannot be written in this style.
        """

    def is_short(self, messages: Sequence[Message], images: Sequence[Path], limit: int) -> bool:
        """Return whether a sample certainly can be encoded, in at most `limit` ids, if that is known at once."""
        return False

    def decode(self, ids: Sequence[int]) -> str:
        """Decode a generated answer up to the first id or text that ends it, stripped, without special tokens."""
        end = next((place for place, token in enumerate(ids) if token in self.stop_token_ids), len(ids))
        text = self.tokenizer.decode(list(ids[:end]), skip_special_tokens=True)
        for stop in self.stop_texts:
            text = text.partition(stop)[0]
        return text.strip()

    # ---- images

    @abstractmethod
    def image_length(self, path: Path) -> int:
        """Return how many ids stand for an image, without decoding it.

        Raises:
            BrokenImageError: it has to be looked at, and cannot be read.
        """

    @abstractmethod
    def read(self, path: Path) -> ImageInput:
        """Read an image.

        Raises:
            BrokenImageError: it is missing, or cannot be decoded or processed.
        """

    def cropping(self) -> Backbone:
        """Return the backbone that crops images instead of padding them to a square.

        Raises:
            ValueError: there is no such choice.
        """
        raise ValueError(
            f"evaluation.padding must be 'all' where model.prompt is {self.style}, as the processor decides on the "
            "images, got 'released'"
        )

    def join(self, images: Iterable[ImageInput]) -> dict[str, Tensor]:
        """Join the tensors of a batch's images by name, in order. Smaller ones are padded with zeros at their ends."""
        by_name: dict[str, list[Tensor]] = {}
        for image in images:
            for name, tensor in image.tensors.items():
                by_name.setdefault(name, []).append(tensor)
        return {name: torch.cat(_same_shape(tensors)) for name, tensors in by_name.items()}

    def token_inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """Return further arguments of the forward that follow from the padded and expanded ids (B, S)."""
        return {}

    # ---- placeholders

    def expand(self, ids: Sequence[int], images: Sequence[Sequence[int]]) -> list[int]:
        """Replace each placeholder by the ids of its image."""
        return self.expand_sample(Sample(list(ids), list(ids)), images).input_ids

    def expand_sample(self, sample: Sample, images: Sequence[Sequence[int]]) -> Sample:
        """Replace each placeholder of a training sample by the ids of its image; they keep the placeholder's label."""
        left = iter(images)
        ids: list[int] = []
        labels: list[int] = []
        for token, label in zip(sample.input_ids, sample.labels, strict=True):
            place = next(left) if token == self.image_token_id else (token,)
            ids.extend(place)
            labels.extend([label] * len(place))
        return Sample(ids, labels)

    def length(self, ids: Sequence[int], images: Sequence[Path]) -> int:
        """Return the number of ids after `expand`."""
        return len(ids) + sum(self.image_length(path) - 1 for path in images)

    # ---- identity

    def settings(self) -> dict[str, Any]:
        """Return what answers depend on besides the prompts' ids."""
        return {"prompt": self.style}


def _same_shape(tensors: list[Tensor]) -> list[Tensor]:
    """Pad tensors to the largest size of each dimension but the first."""
    sizes = [max(lengths) for lengths in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    return [
        F.pad(tensor, [n for size, own in zip(sizes[::-1], tensor.shape[:0:-1], strict=True) for n in (0, size - own)])
        for tensor in tensors
    ]
