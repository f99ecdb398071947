"""How a task selector took the questions: for each task, which tasks it took them for."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .csv_files import write_csv
from .layout import RunFolder
from .tables import Table

SOURCES = {"given": "task given at test", "selector": "task found by its selector"}
FEW_SHOT = "few-shot"  # the task of downstream training, which comes after the upstream ones
NONE = "none"  # questions that are like those of no task


class ConfusionRow(NamedTuple):
    """The questions of a task by the task that they were taken for."""

    task: str
    counts: list[int]
    shares: list[float]  # from 0 to 1

    def cells(self) -> list[str]:
        """The counts, each with its share."""
        return [
            f"{count} ({share:.0%})" if count else "0" for count, share in zip(self.counts, self.shares, strict=True)
        ]


def taken_for(run: RunFolder) -> list[str]:
    """The names of what a run's selector may take a question for, as the counts have them."""
    size = max((len(counts) for stage in run.selected or () for counts in stage.values()), default=0)
    return [*run.tasks, *([FEW_SHOT] if size > len(run.tasks) + 1 else []), NONE]


def confusion(run: RunFolder) -> list[ConfusionRow]:
    """The rows of a run's last evaluation; empty where no selector chose."""
    last = run.selected[-1] if run.selected else {}
    return [
        ConfusionRow(task, counts, [count / sum(counts) for count in counts])
        for task, counts in last.items()
        if sum(counts)
    ]


def confusion_table(path: Path, run: RunFolder) -> Table | None:
    """A run's confusion at the end, and that of every stage as CSV; None where no selector chose."""
    rows = confusion(run)
    if not rows:
        return None
    names = taken_for(run)
    data = [
        (run.name, stage, task, name, count)
        for stage, of_stage in zip(run.stages, run.selected or (), strict=True)
        for task, counts in of_stage.items()
        for name, count in zip(names, counts, strict=True)
    ]
    write_csv(path, ("run", "stage", "task", "taken for", "questions"), data)
    return Table(["asked \\ taken for", *names], [[row.task, *row.cells()] for row in rows])


def task_source(run: RunFolder) -> str:
    """Who says at test which task a question is of, and how often a selector was right in the last evaluation.

    It is empty for a run that needs no task.
    """
    if run.task_source is None:
        return ""
    text = SOURCES[run.task_source]
    rows = confusion(run)
    asked = sum(sum(row.counts) for row in rows)
    if asked:
        right = sum(row.counts[run.tasks.index(row.task)] for row in rows)
        text += f", right for {right} of {asked} questions ({right / asked:.1%})"
    return text
