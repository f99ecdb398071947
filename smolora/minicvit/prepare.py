"""Preparation of recipes on MiniCVIT: its data, and the base model aligned on its kinds of pictures.

    prepare: {minicvit: {data: DIR, base: DIR, tasks: [NAME, ...]}}

Both are made once and kept for later runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ..extras import require_extra
from ..io.files import user_path
from .base_model import make_base
from .tasks import SETTINGS, TASKS, make_minicvit, training_files


class Options(NamedTuple):
    """The options of `prepare.minicvit`."""

    data: Path
    base: Path
    tasks: list[str]


def _options(options: dict[str, Any]) -> Options:
    unknown = sorted(options.keys() - {"data", "base", "tasks"})
    if unknown:
        raise ValueError(f"prepare.minicvit has data, base and tasks, got {', '.join(unknown)} too")
    folders = []
    for name in ("data", "base"):
        if not isinstance(options.get(name), str) or not options[name]:
            raise ValueError(f"prepare.minicvit.{name} must be a folder, got {options.get(name)!r}")
        try:
            folders.append(Path(user_path(options[name])))
        except ValueError as error:
            raise ValueError(f"prepare.minicvit.{name}: {error}") from error
    tasks = options.get("tasks", list(TASKS))
    if not isinstance(tasks, list) or not tasks or not all(task in TASKS for task in tasks):
        raise ValueError(f"prepare.minicvit.tasks must be a list of {', '.join(TASKS)}, got {tasks!r}")
    data, base = folders
    return Options(data, base, tasks)


def planned(options: dict[str, Any]) -> dict[Path, int | None]:
    """Return the paths that `prepare` makes, each with its number of records if it has any.

    Raises:
        MissingExtraError: a package that drawing needs is not installed.
        ValueError: an option is unknown, or has a wrong value.
    """
    require_extra("minicvit", user="prepare.minicvit")
    data, base, tasks = _options(options)
    paths: dict[Path, int | None] = {base: None, data / "images": None, data / "annotations": None}
    for tree in SETTINGS:
        for name in tasks:
            paths[data / tree / name / TASKS[name].test_file] = TASKS[name].test
            paths.update({data / tree / name / file: count for file, count in training_files(name).items()})
    return paths


def prepare(options: dict[str, Any]) -> None:
    """Make the data and the base model, unless they are there.

    Raises:
        ValueError: an option is unknown or has a wrong value, or the base's folder holds something else.
    """
    data, base, tasks = _options(options)
    make_minicvit(data, tasks)
    make_base(base)
