"""Add-ons: hooks that go with any adapter, with options of their own."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ...recipe import Recipe
from .adapter import read_options
from .hooks import Hooks


class AddOn(Hooks):
    """An add-on to any adapter.

    Its `options` are its section of the recipe, `methods.<name>`.

    Args:
        recipe: the recipe of the run.

    Raises:
        ValueError: a key of its section is unknown, or a value does not fit.
    """

    name: ClassVar[str]
    options_class: ClassVar[type]
    options: Any

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.options = read_options(recipe, self.name, self.options_class)

    def settings(self) -> dict[str, Any]:
        return {"methods": {self.name: dataclasses.asdict(self.options)}}
