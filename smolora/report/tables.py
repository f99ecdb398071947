"""The report's tables, in Markdown and as CSV."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluate import paper
from ..evaluate.metrics import FIGURES
from ..io.markdown import table
from .figures import write_csv
from .layout import Run, file_name

Cells = list[str | float | None]


def markdown(header: Sequence[str], rows: Sequence[Cells]) -> str:
    """A Markdown table; numbers with two decimals, None as a dash."""
    return table(header, [list(map(_cell, row)) for row in rows])


def final_table(path: Path, runs: Sequence[Run]) -> str:
    """After the last stage, in the form of the paper's Table 1, with the paper's rows where they compare."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    rows = [(run, {task: run.accuracy(len(run.stages) - 1, task) for task in run.tasks}, run.last) for run in runs]
    return _beside_the_paper(path, tasks, FIGURES, rows, paper.TABLE_1 if tuple(tasks) == paper.UPSTREAM else None)


def downstream_tables(folder: Path, runs: Sequence[Run]) -> dict[str, str]:
    """For each downstream evaluation a table in the form of the paper's Tables 2 and 3."""
    printed = {"zero-shot": (paper.TABLE_2, paper.ZERO_SHOT), "few-shot": (paper.TABLE_3, paper.FEW_SHOT)}
    tables = {}
    for name in dict.fromkeys(name for run in runs for name in run.downstream):
        parts = [(run, run.downstream[name]) for run in runs if name in run.downstream]
        tasks = list(dict.fromkeys(task for _, part in parts for task in part["tasks"]))
        rows = [(run, dict(zip(part["tasks"], part["accuracy"], strict=True)), part) for run, part in parts]
        of_paper, columns = printed.get(name, (None, None))
        tables[name] = _beside_the_paper(
            folder / f"downstream-{file_name(name)}.csv",
            tasks,
            ("AP", "MIF"),
            rows,
            of_paper if tuple(tasks) == columns else None,
        )
    return tables


def _beside_the_paper(
    path: Path,
    tasks: Sequence[str],
    figures: Sequence[str],
    of_runs: Sequence[tuple[Run, Mapping[str, float | None], Mapping[str, Any]]],
    printed: Mapping[str, Mapping[str, paper.Row]] | None,
) -> str:
    """A table of runs, by the type of their instructions, under the paper's rows if all of them compare with it.

    Args:
        path: of the CSV file.
        tasks, figures: its columns.
        of_runs: of each run its accuracies by task, and its figures by name.
        printed: the paper's table of these columns, if it has one.
    """
    rows: list[Cells] = []
    for setting in dict.fromkeys(run.setting for run, *_ in of_runs):
        if printed is not None and all(_comparable(run) for run, *_ in of_runs):
            for method, row in printed[setting].items():
                rows.append([f"{method}, paper", setting, *row.accuracy, *(getattr(row, name) for name in figures)])
        for run, accuracy, values in of_runs:
            if run.setting == setting:
                rows.append([run.name, setting, *map(accuracy.get, tasks), *(values[name] for name in figures)])
    header = ["run", "instructions", *tasks, *figures]
    write_csv(path, header, rows)
    return markdown(header, rows)


def stage_table(path: Path, runs: Sequence[Run]) -> str:
    """AP, MAP, BWT and MIF after each stage of each run."""
    rows: list[Cells] = [
        [run.name, stage.removeprefix("stage-"), *(run.figures[figure][k] for figure in FIGURES)]
        for run in runs
        for k, stage in enumerate(run.stages)
    ]
    header = ["run", "after stage", *FIGURES]
    write_csv(path, header, rows)
    return markdown(header, rows)


def seeds_table(path: Path, runs: Sequence[Run]) -> str | None:
    """After the last stage, mean and standard deviation over runs that differ in their seed alone; None without such.

    Args:
        path: of the CSV file, which has a line for each mean and deviation (of a sample).
        runs: all of them; a run with no other of its kind is left out.
    """
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        if run.seed is not None:
            kinds.setdefault(run.settings, []).append(run)
    kinds = {kind: alike for kind, alike in kinds.items() if len({run.seed for run in alike}) > 1}
    if not kinds:
        return None
    tasks = list(dict.fromkeys(task for alike in kinds.values() for run in alike for task in run.tasks))
    rows: list[Cells] = []
    data: list[Cells] = []
    for alike in kinds.values():
        title: Cells = [alike[0].recipe, alike[0].method, alike[0].setting, ", ".join(str(run.seed) for run in alike)]
        cells: Cells = []
        for name in [*tasks, *FIGURES]:
            found = [
                run.last[name] if name in FIGURES else run.accuracy(len(run.stages) - 1, name)
                for run in alike
                if name in FIGURES or name in run.tasks
            ]
            if not found or None in found:
                cells.append(None)
                continue
            mean, deviation = statistics.mean(found), statistics.stdev(found)
            cells.append(f"{mean:.2f} ± {deviation:.2f}")
            data.append([*title, name, mean, deviation])
        rows.append([*title, *cells])
    header = ["recipe", "method", "instructions", "seeds"]
    write_csv(path, [*header, "figure", "mean", "standard deviation"], data)
    return markdown([*header, *tasks, *FIGURES], rows)


def _comparable(run: Run) -> bool:
    """Whether the paper's rows may stand beside a run's."""
    return run.benchmark == "CVIT" and run.protocol == "smolora"


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.2f}"
