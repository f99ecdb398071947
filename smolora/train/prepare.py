"""Preparations: data or a base model that a recipe makes itself before training.

`prepare: {NAME: OPTIONS}` of a recipe names an entry of `PREPARATIONS`, an object of a module, with two methods:

    planned(options) -> dict[Path, int | None]   paths that it makes, each with its number of records if it has any
    prepare(options) -> None                     makes those that do not exist yet; may be killed and called again
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..recipe.messages import not_one_of

PREPARATIONS: dict[str, str] = {  # name: module
    "minicvit": "smolora.minicvit.prepare",
    "minicvit_20": "smolora.minicvit.prepare",
    "minicoin": "smolora.minicvit.prepare",
}


def planned(preparations: dict[str, Any]) -> dict[Path, int | None]:
    """The resolved paths that a recipe's `prepare` section makes, each with its number of records if it has any."""
    paths: dict[Path, int | None] = {}
    for name, options in preparations.items():
        made = _preparation(name).planned(options or {})
        paths.update({Path(path).resolve(): count for path, count in made.items()})
    return paths


def prepare(preparations: dict[str, Any]) -> None:
    """Make the data and models of a recipe's `prepare` section."""
    for name, options in preparations.items():
        _preparation(name).prepare(options or {})


def _preparation(name: str) -> Any:
    if name not in PREPARATIONS:
        raise ValueError(not_one_of("prepare", name, PREPARATIONS))
    return getattr(importlib.import_module(PREPARATIONS[name]), name)
