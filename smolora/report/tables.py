"""The report's tables, in Markdown and as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..evaluate import paper
from ..evaluate.matrix import FIGURES
from .figures import write_csv
from .layout import Run

Cells = list[str | float | None]


def markdown(header: Sequence[str], rows: Sequence[Cells]) -> str:
    """A Markdown table; numbers with two decimals, None as a dash."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def final_table(path: Path, runs: Sequence[Run]) -> str:
    """After the last stage, in the form of the paper's Table 1, with the paper's rows where they compare."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    rows: list[Cells] = []
    for setting in dict.fromkeys(run.setting for run in runs):
        if tuple(tasks) == paper.UPSTREAM and all(_comparable(run) for run in runs):
            for method, row in paper.TABLE_1[setting].items():
                rows.append([f"{method}, paper", setting, *row.accuracy, *(getattr(row, f) for f in FIGURES)])
        for run in runs:
            if run.setting == setting:
                last = len(run.stages) - 1
                accuracy = [run.accuracy(last, task) if task in run.tasks else None for task in tasks]
                rows.append([run.name, setting, *accuracy, *(run.last[f] for f in FIGURES)])
    header = ["run", "instructions", *tasks, *FIGURES]
    write_csv(path, header, rows)
    return markdown(header, rows)


def downstream_tables(folder: Path, runs: Sequence[Run]) -> dict[str, str]:
    """For each downstream evaluation a table in the form of the paper's Tables 2 and 3."""
    names = list(dict.fromkeys(name for run in runs for name in run.results.get("downstream") or {}))
    tables = {}
    for name in names:
        parts = [
            (run, run.results["downstream"][name]) for run in runs if name in (run.results.get("downstream") or {})
        ]
        tasks = list(dict.fromkeys(task for _, part in parts for task in part["tasks"]))
        published, places = {
            "zero-shot": (paper.TABLE_2, paper.ZERO_SHOT),
            "few-shot": (paper.TABLE_3, paper.FEW_SHOT),
        }.get(name, ({}, ()))
        rows: list[Cells] = []
        for setting in dict.fromkeys(run.setting for run, _ in parts):
            if tuple(tasks) == places and all(_comparable(run) for run, _ in parts):
                for method, row in published[setting].items():
                    rows.append([f"{method}, paper", setting, *row.accuracy, row.AP, row.MIF])
            for run, part in parts:
                if run.setting == setting:
                    accuracy = dict(zip(part["tasks"], part["accuracy"], strict=True))
                    rows.append([run.name, setting, *map(accuracy.get, tasks), part["AP"], part["MIF"]])
        header = ["run", "instructions", *tasks, "AP", "MIF"]
        write_csv(folder / f"downstream-{name}.csv", header, rows)
        tables[name] = markdown(header, rows)
    return tables


def stage_table(path: Path, runs: Sequence[Run]) -> str:
    """AP, MAP, BWT and MIF after each stage of each run."""
    rows: list[Cells] = [
        [run.name, stage.removeprefix("stage-"), *(run.results[figure][k] for figure in FIGURES)]
        for run in runs
        for k, stage in enumerate(run.stages)
    ]
    header = ["run", "after stage", *FIGURES]
    write_csv(path, header, rows)
    return markdown(header, rows)


def _comparable(run: Run) -> bool:
    """Whether the paper's rows may stand beside a run's."""
    return run.benchmark == "CVIT" and run.protocol == "smolora"


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    return value.replace("|", "\\|").replace("\n", "<br>") if isinstance(value, str) else f"{value:.2f}"
