"""Prompts of LLaVA-1.5 (vicuna_v1) as token ids, the same for training and evaluation.

    A chat between ... questions. USER: <image>\\n{text} ASSISTANT: {answer}</s>

The pieces before and after the image are tokenised by themselves, and the sequence starts with one BOS. An image is one
placeholder id until `PromptEncoder.expand` writes it once for each of its features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .format import IMAGE_TOKEN

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IGNORED_LABEL = -100


class Sample(NamedTuple):
    """A training sample: ids, and as labels those of the answer and of the end; -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


def prompt_text(text: str, image: bool) -> str:
    """The prompt of a question, up to where the answer starts (a space, then the answer)."""
    return f"{SYSTEM} USER: {IMAGE_TOKEN}\n{text} ASSISTANT:" if image else f"{SYSTEM} USER: {text} ASSISTANT:"


class PromptEncoder:
    """Turns questions and answers into ids.

    Args:
        tokenizer: of the language model; must have `bos_token_id` and `eos_token_id`.
        image_token_id: placeholder of an image, as the model's configuration has it.
        image_features: how many features an image gives.

    Raises:
        ValueError: the tokenizer has no BOS or no EOS.
    """

    def __init__(self, tokenizer: Any, image_token_id: int, image_features: int) -> None:
        for name in ("bos_token_id", "eos_token_id"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"the tokenizer must have a {name}, got None")
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.image_features = image_features
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @classmethod
    def for_model(cls, tokenizer: Any, config: Any) -> PromptEncoder:
        """The encoder for a LLaVA of this configuration."""
        vision = config.vision_config
        features = (vision.image_size // vision.patch_size) ** 2
        if config.vision_feature_select_strategy == "full":  # with the class token
            features += 1
        return cls(tokenizer, config.image_token_id, features)

    def prompt(self, text: str, image: bool) -> list[int]:
        """Ids of a question; its image, if it has one, is a single placeholder."""
        return self._encode(prompt_text(text, image))

    def sample(self, text: str, answer: str, image: bool) -> Sample:
        """Ids and labels of a question with its answer; loss on the answer and the end alone."""
        prompt = self.prompt(text, image)
        # tokenised in one piece, as the released code does; what the prompt alone begins with too is no answer
        ids = [*self._encode(f"{prompt_text(text, image)} {answer}"), self.tokenizer.eos_token_id]
        start = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), len(prompt))
        return Sample(ids, [IGNORED_LABEL] * start + ids[start:])

    def expand(self, ids: Sequence[int]) -> list[int]:
        """The ids with every placeholder written once for each feature of its image."""
        expanded: list[int] = []
        for token in ids:
            expanded.extend([token] * (self.image_features if token == self.image_token_id else 1))
        return expanded

    def expand_sample(self, sample: Sample) -> Sample:
        """`expand` for a training sample; images carry no loss."""
        labels: list[int] = []
        for token, label in zip(sample.input_ids, sample.labels, strict=True):
            labels.extend([label] * (self.image_features if token == self.image_token_id else 1))
        return Sample(self.expand(sample.input_ids), labels)

    def length(self, ids: Sequence[int]) -> int:
        """How many ids `expand` gives."""
        return len(ids) + (self.image_features - 1) * sum(token == self.image_token_id for token in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens and space around."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def _encode(self, prompt: str) -> list[int]:
        ids = [self.tokenizer.bos_token_id]
        # only the image's own place is one: "<image>" in a question is text, which comes after the first
        has_image = prompt.startswith(f"{SYSTEM} USER: {IMAGE_TOKEN}\n")
        pieces = prompt.split(IMAGE_TOKEN, 1) if has_image else [prompt]
        for index, piece in enumerate(pieces):
            if index:
                ids.append(self.image_token_id)
            ids += self.tokenizer(piece, add_special_tokens=False).input_ids
        return ids


def pad(sequences: Sequence[Sequence[int]], value: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Sequences as one batch.

    Returns:
        (B, S) int64, padded with `value` on the left or the right, and its mask (B, S) int64: 0 where padding is.
    """
    width = max(map(len, sequences))
    batch = torch.full((len(sequences), width), value, dtype=torch.int64)
    mask = torch.zeros_like(batch)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(len(sequence))
        batch[row, place] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, place] = 1
    return batch, mask
