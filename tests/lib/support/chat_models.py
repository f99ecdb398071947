"""Small random models with chat templates, in folders as a user has them."""

from __future__ import annotations

from pathlib import Path

from smolora.minicvit.kinds import KINDS, BaseSettings
from smolora.minicvit.pictures import MINICVIT_PICTURES

CHAT_KINDS = ("qwen2_5_vl", "internvl")


def save_chat(folder: Path, kind: str) -> Path:
    """Save a model of a kind of MiniCVIT's base with its processor; an answer may also end with <pad>."""
    settings = BaseSettings(vision_hidden=16, vision_layers=1, hidden=32, layers=1, backbone=kind)
    base = KINDS[kind](settings, MINICVIT_PICTURES)
    if kind == "qwen2_5_vl":  # pictures of several sizes
        base.processor.image_processor.size = {"shortest_edge": 24 * 24, "longest_edge": 96 * 96}
    base.model.generation_config.eos_token_id = [0, base.tokenizer.eos_token_id]
    base.model.save_pretrained(folder)
    base.processor.save_pretrained(folder)
    return folder
