"""Geometry of the page's figures, in the units of each figure's view box. The templates draw them as SVG."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from .palette import Style

MOST_POINTS = 200  # of a line; a longer one is drawn by means of neighbours
LEVELS = 8  # shades of a routing map


class Tick(NamedTuple):
    """A place on an axis with its label."""

    at: float
    label: str


class Point(NamedTuple):
    """A drawn point with the text of its tooltip."""

    x: float
    y: float
    label: str


class Line(NamedTuple):
    """A line to draw: its name, its style and its data."""

    name: str
    style: Style
    points: Sequence[tuple[float, float]]


class DrawnLine(NamedTuple):
    """A line in the figure's units."""

    name: str
    style: Style
    path: str
    points: list[Point]  # those that get a marker


class Panel(NamedTuple):
    """A plot of lines."""

    title: str
    width: int
    height: int
    box: tuple[float, float, float, float]  # left, top, right and bottom of the plot
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[DrawnLine]


def line_panel(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    size: tuple[int, int] = (320, 230),
    x_ticks: Sequence[tuple[float, str]] | None = None,
    y_top: float | None = None,
    markers: bool = True,
) -> Panel:
    """Lay out a plot of lines from zero up.

    Args:
        title: heading of the plot.
        lines: the lines; an empty one is left out.
        x_label, y_label: titles of the axes.
        size: width and height.
        x_ticks: places and labels on the x axis; None for round numbers.
        y_top: end of the y axis; None for a round number above the data.
        markers: draw a marker at every point, not only at the last one.
    """
    lines = [line._replace(points=_thinned(line.points)) for line in lines if line.points]
    xs = [x for line in lines for x, _ in line.points] or [0.0]
    ys = [y for line in lines for _, y in line.points] or [0.0]
    left, top, right, bottom = 46.0, 26.0, size[0] - 12.0, size[1] - 38.0
    steps = round_ticks(min(0.0, *ys), max(ys) if y_top is None else y_top)
    low, high = steps[0], steps[-1]
    marks = [(x, f"{x:g}") for x in round_ticks(min(xs), max(xs)) if min(xs) <= x <= max(xs)]
    marks = list(x_ticks) if x_ticks is not None else marks
    first, last = min([*xs, *(x for x, _ in marks)]), max([*xs, *(x for x, _ in marks)])

    def place(x: float, y: float) -> tuple[float, float]:
        across = 0.5 if last == first else (x - first) / (last - first)
        return round(left + 8 + across * (right - left - 16), 1), round(
            bottom - (y - low) / (high - low) * (bottom - top), 1
        )

    drawn = []
    for line in lines:
        places = [place(x, y) for x, y in line.points]
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
        points = [Point(*at, f"{line.name}: {y:.4g}") for at, (_, y) in zip(places, line.points, strict=True)]
        drawn.append(DrawnLine(line.name, line.style, path, points if markers else points[-1:]))
    return Panel(
        title,
        *size,
        (left, top, right, bottom),
        x_label,
        y_label,
        [Tick(place(x, low)[0], label) for x, label in marks],
        [Tick(place(first, y)[1], f"{y:g}") for y in steps],
        drawn,
    )


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbours until at most `MOST_POINTS` are left."""
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else [[p] for p in points]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers, the first at or below `low` and the last at or above `high`."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10, 20) if power * factor * count >= span)
    start, stop = math.floor(low / step + 1e-9), math.ceil(max(high, low + span / count) / step - 1e-9)
    return [round(step * i, 10) for i in range(start, stop + 1)]


class Dots(NamedTuple):
    """A method's row in a plot of a figure over seeds."""

    label: str
    style: Style
    values: list[float]  # one per run
    mean: float
    deviation: float | None  # None for a single run
    paper: float | None


class DotRow(NamedTuple):
    """A row in the figure's units."""

    dots: Dots
    y: float
    values: list[float]
    mean: float
    span: tuple[float, float] | None
    paper: float | None


class DotPlot(NamedTuple):
    """A plot of one figure with a row per method."""

    title: str
    width: int
    height: int
    box: tuple[float, float, float, float]
    ticks: list[Tick]
    rows: list[DotRow]


def dot_plot(title: str, rows: Sequence[Dots], width: int = 440) -> DotPlot:
    """Lay out a figure with a row per method: its runs, their mean and deviation, and the paper's value."""
    values = [v for row in rows for v in (*row.values, row.paper, row.mean) if v is not None]
    values += [row.mean + sign * row.deviation for row in rows if row.deviation is not None for sign in (1, -1)]
    steps = round_ticks(min(0.0, *values), max(0.0, *values))
    left, top, right, bottom = 150.0, 26.0, width - 14.0, 34.0 + 26 * len(rows)

    def place(value: float) -> float:
        return round(left + (value - steps[0]) / (steps[-1] - steps[0]) * (right - left), 1)

    placed = []
    for number, row in enumerate(rows):
        span = None
        if row.deviation is not None:
            span = (place(row.mean - row.deviation), place(row.mean + row.deviation))
        paper = None if row.paper is None else place(row.paper)
        y = top + 18 + 26 * number
        placed.append(DotRow(row, y, [place(v) for v in row.values], place(row.mean), span, paper))
    ticks = [Tick(place(value), f"{value:g}") for value in steps]
    return DotPlot(title, width, int(bottom) + 24, (left, top, right, bottom), ticks, placed)


class MapRow(NamedTuple):
    """A task's rows in a routing map."""

    task: str
    y: float
    height: float
    experts: int


class RoutingMap(NamedTuple):
    """The choices of a branch by task, layer and expert: a path of cells for each shade."""

    width: float
    height: float
    left: float
    rows: list[MapRow]
    paths: list[tuple[float, str]]  # opacity, and the path of the cells
    columns: list[tuple[float, float, str]]  # x, width and name of each layer


def routing_map(shares: dict[str, dict[str, list[float]]], layers: Sequence[str]) -> RoutingMap:
    """Lay out a branch's choices: a block of rows per task with a row per expert, and a column per layer.

    Cells of one shade are one path, and neighbours one rectangle, so that hundreds of layers stay light.

    Args:
        shares: for each task and layer the share of each expert.
        layers: the layers in the model's order.
    """
    left, high = 130.0, 9.0
    wide = max(3.0, min(26.0, round(900 / max(len(layers), 1), 1)))
    cells: dict[int, list[str]] = defaultdict(list)
    rows, y = [], 4.0
    for task, of_layer in shares.items():
        experts = max(map(len, of_layer.values()))
        for expert in range(experts):
            levels = [_level(of_layer.get(layer, ()), expert) for layer in layers]
            start = 0
            for column in range(1, len(levels) + 1):
                if column == len(levels) or levels[column] != levels[start]:
                    if levels[start]:
                        x, width = left + start * wide, (column - start) * wide
                        at = y + expert * high
                        cells[levels[start]].append(f"M{x:g} {at:g}h{width:g}v{high - 1:g}h{-width:g}z")
                    start = column
        rows.append(MapRow(task, y, experts * high, experts))
        y += experts * high + 8
    columns = [(round(left + i * wide, 1), wide, name) for i, name in enumerate(layers)]
    paths = [(round(level / LEVELS, 3), "".join(cells[level])) for level in sorted(cells)]
    return RoutingMap(left + wide * len(layers) + 8, y + 4, left, rows, paths, columns)


def _level(experts: Sequence[float], expert: int) -> int:
    return math.ceil(round(LEVELS * experts[expert], 6)) if expert < len(experts) else 0
