"""Sweeps: the runs of a grid over a recipe's keys, each in a process and a folder of its own."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

import torch

from ..recipe import Recipe, load_recipe
from ..recipe.load import parse_yaml

LONGEST = 100  # characters of a folder's name


@dataclass(frozen=True)
class Point:
    """A run of a grid.

    Args:
        values: the swept keys with this run's values.
        overrides: changes to the recipe, as `load_recipe` takes them.
        recipe: the recipe with them.
    """

    values: dict[str, Any]
    overrides: list[str]
    recipe: Recipe

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.recipe.folder.name


def read_grid(path: Path, arguments: Sequence[str], output: str | None = None) -> list[Point]:
    """Read the grid of a sweep: all combinations of the values of the keys that have several.

    Args:
        path: the recipe.
        arguments: `key=value`, a change for all runs, or `key=a,b,c`, values to sweep; values are YAML, and commas
            within brackets, braces and quotes do not part them.
        output: folder of the sweep; None for the recipe's own with "-sweep".

    Returns:
        The runs, the last key's values following each other. Each has a folder within the sweep's.

    Raises:
        ValueError: no key has several values, a key or a value is given twice, `output` is swept, or a recipe is wrong.
    """
    fixed: list[str] = []
    axes: dict[str, list[Any]] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        key = key.strip()
        values = _values(text) if equals and key else []
        if key in axes or any(key == other.partition("=")[0].strip() for other in fixed):
            raise ValueError(f"a sweep takes each key once, got {key} twice")
        if len(values) < 2:
            fixed.append(argument)  # faults are told as those of an override
            continue
        if key == "output":
            raise ValueError(f"output must be one folder, in which each run has its own, got {argument!r}")
        shown = [_text(value) for value in values]
        if len(set(shown)) < len(shown):
            raise ValueError(f"{key} must have different values, got {text}")
        axes[key] = values
    base = load_recipe(path, fixed)
    if not axes:
        raise ValueError("a sweep needs a key with several values, key=a,b,c, got none")
    folder = Path(output or f"{base.folder}-sweep")
    points = []
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        changes = {**chosen, "output": str(folder / _folder_name(chosen))}
        overrides = [*fixed, *(f"{key}={_text(value)}" for key, value in changes.items())]
        points.append(Point(chosen, overrides, load_recipe(path, overrides)))
    return points


def _values(text: str) -> list[Any]:
    """The values of a key, which commas part; none where the text is a value of another form, or no YAML."""
    try:
        values: list[Any] = parse_yaml(f"[{text}]", text)
    except ValueError:  # a regular expression, for example, has brackets of its own
        return []
    return values


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or all of it where another key has the same last part."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)}


def shown(value: Any) -> str:
    """A value as a person writes it."""
    return value if isinstance(value, str) else _text(value)


def run_points(path: Path, points: Sequence[Point], *, jobs: int, quiet: bool) -> Iterator[tuple[Point, int]]:
    """Train the runs of a grid, several at a time, each by `smolora train` in a process of its own.

    Where there are several CUDA devices, a process sees one of them.

    Args:
        path: the recipe.
        points: the runs. One that was begun is continued.
        jobs: runs at a time.
        quiet: show no progress of the runs.

    Yields:
        each run that ends, and its exit status.
    """
    devices = _devices()
    free: SimpleQueue[int] = SimpleQueue()
    for slot in range(jobs):
        free.put(slot)
    command = [sys.executable, "-m", "smolora.cli", "train", str(path)]
    options = ["--json", *(["--quiet"] if quiet or jobs > 1 else [])]  # with --json progress goes to stderr

    with ThreadPoolExecutor(jobs) as pool, _children() as start:  # children end before their threads are waited for

        def run(point: Point) -> int:
            slot = free.get()
            try:
                environment = dict(os.environ)
                if jobs > 1 and len(devices) > 1:
                    environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
                return start([*command, *point.overrides, *options], environment)
            finally:
                free.put(slot)

        work = {pool.submit(run, point): point for point in points}
        for done in as_completed(work):
            yield work[done], done.result()


@contextmanager
def _children() -> Iterator[Any]:
    """Run child processes in threads; those that are still running are ended with the block."""
    running: set[subprocess.Popen] = set()
    change, ended = Lock(), False

    def start(command: Sequence[str], environment: dict[str, str]) -> int:
        with change:
            if ended:
                return -1
            child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
            running.add(child)
        status = child.wait()
        with change:
            running.discard(child)
        return status

    try:
        yield start
    finally:
        with change:
            ended = True
            for child in running:
                child.terminate()


def _devices() -> list[str]:
    """The CUDA devices that this process may use, as the environment names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]


def _text(value: Any) -> str:
    """A value as YAML on one line."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _folder_name(values: dict[str, Any]) -> str:
    """A name for a run's folder, which no other combination of values has."""
    names = short_names(list(values))
    whole = ",".join(f"{names[key]}={shown(value)}" for key, value in values.items())
    name = re.sub(r"[^A-Za-z0-9 ,.=_+-]+", "-", whole)[:LONGEST]
    return name if name == whole else f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
