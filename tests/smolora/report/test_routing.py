"""What tasks share of their experts."""

from __future__ import annotations

import itertools
import json

import pytest

from smolora.report import charts, routing, write_report
from smolora.report.layout import read_runs
from support.reports import MATRIX, read_csv


def test_overlap_by_hand():
    shares = {
        "a": {"l0": [1.0, 0.0], "l1": [0.5, 0.5]},
        "b": {"l0": [0.0, 1.0], "l1": [0.25, 0.75]},
        "c": {"projector": [1.0, 0.0]},  # no layer that another task has
    }
    assert routing.task_overlap(shares) == [[1.0, 0.375, None], [0.375, 1.0, None], [None, None, 1.0]]


def test_every_layer_is_in_the_data(one, make_run, tmp_path):
    rows = read_csv(one / "layers-smolora.csv")
    assert len(rows) == 3 * 3 * 2 * 4  # tasks, layers, branches, experts
    (run,) = read_runs([make_run("a", MATRIX)])
    chosen = {(row["task"], row["layer"], row["branch"]): 0 for row in rows}
    assert len(chosen) == 18
    shares = routing.expert_shares(run, "vu")
    for task, entries in run.routing.items():
        for entry in entries:
            assert shares[task][entry["layer"]] == [count / sum(entry["vu"]) for count in entry["vu"]]


def test_a_branch_that_is_not_used_has_no_map(make_run, tmp_path):
    run = make_run("a", MATRIX)
    for path in run.rglob("*.info.json"):
        layers = json.loads(path.read_text())["routing"]
        path.write_text(json.dumps({"routing": [layer | {"if": None} for layer in layers]}))
    html = (write_report([run], tmp_path / "out").parent / "report.html").read_text()
    assert "<h4>Visual understanding</h4>" in html and "<h4>Instruction following</h4>" not in html


def test_cells_of_the_map():
    """Neighbours of one shade are one rectangle, and an expert that was never chosen has none."""
    layers = ["l0", "l1", "l2"]
    drawn = charts.routing_map({"a": {"l0": [1.0, 0.0], "l1": [1.0, 0.0], "l2": [0.5, 0.5]}}, layers)
    wide = drawn.columns[0][1]
    assert [opacity for opacity, _ in drawn.paths] == [0.5, 1.0]
    assert drawn.paths[0][1].count("M") == 2
    assert drawn.paths[1][1] == f"M{drawn.left:g} 4h{2 * wide:g}v8h{-2 * wide:g}z"
    assert [name for *_, name in drawn.columns] == layers


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (0, 1), (-82.5, 0), (3, 250), (0, 0.003), (5, 5), (-4, -4), (0, 1e6)]
)
def test_ticks_are_round_and_hold_the_data(low, high):
    ticks = charts.round_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8
    assert len({round(b - a, 9) for a, b in itertools.pairwise(ticks)}) == 1


def test_long_lines_are_thinned():
    panel = charts.line_panel("t", [charts.Line("r", None, [(i, 2.0) for i in range(5001)])], "x", "y", markers=False)
    assert panel.lines[0].path.count("L") < charts.MOST_POINTS and len(panel.lines[0].points) == 1
