"""MiniGPT-4 with Vicuna as released: its prompt, 32 tokens an image, and BLIP's images.

    ###Human: <Img>...</Img> {text} ###Assistant: {answer}###

The pieces around an image and the answer with the mark that ends it are tokenised apart, and the sequence starts with
one BOS. A following turn begins after that mark. A system message stands before the first mark. Unlike in the released
training, no part of an image is cut out at random: all are resized as in the released evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import BlipImageProcessorPil

from ..data.format import Message
from ..data.images import read_image
from ..data.prompts import IGNORED_LABEL, PlainText, Sample
from .base import Backbone, ImageInput

MARK = "###"  # before each turn, and at the end of an answer


class MiniGPT4(Backbone):
    """A Blip2 of ViT, Q-Former and Vicuna, in the style "minigpt4".

    Args:
        tokenizer: the Vicuna's; needs `bos_token_id` and `eos_token_id`.
        processor: of images.
        image_token_id: the placeholder of an image, and of each of its features, in the model's configuration.
        queries: the features of an image.

    Raises:
        ValueError: the tokenizer has no BOS or no EOS.
    """

    style: ClassVar[str] = "minigpt4"

    def __init__(self, tokenizer: Any, processor: BlipImageProcessorPil, image_token_id: int, queries: int) -> None:
        self.tokenizer, self.processor, self.queries = tokenizer, processor, queries
        self.image_token_id = self.feature_token_id = image_token_id
        self.image_tokens = queries
        self.plain = PlainText(tokenizer, image_token_id)
        self.pad_token_id = self.plain.pad_token_id
        self.stop_token_ids = [tokenizer.eos_token_id]
        self.stop_texts = (MARK,)

    @classmethod
    def load(cls, folder: str | Path, config: Any, tokenizer: Any) -> MiniGPT4:
        if not is_minigpt4(config):
            text = getattr(getattr(config, "text_config", None), "model_type", None)
            raise ValueError(
                f"model.prompt minigpt4 is for a Blip2 with a Llama, got {config.model_type} with {text} in {folder}: "
                "leave it out, or say chat"
            )
        processor = BlipImageProcessorPil.from_pretrained(folder, local_files_only=True)
        return cls(tokenizer, processor, config.image_token_id, config.num_query_tokens)

    # ---- text

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return self.sample(messages).input_ids

    def sample(self, messages: Sequence[Message]) -> Sample:
        ids: list[int] = [self.tokenizer.bos_token_id]
        labels = [IGNORED_LABEL]
        for piece, is_answer in self._pieces(messages):
            tokens = [self.image_token_id] if piece is None else self.plain.tokens(piece)
            ids += tokens
            labels += tokens if is_answer else [IGNORED_LABEL] * len(tokens)
        return Sample(ids, labels)

    def is_short(self, messages: Sequence[Message], images: Sequence[Path], limit: int) -> bool:
        texts = [message.text for message in messages]
        if not self.plain.is_certain(*texts) or any(MARK in text for text in texts):
            return False
        # a token for every byte, of marks and spaces too
        bound = sum(len(text.encode()) + 24 for text in texts) + (self.queries + 16) * len(images)
        return bound + 1 <= limit

    def _pieces(self, messages: Sequence[Message]) -> Iterator[tuple[str | None, bool]]:
        """Yield what is tokenised apart, with None for an image, and whether it is an answer.

        Raises:
            ValueError: an answer holds the mark that ends it.
        """
        written, after_answer = "", False
        for message in messages:
            if message.role == "assistant":
                if MARK in message.text:
                    raise ValueError(f"an answer must not hold {MARK!r}, which ends it, got {message.text!r}")
                yield written, False
                yield f"{message.text}{MARK}", True
                written, after_answer = "", True
                continue
            if message.role == "user":
                written += "Human: " if after_answer else f"{MARK}Human: "
            before: str | None = None
            for part in message.parts:
                if before is not None:
                    written += "\n"
                if part is None:
                    yield f"{written}<Img>", False
                    yield None, False
                    written = "</Img> "
                else:
                    written += part
                before = part
            if message.role == "user":
                written += f" {MARK}Assistant: "
        if written:
            yield written, False

    # ---- images

    def image_length(self, path: Path) -> int:
        return self.queries

    def read(self, path: Path) -> ImageInput:
        return self.process(read_image(path))

    def process(self, image: Image.Image) -> ImageInput:
        """Return an image as the model takes it."""
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"].to(torch.float32)
        return ImageInput([self.image_token_id] * self.queries, {"pixel_values": pixels})

    def join(self, images: Iterable[ImageInput]) -> dict[str, Tensor]:
        """Join the images of a batch. Where there is none a blank one takes their place, which the model needs."""
        found = super().join(images)
        if found:
            return found
        size = self.processor.size
        return {"pixel_values": torch.zeros(1, 3, size["height"], size["width"])}


def is_minigpt4(config: Any) -> bool:
    """Return whether a model is a Blip2 with a Llama."""
    text = getattr(config, "text_config", None)
    return config.model_type == "blip-2" and getattr(text, "model_type", None) == "llama"
