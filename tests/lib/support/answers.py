"""What an evaluation leaves, read; and settings of which every batch has several questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smolora.backbones.base import Backbone
from smolora.data.format import Question
from smolora.evaluate.generate import BatchGenerator, BatchImages, Embed, GenerationSettings
from smolora.evaluate.routing import RoutingRecorder

BATCHED = GenerationSettings(max_new_tokens=5, token_budget=200, image_workers=0)


def read(path: Path) -> list[dict]:
    """The lines of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def info(path: Path) -> dict:
    """The info file beside an answers file."""
    return json.loads(path.with_suffix(".info.json").read_text())


def answered(
    model: Any, backbone: Backbone, questions: Sequence[Question], paths: dict[str, Path], embed: Embed | None = None
) -> tuple[list[str], list[list[dict[str, Any]]], list[int] | None]:
    """Answer questions in one batch, whose images have these paths."""
    with RoutingRecorder(model) as recorder:
        generator = BatchGenerator(model, backbone, embed, None, GenerationSettings(max_new_tokens=24), recorder)
        prompts = [backbone.prompt(question.messages) for question in questions]
        images = BatchImages.read(backbone, [[paths[name] for name in question.images] for question in questions])
        return generator(questions, prompts, images)
