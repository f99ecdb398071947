"""The report's figures, each with its data as CSV. Lines differ in marker, dash and grey, not in colour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..evaluate.metrics import FIGURES
from ..io.files import atomic_file
from ..io.markdown import printable
from .csv_files import write_csv
from .layout import RunFolder
from .routing import BRANCHES, expert_counts, layer_shares

STYLES = [
    {"color": shade, "linestyle": line, "marker": marker, "markersize": 5, "linewidth": 1.6}
    for shade, line, marker in zip(
        ("black", "0.35", "0.55", "black", "0.35", "0.55"), ("-", "--", ":", "-.", "-", "--"), "os^Dvx", strict=True
    )
]
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "+++", "---")


def accuracy_over_stages(path: Path, runs: Sequence[RunFolder]) -> None:
    """Plot each task's accuracy from its own stage on (the paper's Fig. 4): one panel per task, one line per run."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    figure, panels = _panels(len(tasks), (3.1, 2.5))
    rows = []
    for axes, task in zip(panels, tasks, strict=True):
        longest = 1
        for style, run in zip(_styles(len(runs)), runs, strict=True):
            if task not in run.tasks:
                continue
            points = [(k, run.accuracy(k, task)) for k in range(len(run.stages))]
            points = [(k + 1, value) for k, value in points if value is not None]
            axes.plot([k for k, _ in points], [value for _, value in points], label=_plain(run.name), **style)
            rows += [(run.name, task, k, value) for k, value in points]
            longest = max(longest, len(run.stages))
        axes.set_title(_plain(task), fontsize=9)
        axes.set_xticks(range(1, longest + 1))
        axes.set_xlim(0.8, longest + 0.2)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.grid(alpha=0.3)
    figure.supxlabel("stage", fontsize=9)
    figure.supylabel("score (%; captions: CIDEr)", fontsize=9)
    _legend(figure, panels)
    _save(figure, path)
    write_csv(path.with_suffix(".csv"), ("run", "task", "stage", "accuracy"), rows)


def matrices(path: Path, runs: Sequence[RunFolder]) -> None:
    """Plot the accuracy matrix of each run as a heat map: one row per stage, one column per task."""
    figure, panels = _panels(len(runs), (4.8, 3.6), columns=2)
    rows = []
    for axes, run in zip(panels, runs, strict=True):
        cells = [[run.accuracy(k, task) for task in run.tasks] for k in range(len(run.stages))]
        values = [[math.nan if cell is None else cell for cell in row] for row in cells]
        # shades are relative to the column's best, because CIDEr has another range than accuracy
        best = [max([row[j] for row in cells if row[j] is not None], default=1) or 1 for j in range(len(run.tasks))]
        shades = [[value / best[j] for j, value in enumerate(row)] for row in values]
        axes.imshow(shades, cmap="Greys", vmin=0, vmax=2.2, aspect="auto")
        for k, row in enumerate(cells):
            for j, cell in enumerate(row):
                if cell is not None:
                    axes.text(j, k, f"{cell:.1f}", ha="center", va="center", fontsize=8)
                    rows.append((run.name, k + 1, run.tasks[j], cell))
        axes.set_xticks(range(len(run.tasks)), map(_plain, run.tasks), rotation=30, ha="right", fontsize=8)
        axes.set_yticks(
            range(len(run.stages)), [_plain(stage.removeprefix("stage-")) for stage in run.stages], fontsize=8
        )
        axes.set_title(_plain(run.name), fontsize=9)
    figure.supxlabel("evaluated on", fontsize=9)
    figure.supylabel("after stage", fontsize=9)
    _save(figure, path)
    write_csv(path.with_suffix(".csv"), ("run", "stage", "task", "accuracy"), rows)


def routing(path: Path, run: RunFolder) -> None:
    """Plot how often each task chose each VU and IF expert, over layers and samples (the paper's Fig. 6)."""
    branches = [
        branch for branch in ("vu", "if") if any(expert_counts(layers, branch) for layers in run.routing.values())
    ]
    figure, panels = _panels(len(branches), (5.2, 0.42 * len(run.routing) + 1.4), columns=2)
    rows = []
    for axes, branch in zip(panels, branches, strict=True):
        most = max(len(expert_counts(layers, branch)) for layers in run.routing.values())
        for place, (task, layers) in enumerate(run.routing.items()):
            counts = expert_counts(layers, branch)
            left, count_all = 0.0, max(sum(counts), 1)
            for expert, count in enumerate(counts):
                share = count / count_all
                axes.barh(
                    place,
                    share,
                    left=left,
                    height=0.7,
                    edgecolor="black",
                    linewidth=0.6,
                    color=str(0.95 - 0.6 * expert / max(most - 1, 1)),
                    hatch=HATCHES[expert % len(HATCHES)],
                    label=f"expert {expert}",
                )
                left += share
                rows.append((run.name, task, branch, expert, count, share))
        axes.set_yticks(range(len(run.routing)), map(_plain, run.routing), fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_title(BRANCHES[branch], fontsize=9)
    figure.supxlabel("share of the choices", fontsize=9)
    _legend(figure, panels)
    _save(figure, path)
    write_csv(path.with_suffix(".csv"), ("run", "task", "branch", "expert", "chosen", "share"), rows)


def shares(path: Path, run: RunFolder) -> tuple[float, float]:
    """Plot alpha and beta at each layer, averaged over the tasks (the paper's Fig. 8).

    Returns:
        Means of alpha and beta over all layers (supplement A of the paper).
    """
    layers, means = layer_shares(run)
    alpha, beta = (sum(pair[i] for pair in means) / len(means) for i in (0, 1))
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for column, (label, mean, style) in enumerate(
        [(r"$\alpha$ (visual understanding)", alpha, STYLES[0]), (r"$\beta$ (instruction following)", beta, STYLES[1])]
    ):
        style = {**style, "markersize": 3, "linewidth": 1.2}
        axes.plot(range(len(layers)), [pair[column] for pair in means], label=f"{label}, mean {mean:.3f}", **style)
        axes.axhline(mean, color=style["color"], linestyle=style["linestyle"], linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("adapted layer, in the model's order", fontsize=9)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share", fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure, path)
    rows = [
        (run.name, task, entry["layer"], entry["alpha"], entry["beta"])
        for task, entries in run.routing.items()
        for entry in entries
    ]
    write_csv(path.with_suffix(".csv"), ("run", "task", "layer", "alpha", "beta"), rows)
    return alpha, beta


def over_experts(path: Path, runs: Sequence[RunFolder]) -> None:
    """Plot AP, MAP, BWT and MIF against the number of experts (the paper's Fig. 5), one line per method."""
    figure, panels = _panels(len(FIGURES), (2.6, 2.4), columns=4)
    rows = []
    methods = list(dict.fromkeys((run.method, run.setting) for run in runs))
    for axes, name in zip(panels, FIGURES, strict=True):
        for style, key in zip(_styles(len(methods)), methods, strict=True):
            points = sorted((r.experts, r.last[name]) for r in runs if (r.method, r.setting) == key)
            points = [point for point in points if point[1] is not None]
            axes.plot(
                [n for n, _ in points], [value for _, value in points], label=_plain(f"{key[0]}, {key[1]}"), **style
            )
            rows += [(*key, n, name, value) for n, value in points]
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({run.experts for run in runs}), sorted({run.experts for run in runs}))
        axes.minorticks_off()
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
    figure.supxlabel("experts, both branches", fontsize=9)
    _legend(figure, panels)
    _save(figure, path)
    write_csv(path.with_suffix(".csv"), ("method", "setting", "experts", "figure", "value"), rows)


def over_values(path: Path, keys: Sequence[str], means: Mapping[tuple[str, ...], Mapping[str, float | None]]) -> None:
    """Plot AP, MAP, BWT and MIF against the values of a sweep's first key, one line per combination of the others.

    Args:
        path: path of the picture.
        keys: names of the swept keys.
        means: the figures by name, for the values of the keys.
    """
    figure, panels = _panels(len(FIGURES), (2.6, 2.4), columns=4)
    places = {value: place for place, value in enumerate(dict.fromkeys(values[0] for values in means))}
    others = list(dict.fromkeys(values[1:] for values in means))
    for axes, name in zip(panels, FIGURES, strict=True):
        for style, other in zip(_styles(len(others)), others, strict=True):
            of_line = {values[0]: of[name] for values, of in means.items() if values[1:] == other}
            points = [(places[value], mean) for value, mean in of_line.items() if mean is not None]
            label = ", ".join(f"{key} {value}" for key, value in zip(keys[1:], other, strict=True))
            axes.plot([x for x, _ in points], [mean for _, mean in points], label=_plain(label), **style)
        axes.set_xticks(range(len(places)), map(_plain, places), rotation=30, ha="right")
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
    figure.supxlabel(_plain(keys[0]), fontsize=9)
    if len(keys) > 1:
        _legend(figure, panels)
    _save(figure, path)


def _plain(text: str) -> str:
    """Escape a name for matplotlib, which reads text between two dollar signs as a formula."""
    return printable(text).replace("$", r"\$")


def _styles(count: int) -> list[dict[str, Any]]:
    return [STYLES[i % len(STYLES)] for i in range(count)]


def _panels(count: int, size: tuple[float, float], columns: int = 3) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    lines = math.ceil(count / columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(size[0] * columns, size[1] * lines), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.tick_params(labelsize=8)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:count])


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Put one legend for all panels above them."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=4, fontsize=8)


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, metadata={"Software": None})
    plt.close(figure)
