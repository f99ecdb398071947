"""Reading a recipe: YAML, `extends`, and overrides by `key=value`.

`extends: other.yaml` takes another recipe of the same folder and changes what is given here. Sections are merged, lists
are replaced as a whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from ..io.files import read_text, user_path
from .checks import check_recipe
from .messages import invalid_recipe, shortened
from .schema import Recipe


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `key=value`. Dots lead into sections and lists (`training.epochs=2`, `tasks.0.train=x.json`,
            `tasks.GQA.train=x.json`), values are YAML, and the last override of a key counts.

    Raises:
        ValueError: a key is unknown (the message has the nearest known one) or given twice, or a value does not fit.
            The message names key and value.
        OSError: the file cannot be read.
    """
    content = _read(Path(path), ())
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"an override must be key=value, got {override!r}")
        _apply_override(content, key.strip(), parse_yaml(value, override), override)
    try:
        recipe = TypeAdapter(Recipe).validate_python(content)
        check_recipe(recipe)
    except ValidationError as error:
        raise ValueError(f"{path}: {invalid_recipe(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if recipe.order is None:
        return recipe
    by_name = {task.name: task for task in recipe.tasks}
    return dataclasses.replace(recipe, tasks=[by_name[name] for name in recipe.order])


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's own loader silently takes the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for position, key in enumerate(given):
            if key in given[:position]:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"{key!r} is given twice in the section that starts in line {line}")
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, source: Any) -> Any:
    """Read YAML without keys that are given twice.

    Args:
        text: the YAML.
        source: where it is from, for messages.

    Raises:
        ValueError: it is no such YAML.
    """
    try:
        return yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not YAML: {error}") from error


def _read(path: Path, extending: Sequence[Path]) -> dict[str, Any]:
    """Read a file and the recipes that it extends.

    Args:
        path: the file.
        extending: the files that led to it, to find a circle.
    """
    content = parse_yaml(read_text(path), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold keys and values, got {shortened(content)}")
    base = content.pop("extends", None)
    if base is None:
        return content
    other = path.parent / user_path(str(base))
    if other in extending:
        raise ValueError(f"{path}: extends {base}, which extends it")
    return _merge(_read(other, (*extending, path)), content)


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = _merge(old[key], value) if both else value
    return merged


def _apply_override(content: Any, key: str, value: Any, override: str) -> None:
    """Set the value at a dotted key, creating the sections that lead to it."""
    *sections, last = key.split(".")
    for part in sections:
        if isinstance(content, list):
            content = content[_list_index(content, part, override)]
        else:
            if content.get(part) is None:
                content[part] = {}
            content = content[part]
        if not isinstance(content, (dict, list)):
            raise ValueError(f"{override}: {part} is no section but {shortened(content)}")
    content[_list_index(content, last, override) if isinstance(content, list) else last] = value


def _list_index(items: list[Any], part: str, override: str) -> int:
    """Find a list entry by its index or by its `name`."""
    names = [item.get("name") for item in items if isinstance(item, dict)]
    if part in names:
        return names.index(part)
    if not part.isdecimal() or int(part) >= len(items):
        named = "".join(f", {name}" for name in names if name is not None)
        raise ValueError(f"{override}: {part} must be one of 0 to {len(items) - 1}{named}")
    return int(part)
