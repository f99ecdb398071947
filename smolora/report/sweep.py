"""The table and the plot of a sweep's runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluate.metrics import FIGURES
from ..io.files import atomic_write_text
from ..io.markdown import escape, picture
from ..train.sweep import short_names, shown
from . import figures
from .csv_files import write_csv
from .layout import RunFolder, read_runs
from .tables import Cell, Cells, Spread, Table

SEED = "seed"


def write_sweep(output: Path, runs: Sequence[tuple[Mapping[str, Any], Path]], unfinished: Sequence[str] = ()) -> Table:
    """Write `sweep.md`, `sweep.csv` and `sweep.png` on the finished runs of a sweep.

    The table has a row for each combination of the swept values, with the mean and the standard deviation over seeds
    where `seed` is swept; the CSV file has a row for each run. The plot has a panel for each figure, with the first
    swept key across and a line for each combination of the others.

    Args:
        output: folder for the files.
        runs: the swept keys with a run's values, and its folder; all have the same keys.
        unfinished: names of runs that are not finished, for a remark.

    Returns:
        The table.

    Raises:
        ValueError: a folder holds no finished run.
    """
    found = [(dict(values), run) for (values, _), run in zip(runs, read_runs([path for _, path in runs]), strict=True)]
    keys = list(found[0][0])
    names = short_names(keys)
    tasks = list(dict.fromkeys(task for _, run in found for task in run.tasks))
    header = [*(names[key] for key in keys), *tasks, *FIGURES]
    write_csv(
        output / "sweep.csv",
        header,
        [[*(shown(values[key]) for key in keys), *_figures(run, tasks)] for values, run in found],
    )
    compared = [key for key in keys if key != SEED] or keys
    groups: dict[tuple[str, ...], list[RunFolder]] = {}
    for values, run in found:
        groups.setdefault(tuple(shown(values[key]) for key in compared), []).append(run)
    rows: list[Cells] = [
        [*of, *(_cell(column) for column in zip(*(_figures(run, tasks) for run in alike), strict=True))]
        for of, alike in groups.items()
    ]
    table = Table([*(names[key] for key in compared), *tasks, *FIGURES], rows)
    means = {of: {name: _mean([run.last[name] for run in alike]) for name in FIGURES} for of, alike in groups.items()}
    figures.over_values(output / "sweep.png", [names[key] for key in compared], means)
    seeds = list(dict.fromkeys(shown(values[SEED]) for values, _ in found if SEED in values))
    parts = [f"# {escape(output.name)}", str(table)]
    if SEED in keys and len(keys) > 1:
        parts.append(f"Mean ± standard deviation of a sample over the seeds {', '.join(map(escape, seeds))}.")
    parts += [f"Not finished: {escape(name)}." for name in unfinished]
    atomic_write_text(output / "sweep.md", "\n\n".join([*parts, picture("Figures by value", "sweep.png")]) + "\n")
    return table


def _figures(run: RunFolder, tasks: Sequence[str]) -> list[float | None]:
    """Accuracies after the last stage by task, and the figures."""
    last = len(run.stages) - 1
    return [
        *(run.accuracy(last, task) if task in run.tasks else None for task in tasks),
        *(run.last[f] for f in FIGURES),
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if a value is missing."""
    given = [value for value in values if value is not None]
    return statistics.mean(given) if len(given) == len(values) else None


def _cell(values: Sequence[float | None]) -> Cell:
    """A figure over seeds."""
    mean, given = _mean(values), [value for value in values if value is not None]
    return mean if mean is None or len(given) == 1 else Spread(mean, statistics.stdev(given))
