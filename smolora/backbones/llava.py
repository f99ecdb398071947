"""LLaVA-1.5 as released: Vicuna's prompt, and images padded to a square for CLIP's tower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from ..data.format import Message
from ..data.images import ImageTransform
from ..data.prompts import PromptEncoder, Sample
from .base import Backbone, ImageInput


class Llava(Backbone):
    """A LLaVA with a CLIP tower, in the style "vicuna_v1".

    Args:
        encoder: makes its prompts.
        transform: makes its images.
    """

    style: ClassVar[str] = "vicuna_v1"

    def __init__(self, encoder: PromptEncoder, transform: ImageTransform) -> None:
        self.encoder, self.transform = encoder, transform
        self.tokenizer = encoder.tokenizer
        self.image_token_id = self.feature_token_id = encoder.image_token_id
        self.pad_token_id = encoder.pad_token_id
        self.image_tokens = encoder.image_features
        self.stop_token_ids = [encoder.tokenizer.eos_token_id]

    @classmethod
    def load(cls, folder: str | Path, config: Any, tokenizer: Any) -> Llava:
        if not is_llava(config):
            tower = getattr(getattr(config, "vision_config", None), "model_type", None)
            raise ValueError(
                f"model.prompt vicuna_v1 is for a LLaVA with a CLIP tower, got {config.model_type} with {tower} in "
                f"{folder}: leave it out, or say chat"
            )
        return cls(PromptEncoder.for_model(tokenizer, config), ImageTransform.from_pretrained(folder))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return self.encoder.conversation(messages)

    def sample(self, messages: Sequence[Message]) -> Sample:
        return self.encoder.answered(messages)

    def is_short(self, messages: Sequence[Message], images: Sequence[Path], limit: int) -> bool:
        if len(messages) > 2 or len(images) > 1:
            return False
        return self.encoder.is_short(messages[0].text, messages[1].text, bool(images), limit)

    def decode(self, ids: Sequence[int]) -> str:
        end = self.tokenizer.eos_token_id
        return self.encoder.decode(ids[: ids.index(end)] if end in ids else ids)

    def image_length(self, path: Path) -> int:
        return self.encoder.image_features

    def read(self, path: Path) -> ImageInput:
        ids = [self.image_token_id] * self.encoder.image_features
        return ImageInput(ids, {"pixel_values": self.transform(path)[None]})

    def cropping(self) -> Llava:
        return Llava(self.encoder, ImageTransform(self.transform.processor, square=False))

    def settings(self) -> dict[str, Any]:
        return {"square_images": self.transform.square}


def is_llava(config: Any) -> bool:
    """Return whether a model is a LLaVA with a CLIP tower."""
    tower = getattr(config, "vision_config", None)
    return config.model_type == "llava" and getattr(tower, "model_type", None) == "clip_vision_model"
