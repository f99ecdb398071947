"""What a recipe can make itself, before it trains: data, a base model.

`prepare: {NAME: OPTIONS}` of a recipe names an entry of `PREPARATIONS`, a module with two functions:

    planned(options) -> dict[Path, int | None]   what it makes, each path with the number of its records if it has any
    prepare(options) -> None                     makes what is not there yet; safe to be killed and started again
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from ..recipe.messages import not_one_of

PREPARATIONS: dict[str, str] = {"minicvit": "smolora.minicvit.prepare"}  # name: module


def planned(preparations: dict[str, Any]) -> dict[Path, int | None]:
    """What a recipe's `prepare` makes: resolved paths, each with its number of records if it has any."""
    paths: dict[Path, int | None] = {}
    for name, options in preparations.items():
        made = _module(name).planned(options or {})
        paths.update({Path(path).resolve(): count for path, count in made.items()})
    return paths


def prepare(preparations: dict[str, Any]) -> None:
    """Make it."""
    for name, options in preparations.items():
        _module(name).prepare(options or {})


def _module(name: str) -> ModuleType:
    if name not in PREPARATIONS:
        raise ValueError(not_one_of("prepare", name, PREPARATIONS))
    return importlib.import_module(PREPARATIONS[name])
