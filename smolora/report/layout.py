"""A run's folder, as the trainer writes it and the report reads it.

    RUN_DIR/
      results.json
      stage-1-ScienceQA/              a folder a stage: its number, the task it trained on
        adapter/  ...                 what training leaves
        answers/ScienceQA.jsonl       for each task seen so far, what the evaluator writes (smolora.evaluate.generate):
        answers/ScienceQA.info.json   answers, and with them routes, alpha and beta of the layers
        scores.json                   {"ScienceQA": {what `smolora score --json` prints}, ...}
      stage-2-TextVQA/ ...
      downstream-zero-shot/           a folder for each downstream table's evaluation, with answers/ and scores.json
      report/                         what `smolora report` writes

One evaluation without stages (zero-shot, multitask) has one folder for its single row, `stage-0-zeroshot` or
`stage-1-multitask`. `results.json` holds one object:

    name          optional, of the recipe
    method        the row's name: "smolora", "seqlora", ...
    benchmark     "CVIT", "MiniCVIT", ...: the paper's rows are shown beside a run on "CVIT" alone
    setting       "single" or "multi", the instructions' type
    protocol      of the scores, "smolora" or "standard"
    tasks         names, in order
    stages        the folders above, in order: row k of the matrix is the evaluation in folder k
    matrix, mif   accuracy and instruction following, a row a stage (see smolora.evaluate.metrics)
    AP, MAP, BWT, MIF      one entry a stage
    downstream    optional, {"zero-shot": {"folder", "tasks", "accuracy", "mif", "AP", "MIF"}, ...}
    tests         {task: {"questions": its test file, "images": the folder of its images}}, paths from RUN_DIR
    config        the recipe; the report reads its seed and, of its `adapter`, num_vu_experts and num_if_experts. Runs
                  of one recipe that differ in the seed alone are averaged
    versions, timing       of packages; in seconds, tokens/s and bytes
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
class Run:
    """One run, read and checked; see the module."""

    folder: Path
    name: str  # in figures and tables: the method, and the folder where several runs have one
    method: str
    benchmark: str
    setting: str
    protocol: str
    tasks: list[str]
    stages: list[str]
    matrix: list[list[float | None]]
    figures: dict[str, list[float | None]]  # AP, MAP, BWT, MIF: one entry a stage
    downstream: dict[str, dict[str, Any]]
    tests: dict[str, dict[str, str]]
    versions: dict[str, str]
    experts: int | None  # of both branches together; None for a method that has none
    recipe: str | None  # its name
    seed: int | None
    settings: str  # all else of the recipe, to compare

    @property
    def last(self) -> dict[str, float | None]:
        """AP, MAP, BWT and MIF after the last stage."""
        return {figure: values[-1] for figure, values in self.figures.items()}

    def accuracy(self, stage: int, task: str) -> float | None:
        """Of a task after a stage (from 0); None where it was not evaluated."""
        row, column = self.matrix[stage], self.tasks.index(task)
        return row[column] if column < len(row) else None

    def own_stage(self, task: str) -> int:
        """The stage that trained on a task, the last one where there is no such stage."""
        return min(self.tasks.index(task), len(self.stages) - 1)

    def answers(self, stage: int, task: str) -> dict[str, str]:
        """Answers by question id."""
        path = self.folder / self.stages[stage] / "answers" / f"{task}.jsonl"
        return {str(answer.question_id): answer.text for answer in read_answers(path)}

    @cached_property
    def routing(self) -> dict[str, list[dict[str, Any]]]:
        """The last evaluation's routes, alpha and beta by task, downstream tasks too; empty without adapters."""
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
    """A task's or a table's name as part of a file's name: as it is, if it is one that a recipe may give."""
    return re.sub(r"[^A-Za-z0-9 ,._+-]+|^[^A-Za-z0-9]+", "-", text)


def read_runs(folders: list[Path]) -> list[Run]:
    """Runs, each by a name of its own.

    Raises:
        ValueError: a folder holds no finished run; what its `results.json` lacks is named.
    """
    contents = [_read(folder) for folder in folders]
    methods = [content["method"] for content in contents]
    return [
        Run(
            folder,
            method if methods.count(method) == 1 else f"{method} ({folder.resolve().name})",
            **{name: content[name] for name in REQUIRED if name not in FIGURES},
            figures={name: content[name] for name in FIGURES},
            **{name: content.get(name) or {} for name in ("downstream", "tests", "versions")},
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
            method="dirlora" if content["method"] == "dirlora" else None,
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
