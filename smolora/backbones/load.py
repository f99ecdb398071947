"""The backbone of a model's folder.

`Llava` and `MiniGPT4` are LLaVA-1.5 and MiniGPT-4 as released, `Chat` is any model with a chat template. Another kind
is one class in a file of its own, and its style in `BACKBONES`.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from .base import Backbone
from .chat import Chat
from .llava import Llava, is_llava
from .minigpt4 import MiniGPT4, is_minigpt4

BACKBONES: dict[str, type[Backbone]] = {kind.style: kind for kind in (Llava, MiniGPT4, Chat)}


def load_backbone(folder: str | Path, style: str | None = None) -> Backbone:
    """Load the backbone of a model's folder.

    Args:
        folder: the folder, with tokenizer and image processor.
        style: a name of `BACKBONES`. None is "vicuna_v1" for a LLaVA with a CLIP tower whose chat template, if it has
            one, has Vicuna's turns, "minigpt4" for an assembled MiniGPT-4, and "chat" for all others.

    Raises:
        ValueError: the style does not fit the model.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if style is None:
        template = tokenizer.chat_template
        if is_llava(config) and (template is None or ("USER:" in template and "ASSISTANT:" in template)):
            style = Llava.style
        else:
            style = (MiniGPT4 if is_minigpt4(config) and "###Human:" in (template or "") else Chat).style
    return BACKBONES[style].load(folder, config, tokenizer)
