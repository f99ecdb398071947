"""Routing of a run's last evaluation: experts by task and layer, what tasks share, and the fusion weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from .csv_files import write_csv
from .layout import RunFolder

BRANCHES = {"vu": "visual understanding", "if": "instruction following"}


def expert_counts(layers: Sequence[dict[str, Any]], branch: str) -> list[int]:
    """How often each expert of a branch was chosen over all layers, which may differ in their number of experts."""
    used = [layer[branch] for layer in layers if layer[branch] is not None]
    return [sum(column) for column in zip_longest(*used, fillvalue=0)]


def layer_names(run: RunFolder) -> list[str]:
    """The adapted layers in the model's order."""
    return list(dict.fromkeys(entry["layer"] for entries in run.routing.values() for entry in entries))


def expert_shares(run: RunFolder, branch: str) -> dict[str, dict[str, list[float]]]:
    """The share of a branch's choices that each expert got, by task and layer; empty for a branch without choices."""
    shares: dict[str, dict[str, list[float]]] = {}
    for task, entries in run.routing.items():
        for entry in entries:
            counts = entry[branch]
            if counts and sum(counts):
                shares.setdefault(task, {})[entry["layer"]] = [count / sum(counts) for count in counts]
    return shares


def task_overlap(shares: dict[str, dict[str, list[float]]]) -> list[list[float | None]]:
    """How much of their experts two tasks share: 1 for the same choices in every layer, 0 for disjoint experts.

    It is one minus the total variation distance of the two tasks' choices, averaged over the layers that both have.

    Args:
        shares: the output of `expert_shares`.
    """
    return [[_overlap(one, other) for other in shares.values()] for one in shares.values()]


def _overlap(one: dict[str, list[float]], other: dict[str, list[float]]) -> float | None:
    common = [sum(map(min, experts, other[layer])) for layer, experts in one.items() if layer in other]
    return sum(common) / len(common) if common else None


def layer_shares(run: RunFolder) -> tuple[list[str], list[tuple[float, float]]]:
    """The layers in the model's order, and alpha and beta of each, averaged over the tasks (the paper's Fig. 8)."""
    layers = layer_names(run)
    means = []
    for layer in layers:
        of_tasks = [e for entries in run.routing.values() for e in entries if e["layer"] == layer]
        alpha, beta = (sum(e[share] for e in of_tasks) / len(of_tasks) for share in ("alpha", "beta"))
        means.append((alpha, beta))
    return layers, means


def write_layers(path: Path, run: RunFolder) -> None:
    """Write how often each expert was chosen, by task, layer and branch, as CSV."""
    rows = [
        (run.name, task, entry["layer"], branch, expert, count)
        for task, entries in run.routing.items()
        for entry in entries
        for branch in BRANCHES
        for expert, count in enumerate(entry[branch] or ())
    ]
    write_csv(path, ("run", "task", "layer", "branch", "expert", "chosen"), rows)
