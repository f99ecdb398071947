"""The backbone of a model's folder.

`Llava` is LLaVA-1.5 as released, `Chat` any model with a chat template. Another kind is one class in a file of its own,
and its style in `BACKBONES`.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from .base import Backbone
from .chat import Chat
from .llava import Llava, is_llava

BACKBONES: dict[str, type[Backbone]] = {kind.style: kind for kind in (Llava, Chat)}


def load_backbone(folder: str | Path, style: str | None = None) -> Backbone:
    """Load the backbone of a model's folder.

    Args:
        folder: the folder, with tokenizer and image processor.
        style: a name of `BACKBONES`. None is "vicuna_v1" for a LLaVA with a CLIP tower whose chat template, if it has
            one, has Vicuna's turns, and "chat" for all others.

    Raises:
        ValueError: the style does not fit the model.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if style is None:
        template = tokenizer.chat_template or "USER: ASSISTANT:"
        style = "vicuna_v1" if is_llava(config) and "USER:" in template and "ASSISTANT:" in template else "chat"
    return BACKBONES[style].load(folder, config, tokenizer)
