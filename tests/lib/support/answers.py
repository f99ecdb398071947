"""What an evaluation leaves, read; and settings of which every batch has several questions."""

from __future__ import annotations

import json
from pathlib import Path

from smolora.evaluate.generate import GenerationSettings

BATCHED = GenerationSettings(max_new_tokens=5, token_budget=200, image_workers=0)


def read(path: Path) -> list[dict]:
    """The lines of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def info(path: Path) -> dict:
    """The info file beside an answers file."""
    return json.loads(path.with_suffix(".info.json").read_text())
