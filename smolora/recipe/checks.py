"""Checks between the values of a recipe, beyond the type and bounds of each."""

from __future__ import annotations

import re

from ..data.own import AND, FORMAT
from .arguments import check_arguments
from .messages import unknown_key
from .schema import ADAPTER_KEYS, Recipe

FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ,._+-]*")


def check_recipe(recipe: Recipe) -> None:
    """Check that the parts of a recipe fit together.

    Raises:
        ValueError: they do not. The message names the key.
    """
    for key in recipe.adapter:
        if key not in ADAPTER_KEYS:
            raise ValueError(unknown_key(f"adapter.{key}", ADAPTER_KEYS))
    recipe.adapter_config()
    check_arguments(recipe.training.arguments)
    if not 0 <= recipe.training.warmup_ratio < 1:
        raise ValueError(f"training.warmup_ratio must lie in [0, 1), got {recipe.training.warmup_ratio}")
    _check_tasks(recipe)


def _check_tasks(recipe: Recipe) -> None:
    if not recipe.tasks:
        raise ValueError("tasks must have an entry")
    names = [task.name for task in recipe.all_tasks]
    for name in (recipe.name, *recipe.downstream, *names):  # each is a folder or a file
        if not FOLDER_NAME.fullmatch(name):
            raise ValueError(f"a name must be letters, digits, spaces and any of ,._+-, got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"tasks and downstream must have different names, got {names}")
    for task in recipe.all_tasks:
        for metric in task.metric:
            if AND in metric or FORMAT in metric:
                raise ValueError(f"{task.name}.metric must be one metric an entry, got {metric!r}")
        if task.metric and task.dataset is not None:
            raise ValueError(f"{task.name}: give dataset or metric, got both, {task.dataset!r} and {task.metric}")
        if task.format is not None and not task.metric:
            raise ValueError(f"{task.name}.format needs a metric, which {task.benchmark_name!r} has of its own")
    upstream = [task.name for task in recipe.tasks]
    if recipe.order is not None and sorted(recipe.order) != sorted(upstream):
        raise ValueError(f"order must have each of the tasks {', '.join(upstream)} once, got {', '.join(recipe.order)}")
    for task in recipe.tasks:
        if task.train is None:
            raise ValueError(f"tasks: {task.name} must have a training file, train")
    if recipe.instructions.embed == "task_mean":
        for task in recipe.all_tasks:
            if not task.instructions:
                raise ValueError(f"instructions.embed=task_mean needs instructions of each task, {task.name} has none")
