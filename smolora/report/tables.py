"""The report's tables, in Markdown and as CSV."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..evaluate import paper
from ..evaluate.metrics import FIGURES
from ..io import markdown
from .csv_files import write_csv
from .layout import RunFolder, file_name


class Spread(NamedTuple):
    """A mean over runs and the standard deviation of the sample."""

    mean: float
    deviation: float


Cell = str | float | Spread | None
Cells = list[Cell]


@dataclass(frozen=True)
class Table:
    """A table of the report. Its text is Markdown."""

    header: list[str]
    rows: list[Cells]

    def __str__(self) -> str:
        return markdown.table(self.header, [list(map(cell_text, row)) for row in self.rows])


def cell_text(value: Cell) -> str:
    """The text of a cell: numbers to two decimals, and None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, Spread):
        return f"{value.mean:.2f} ± {value.deviation:.2f}"
    return value if isinstance(value, str) else f"{value:.2f}"


def final_table(path: Path, runs: Sequence[RunFolder]) -> Table:
    """The results after the last stage, laid out as the paper's Table 1, with the paper's rows where comparable."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    rows = [(run, {task: run.accuracy(len(run.stages) - 1, task) for task in run.tasks}, run.last) for run in runs]
    return _beside_the_paper(path, tasks, FIGURES, rows, published(runs) if tuple(tasks) == paper.UPSTREAM else None)


def downstream_tables(folder: Path, runs: Sequence[RunFolder]) -> dict[str, Table]:
    """A table for each downstream evaluation, laid out as the paper's Tables 2 and 3."""
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
            of_paper if tuple(tasks) == columns and published([run for run, _ in parts]) is paper.TABLE_1 else None,
        )
    return tables


def _beside_the_paper(
    path: Path,
    tasks: Sequence[str],
    figures: Sequence[str],
    of_runs: Sequence[tuple[RunFolder, Mapping[str, float | None], Mapping[str, Any]]],
    printed: Mapping[str, Mapping[str, paper.Row]] | None,
) -> Table:
    """A table of runs, grouped by the type of their instructions, below the paper's rows.

    Args:
        path: path of the CSV file.
        tasks, figures: its columns.
        of_runs: each run with its accuracies by task and its figures by name.
        printed: the paper's table with these columns, if all runs are comparable with it.
    """
    rows: list[Cells] = []
    for setting in dict.fromkeys(run.setting for run, *_ in of_runs):
        if printed is not None:
            for method, row in printed[setting].items():
                rows.append([f"{method}, paper", setting, *row.accuracy, *(getattr(row, name) for name in figures)])
        for run, accuracy, values in of_runs:
            if run.setting == setting:
                rows.append([run.name, setting, *map(accuracy.get, tasks), *(values[name] for name in figures)])
    header = ["run", "instructions", *tasks, *figures]
    write_csv(path, header, rows)
    return Table(header, rows)


def stage_table(path: Path, runs: Sequence[RunFolder]) -> Table:
    """AP, MAP, BWT and MIF after each stage of each run."""
    rows: list[Cells] = [
        [run.name, stage.removeprefix("stage-"), *(run.figures[figure][k] for figure in FIGURES)]
        for run in runs
        for k, stage in enumerate(run.stages)
    ]
    header = ["run", "after stage", *FIGURES]
    write_csv(path, header, rows)
    return Table(header, rows)


def seeds_table(path: Path, runs: Sequence[RunFolder]) -> Table | None:
    """Mean and sample standard deviation after the last stage over runs that differ only in their seed.

    Args:
        path: path of the CSV file, with one line per mean and deviation.
        runs: all runs. A run without another seed is left out.

    Returns:
        The table, or None if every run is left out.
    """
    kinds = [alike for alike in over_seeds(runs) if len(alike) > 1]
    if not kinds:
        return None
    tasks = list(dict.fromkeys(task for alike in kinds for run in alike for task in run.tasks))
    rows: list[Cells] = []
    data: list[Cells] = []
    for alike in kinds:
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
            spread = Spread(statistics.mean(found), statistics.stdev(found))
            cells.append(spread)
            data.append([*title, name, *spread])
        rows.append([*title, *cells])
    header = ["recipe", "method", "instructions", "seeds"]
    write_csv(path, [*header, "figure", "mean", "standard deviation"], data)
    return Table([*header, *tasks, *FIGURES], rows)


def over_seeds(runs: Sequence[RunFolder]) -> list[list[RunFolder]]:
    """Group runs that differ only in their seed. Every other run is a group of its own."""
    kinds: dict[Any, list[RunFolder]] = {}
    for run in runs:
        kinds.setdefault(run.folder if run.seed is None else run.settings, []).append(run)
    groups = []
    for alike in kinds.values():
        differ = len({run.seed for run in alike}) > 1
        groups += [alike] if differ else [[run] for run in alike]
    return groups


def published(runs: Sequence[RunFolder]) -> Mapping[str, Mapping[str, paper.Row]] | None:
    """Return the paper's table of the upstream tasks that all runs are comparable with, or None."""
    benchmarks = {run.benchmark if run.protocol == "smolora" else None for run in runs}
    return paper.UPSTREAM_TABLES.get(str(benchmarks.pop())) if len(benchmarks) == 1 else None
