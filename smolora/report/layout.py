"""The folder of a run, which the trainer writes and the report reads.

    RUN_DIR/
      results.json
      stage-1-ScienceQA/              one folder per stage, with its number and the task that it trained on
        adapter/  ...                 the trained adapter
        answers/ScienceQA.jsonl       answers for each task seen so far (see smolora.evaluate.generate)
        answers/ScienceQA.info.json   routes, alpha and beta of each layer
        log.json                      optional, the trainer's log
        scores.json                   {"ScienceQA": {the output of `smolora score --json`}, ...}
      stage-2-TextVQA/ ...
      downstream-zero-shot/           one folder per downstream table, with answers/ and scores.json
      report/                         the output of `smolora report`

One evaluation without stages (zero-shot, multitask) has one folder for its single row, `stage-0-zeroshot` or
`stage-1-multitask`. `results.json` holds one object:

    name          optional, of the recipe
    method        "smolora", "seqlora", ...
    benchmark     "CVIT", "MiniCVIT", ...; the paper's rows are shown beside runs on `evaluate.paper.UPSTREAM_TABLES`
    setting       type of the instructions, "single" or "multi"
    protocol      protocol of the scores, "smolora", "standard" or "coin"
    course        optional, of the stages: "sequential", "one-per-task", "joint" or "none"
    task_source   optional, who says at test which task a question is of: "given", "selector" or null
    selected      optional, where a selector says it: for each stage {task: how often its questions were taken for each
                  task, in order, then for the few-shot one, if there is one, and last for none}
    tasks         names, in order
    stages        the folders above, in order; row k of the matrix is the evaluation in folder k
    matrix, mif   accuracy and instruction following, one row per stage (see smolora.evaluate.metrics); under the
                  protocol "coin", mif is null
    AP, MAP, BWT, MIF      one entry per stage
    downstream    optional, {"zero-shot": {"folder", "tasks", "accuracy", "mif", "AP", "MIF"}, ...}
    tests         {task: {"questions": its test file, "images": the folder of its images, "dataset": the dataset that
                  scores it, "annotations": folders with the files for scoring}}, paths from RUN_DIR
    config        the recipe; the report reads `seed`, `adapter.num_vu_experts` and `adapter.num_if_experts`, and
                  averages runs that differ only in their seed
    versions      versions of packages
    training      optional, {stage: {"samples", "steps", "trainable", "stored"}}; the last two count
                  parameters
    timing        seconds, tokens/s and bytes: {stage: {"training": {"seconds", "tokens", "tokens_per_second",
                  "peak_memory"}, "evaluation": {task: {"seconds", "answers_per_second"}}}}
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data.format import read_answers, read_json
from ..evaluate.metrics import FIGURES, continual_metrics

REQUIRED = ("method", "benchmark", "setting", "protocol", "tasks", "stages", "matrix", *FIGURES)


@dataclass(frozen=True)
class RunFolder:
    """A run that was read and checked; see the module."""

    folder: Path
    name: str  # for figures and tables: the method, with the folder's name if several runs share it
    method: str
    benchmark: str
    setting: str
    protocol: str
    tasks: list[str]
    stages: list[str]
    matrix: list[list[float | None]]
    figures: dict[str, list[float | None]]  # AP, MAP, BWT, MIF: one entry per stage
    downstream: dict[str, dict[str, Any]]
    tests: dict[str, dict[str, Any]]
    training: dict[str, dict[str, Any]]
    timing: dict[str, dict[str, Any]]
    versions: dict[str, str]
    task_source: str | None
    selected: list[dict[str, list[int]]] | None
    experts: int | None  # of both branches together; None for a method without experts
    recipe: str | None  # name of the recipe
    seed: int | None
    settings: str  # the rest of the recipe as text, for comparison

    @property
    def last(self) -> dict[str, float | None]:
        """AP, MAP, BWT and MIF after the last stage."""
        return {figure: values[-1] for figure, values in self.figures.items()}

    def accuracy(self, stage: int, task: str) -> float | None:
        """Accuracy on a task after a stage, counted from 0; None if it was not evaluated."""
        row, column = self.matrix[stage], self.tasks.index(task)
        return row[column] if column < len(row) else None

    def own_stage(self, task: str) -> int:
        """The stage that trained on a task, or the last stage if none did."""
        return min(self.tasks.index(task), len(self.stages) - 1)

    def answers_file(self, stage: int, task: str) -> Path:
        """The file of answers to a task after a stage."""
        return self.folder / self.stages[stage] / "answers" / f"{task}.jsonl"

    def answers(self, stage: int, task: str) -> dict[str, str]:
        """Answers to a task after a stage, by question id."""
        return {str(answer.question_id): answer.text for answer in read_answers(self.answers_file(stage, task))}

    def selector_accuracy(self, stage: int, task: str) -> float | None:
        """Percentage of a task's questions that a selector took for questions of it; None where there is none."""
        counts = [] if self.selected is None else self.selected[stage].get(task, [])
        return 100 * counts[self.tasks.index(task)] / sum(counts) if any(counts) else None

    def losses(self, stage: int) -> list[tuple[int, float]]:
        """The training loss by optimiser step, as the trainer logged it; empty for a stage without training."""
        path = self.folder / self.stages[stage] / "log.json"
        log = read_json(path) if path.is_file() else []
        return [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]

    @cached_property
    def routing(self) -> dict[str, list[dict[str, Any]]]:
        """Routes, alpha and beta of the last evaluation by task, downstream tasks included; empty without adapters."""
        folders = [(self.stages[-1], self.tasks)]
        folders += [(part["folder"], part["tasks"]) for part in self.downstream.values()]
        found = {}
        for folder, tasks in folders:
            for task in tasks:
                path = self.folder / folder / "answers" / f"{task}.info.json"
                layers = read_json(path).get("routing") if path.is_file() else None
                if layers:
                    found[task] = layers
        return found


def file_name(text: str) -> str:
    """Make a task's or a table's name part of a file name. Names that a recipe may give stay as they are."""
    return re.sub(r"[^A-Za-z0-9 ,._+-]+|^[^A-Za-z0-9]+", "-", text)


def read_runs(folders: list[Path]) -> list[RunFolder]:
    """Read runs, and give each a name of its own.

    Raises:
        ValueError: a folder holds no finished run. The message says what its `results.json` lacks.
    """
    contents = [_read(folder) for folder in folders]
    methods = [content["method"] for content in contents]
    return [
        RunFolder(
            folder,
            method if methods.count(method) == 1 else f"{method} ({folder.resolve().name})",
            **{name: content[name] for name in REQUIRED if name not in FIGURES},
            figures={name: content[name] for name in FIGURES},
            **{name: content.get(name) or {} for name in ("downstream", "tests", "training", "timing", "versions")},
            task_source=content.get("task_source"),
            selected=content.get("selected"),
            experts=_experts((content.get("config") or {}).get("adapter") or {}),
            recipe=content.get("name"),
            seed=(content.get("config") or {}).get("seed"),
            settings=_settings(content),
        )
        for folder, method, content in zip(folders, methods, contents, strict=True)
    ]


def _settings(content: dict[str, Any]) -> str:
    config = {key: value for key, value in (content.get("config") or {}).items() if key not in ("seed", "output")}
    return json.dumps([content["method"], content["benchmark"], content["tasks"], config], sort_keys=True)


def _experts(adapter: dict[str, Any]) -> int | None:
    counts = [adapter.get("num_vu_experts"), adapter.get("num_if_experts")]
    return sum(counts) if all(isinstance(count, int) for count in counts) else None


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no finished run: it has no results.json")
    content = read_json(path)
    missing = [name for name in REQUIRED if not isinstance(content, dict) or name not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    try:
        figures = continual_metrics(
            content["tasks"],
            content["matrix"],
            content.get("mif"),
            method="dirlora" if content.get("course", content["method"]) in ("one-per-task", "dirlora") else None,
            allow_missing=True,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if len(content["stages"]) != len(content["matrix"]):
        raise ValueError(f"{path}: stages must name {len(content['matrix'])} folders, got {len(content['stages'])}")
    for name in FIGURES:
        for stage, (printed, expected) in enumerate(zip(content[name], figures[name], strict=False), 1):
            if printed is not None and (expected is None or abs(printed - expected) > 1e-6):
                raise ValueError(f"{path}: {name} of stage {stage} is {printed}, but {expected} by the matrix")
    return content
