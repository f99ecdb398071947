"""An object in the place of a model's method."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class Wrapper:
    """Stands in the place of a model's method.

    It refers to the model by attribute, so a copied model gets a wrapper of its own.

    Args:
        model: the model, or a module within it.
        name: the method's name.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self.own: Callable = getattr(model, name)  # the class's, or what was assigned to the model
        self.was_replaced = name in model.__dict__

    def install(self) -> None:
        """Take the method's place."""
        self.model.__dict__[self.name] = self

    def remove(self) -> None:
        """Put the method back, unless something else has taken its place since."""
        if self.model.__dict__.get(self.name) is self:
            del self.model.__dict__[self.name]
            if self.was_replaced:
                self.model.__dict__[self.name] = self.own

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs)
