"""The name of the dataset that a task of one's own is scored as: its metrics and its answer format."""

from __future__ import annotations

from collections.abc import Sequence

METRIC, AND, FORMAT = "metric ", " + ", ", format "


def own_name(metrics: Sequence[str], form: str | None = None) -> str:
    """Return the name of a dataset by its metrics and format, such as "metric exact + rougeL, format words 3"."""
    return METRIC + AND.join(metrics) + ("" if form is None else FORMAT + form)


def own_parts(name: str) -> tuple[list[str], str | None] | None:
    """Return the metrics and the format of a name of `own_name`; None for another dataset's name."""
    if not name.startswith(METRIC):
        return None
    metrics, separator, form = name.removeprefix(METRIC).partition(FORMAT)
    return metrics.split(AND), form if separator else None
