"""The results of a run, gathered from its finished stages into one object."""

from __future__ import annotations

import math
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..evaluate.metrics import continual_metrics
from ..recipe import Recipe
from .methods import Method, Stage
from .paths import RunPaths, read, read_if_exists


def collect_results(recipe: Recipe, method: Method, paths: RunPaths) -> dict[str, Any]:
    """The content of results.json, as `smolora.report.layout` describes it.

    "training" is added: samples, steps and trained parameters of each trained stage, and how many numbers its adapter
    and what it keeps for later stages have. Everything that differs between a run and the same run killed and continued
    is under "timing".
    """
    stages, downstream = method.course.stages(), method.course.downstream()
    done = [stage for stage in stages if paths.scores(stage).keys() >= {task.name for task in stage.test}]
    scores = [paths.scores(stage) for stage in done]
    matrix = method.course.matrix([{name: row["score"] for name, row in of_stage.items()} for of_stage in scores])
    mif = None
    if recipe.evaluation.protocol != "coin":  # which has no MIF
        mif = method.course.matrix([{name: row["mif"] for name, row in of_stage.items()} for of_stage in scores])
    tasks = [task.name for task in recipe.tasks]
    metrics = continual_metrics(tasks, matrix, mif, method=method.course.metrics_method, allow_missing=True)
    trained = [stage for stage in (*stages, *downstream) if paths.adapter(stage).is_dir()]
    training = {stage.name: read(paths.stage(stage) / "training.json") for stage in trained}
    timing = {name: {"training": content.pop("timing")} for name, content in training.items()}
    for stage in trained:
        training[stage.name]["stored"] = num_stored(paths.adapter(stage)) + num_stored(paths.kept(stage))
    for stage in (*done, *downstream):
        seconds = read_if_exists(paths.evaluation(stage) / "evaluation.json")
        if seconds:
            timing.setdefault(stage.table or stage.name, {})["evaluation"] = seconds
    return {
        "name": recipe.name,
        "method": method.name,
        "benchmark": recipe.benchmark or recipe.name,
        "setting": recipe.setting,
        "protocol": recipe.evaluation.protocol,
        "course": method.course_name,
        "task_source": method.task_source,
        "selected": _selected(recipe, paths, done) if method.task_source == "selector" else None,
        "tasks": tasks,
        "stages": [stage.name for stage in done],
        "matrix": matrix,
        "mif": mif,
        **{name: values[: len(done)] for name, values in metrics.items()},
        "downstream": _downstream_results(recipe, paths),
        "training": training,
        "tests": {
            task.name: {
                "questions": os.path.relpath(recipe.test_file(task), paths.root),
                "images": os.path.relpath(recipe.images(task), paths.root),
                "dataset": task.benchmark_name,
                "annotations": [os.path.relpath(folder, paths.root) for folder in recipe.annotations(task)],
            }
            for task in recipe.all_tasks
        },
        "config": {**recipe.as_dict(), **method.settings()},
        "versions": _versions(),
        "timing": timing,
    }


def _selected(recipe: Recipe, paths: RunPaths, done: list[Stage]) -> list[dict[str, list[int]]]:
    """For each finished stage and each task asked after it, how often a selector took its questions for each task.

    Last comes how many it took for none.
    """
    rows: list[dict[str, list[int]]] = []
    for stage in done:
        row = {}
        for task in stage.test:
            info = read(paths.evaluation(stage) / "answers" / f"{task.name}.info.json")
            found = info.get("tasks", [])
            row[task.name] = [found.count(number) for number in (*range(recipe.num_task_ids), -1)]
        rows.append(row)
    return rows


def _downstream_results(recipe: Recipe, paths: RunPaths) -> dict[str, Any]:
    """The finished downstream tables, including those that an earlier recipe of this run asked for."""
    tables = read_if_exists(paths.results).get("downstream", {})
    for name, tasks in recipe.downstream.items():
        scores = read_if_exists(paths.root / f"downstream-{name}" / "scores.json")
        if tasks and all(task.name in scores for task in tasks):
            accuracy, mif = ([scores[task.name][figure] for task in tasks] for figure in ("score", "mif"))
            tables[name] = {
                "folder": f"downstream-{name}",
                "tasks": [task.name for task in tasks],
                "accuracy": accuracy,
                "mif": mif,
                "AP": sum(accuracy) / len(tasks),
                "MIF": None if None in mif else sum(mif) / len(tasks),
            }
    return tables


def num_stored(folder: Path) -> int:
    """Count the numbers in a folder's tensors, buffers such as a selector's keys among them."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    return total


def _versions() -> dict[str, str]:
    packages = ("smolora", "torch", "transformers", "peft", "accelerate")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"python": platform.python_version(), **{name: version(name) for name in packages}, "device": device}
