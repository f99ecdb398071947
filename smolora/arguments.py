"""Checks of arguments that several modules share."""

from __future__ import annotations

import math
from typing import Any


def is_int(value: Any, at_least: int) -> bool:
    """Return whether a value is an integer of at least a bound; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def is_number(value: Any) -> bool:
    """Return whether a value is a finite int or float; a bool is neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_int(name: str, value: Any, least: int = 1) -> None:
    """Check an integer argument.

    Raises:
        ValueError: `value` is not an integer, or is less than `least`.
    """
    if not is_int(value, least):
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name} must be {kind}, got {value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Check an argument that takes one of a few words.

    Raises:
        ValueError: `value` is not among `choices`.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
