"""The table, the data and the plot of a sweep."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from smolora.report.sweep import write_sweep


@pytest.fixture
def finished(tmp_path):
    """Make the folder of a finished run of two tasks."""

    def make(name: str, last: list[float], first: float = 80.0) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        stages = ["stage-1-A", "stage-2-B"]
        average, mean = [first, sum(last) / 2], [first, (first + sum(last) / 2) / 2]
        content = {"method": "ewc", "benchmark": "X", "setting": "single", "protocol": "smolora", "tasks": ["A", "B"]}
        content |= {"stages": stages, "matrix": [[first], last], "mif": [[100.0], [100.0, 90.0]]}
        content |= {"AP": average, "MAP": mean, "BWT": [None, last[0] - first], "MIF": [100.0, 95.0]}
        (folder / "results.json").write_text(json.dumps(content))
        return folder

    return make


def test_over_seeds_and_two_keys(finished, tmp_path):
    runs = []
    for weight, scores in ((0, [10.0, 20.0]), (10, [30.0, 50.0])):
        for rank in (4, 8):
            for seed in (0, 1):
                last = [scores[0] + rank + 2 * seed, scores[1]]
                values = {"methods.ewc.weight": weight, "baseline.rank": rank, "seed": seed}
                runs.append((values, finished(f"{weight}-{rank}-{seed}", last)))
    out = tmp_path / "out"
    table = write_sweep(out, runs, ["weight=100"])
    lines = str(table).splitlines()
    assert lines[0] == "| weight | rank | A | B | AP | MAP | BWT | MIF |"
    assert lines[2] == (
        "| 0 | 4 | 15.00 ± 1.41 | 20.00 ± 0.00 | 17.50 ± 0.71 | 48.75 ± 0.35 | -65.00 ± 1.41 | 95.00 ± 0.00 |"
    )
    assert len(lines) == 6
    text = (out / "sweep.md").read_text()
    assert str(table) in text and "over the seeds 0, 1." in text and "Not finished: weight=100." in text
    with (out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and rows[1]["weight"] == "0" and rows[1]["seed"] == "1" and float(rows[1]["A"]) == 16.0
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_alone(finished, tmp_path):
    runs = [({"seed": seed}, finished(str(seed), [50.0, 60.0 + seed])) for seed in (0, 1)]
    table = write_sweep(tmp_path / "out", runs)
    assert [line.split(" | ")[:3] for line in str(table).splitlines()[2:]] == [
        ["| 0", "50.00", "60.00"],
        ["| 1", "50.00", "61.00"],
    ]
    assert "±" not in (tmp_path / "out/sweep.md").read_text()
