"""Error messages of a recipe: the dotted key, what it must be, and what it is."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from ..io.files import surrogate
from .schema import ADAPTER_KEYS, Recipe

UNKNOWN_KEY = "unexpected_keyword_argument"
EXPECTATIONS = {  # pydantic's error type: what the value must be
    "string_type": "a text",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "list_type": "a list",
    "dict_type": "a section of keys and values",
    "dataclass_type": "a section of keys and values",
}


def invalid_recipe(error: ValidationError) -> str:
    """Describe the first fault that pydantic found in a recipe, an unknown key before others: it may explain them."""
    return invalid_section(error, Recipe, "")


def invalid_section(error: ValidationError, section: type, name: str) -> str:
    """Describe the first fault that pydantic found in a section of a recipe.

    Args:
        error: what pydantic raised.
        section: dataclass of the section's keys.
        name: dotted key of the section, empty for the whole recipe.
    """
    faults = error.errors()
    fault = next((fault for fault in faults if fault["type"] == UNKNOWN_KEY), faults[0])
    kind, value, context = fault["type"], fault["input"], fault.get("ctx", {})
    path = [part for part in fault["loc"] if not str(part).startswith("<")]  # without the tag of a choice
    key = ".".join(map(str, [name, *path] if name else path))
    if kind == UNKNOWN_KEY:
        return unknown_key(key, _known_keys(section, path[:-1]))
    if kind == "missing":
        return f"{key} is missing"
    if kind == "literal_error":
        return f"{key} must be one of {context['expected'].replace(' or ', ', ')}, got {value!r}"
    if kind == "greater_than":
        return f"{key} must be positive, got {value}"
    if kind == "greater_than_equal":
        return f"{key} must be at least {context['ge']}, got {value}"
    if kind == "less_than_equal":
        return f"{key} must be at most {context['le']}, got {value}"
    if kind == "string_unicode":
        return f"{key} must be a text, got {shortened(value)} with {surrogate(value)}"
    if kind in EXPECTATIONS:
        return f"{key or 'a recipe'} must be {EXPECTATIONS[kind]}, got {shortened(value)}"
    return f"{key}: {context.get('error', fault['msg'])}"


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Describe an unknown key by the nearest one of its section, or else of the whole recipe.

    Args:
        key: dotted key.
        known: last parts of the keys that its section has.
    """
    section, _, name = key.rpartition(".")
    known = list(known)
    near = difflib.get_close_matches(name, known, 1, 0.6)
    # "dropout" is a part of lora_dropout, "rank" the long name of r, and lr has learning_rate's initials
    near += [k for k in known if name in k or name.startswith(k) or name == "".join(word[0] for word in k.split("_"))]
    if near:
        nearest = f"{section}.{near[0]}" if section else near[0]
    else:
        dotted = dict(_all_keys(Recipe, ""))
        nearest = dotted[difflib.get_close_matches(name, list(dotted), 1, 0.0)[0]]
    return f"unknown key {key!r}; did you mean {nearest!r}?"


def not_one_of(argument: str, value: Any, known: Iterable[str]) -> str:
    """Describe a value that is none of the known names, with the nearest one."""
    known = list(known)
    near = difflib.get_close_matches(str(value), known, 1, 0.3)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{argument} must be one of {', '.join(known)}, got {value!r}{hint}"


def shortened(value: Any) -> str:
    """Show a value in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _known_keys(section: type, path: Sequence[str | int]) -> Iterable[str]:
    """The keys of the section at a path, which leads through lists, mappings and choices too."""
    kind: Any = section
    for part in path:
        kind = typing.get_type_hints(kind)[str(part)] if dataclasses.is_dataclass(kind) else typing.get_args(kind)[-1]
        if typing.get_origin(kind) in (typing.Union, types.UnionType):  # of a text and a section
            kind = typing.get_args(kind)[-1]
    return typing.get_type_hints(kind)


def _all_keys(cls: type, section: str) -> Iterator[tuple[str, str]]:
    """Every key of a recipe as (last part, dotted key). Outer sections come last, so in a dict they win."""
    hints = typing.get_type_hints(cls)
    for name, hint in hints.items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _all_keys(hint, f"{section}{name}.")
    if cls is Recipe:
        yield from ((name, f"adapter.{name}") for name in ADAPTER_KEYS)
    yield from ((name, section + name) for name in hints)
