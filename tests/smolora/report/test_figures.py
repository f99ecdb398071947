"""The figures, by the CSV files beside them and by their pixels."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from smolora.report import figures, write_report
from smolora.report.layout import read_runs
from support.reports import MATRIX, TASKS, read_csv

ROWS = {"accuracy": 6, "matrices": 6, "routing-smolora": 24, "shares-smolora": 9}  # of a run of three tasks


@pytest.mark.parametrize(
    ("report", "rows"),
    [
        ("one", ROWS),
        ("two", {**ROWS, "accuracy": 12, "matrices": 12}),  # seqlora has no routes
        (
            "several",
            {
                "accuracy": 12,
                "matrices": 12,
                "experts": 8,
                **{f"{name}-smolora-e{n}": ROWS[f"{name}-smolora"] for name in ("routing", "shares") for n in (2, 4)},
            },
        ),
    ],
)
def test_every_figure_has_its_data_beside_it(request, report, rows):
    folder = request.getfixturevalue(report)
    assert {picture.stem for picture in folder.glob("*.png")} == rows.keys()
    assert {name: len(read_csv(folder / f"{name}.csv")) for name in rows} == rows
    shown = re.findall(r"\]\(([^/)]+)\.png\)", (folder / "report.md").read_text())
    assert sorted(shown) == sorted(rows)


def test_csv_holds_what_the_figures_show(one):
    found = {(row["task"], int(row["stage"])): float(row["accuracy"]) for row in read_csv(one / "accuracy.csv")}
    assert found == {(TASKS[j], k + 1): value for k, row in enumerate(MATRIX) for j, value in enumerate(row)}
    assert len(read_csv(one / "matrices.csv")) == 6
    shares = read_csv(one / "routing-smolora.csv")
    assert len(shares) == 3 * 2 * 4  # tasks, branches, experts
    for task in TASKS:
        for branch in ("vu", "if"):
            of_task = [float(row["share"]) for row in shares if (row["task"], row["branch"]) == (task, branch)]
            assert sum(of_task) == pytest.approx(1)


def test_mean_ratio_is_that_of_the_data(one):
    alphas = [float(row["alpha"]) for row in read_csv(one / "shares-smolora.csv")]
    alpha = np.mean(alphas)
    expected = f"alpha {alpha:.3f}, beta {1 - alpha:.3f}, ratio {alpha / (1 - alpha):.3f}"
    assert len(alphas) == 9 and expected in (one / "report.md").read_text()


def test_figures_do_not_depend_on_colour(two):
    for picture in two.glob("*.png"):
        pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
        assert np.ptp(pixels, axis=2).max() <= 2, picture  # every pixel is grey
        assert pixels.min() < 50  # and something is drawn


def test_figures_against_the_number_of_experts(make_run, tmp_path):
    folders = [make_run(f"e{n}", [[80.0], [70.0 + n, 60.0], [50.0, 40.0 + n, 150.0]], experts=n) for n in (2, 4, 8)]
    runs = read_runs(folders)
    figures.over_experts(tmp_path / "experts.png", runs)
    rows = [row for row in read_csv(tmp_path / "experts.csv") if row["figure"] == "AP"]
    assert [int(row["experts"]) for row in rows] == [2, 4, 8]
    assert float(rows[0]["value"]) == pytest.approx((50 + 42 + 150) / 3)
    assert [run.name for run in runs] == ["smolora (e2)", "smolora (e4)", "smolora (e8)"]


def test_runs_of_different_sizes_are_drawn_against_each_other(several):
    assert "(experts.png)" in (several / "report.md").read_text()
    rows = [row for row in read_csv(several / "experts.csv") if row["figure"] == "MIF"]
    assert [(row["experts"], row["value"]) for row in rows] == [("2", "90.0"), ("4", "90.0")]
    assert {path.name for path in several.glob("routing-*.png")} == {"routing-smolora-e2.png", "routing-smolora-e4.png"}


def test_layers_and_tasks_with_other_numbers_of_experts(make_run, tmp_path):
    """Several adapters of different sizes, by task and by layer."""
    run = make_run("a", MATRIX)
    stage = json.loads((run / "results.json").read_text())["stages"][-1]
    sizes = {"ScienceQA": [(2, 1), (2, 1)], "TextVQA": [(3, 5), (1, 4)], "Flickr30k": [(4, 2)]}
    for task, layers in sizes.items():
        routing = [
            {
                "layer": f"l{i}",
                "samples": 6,
                "vu": [6] + [0] * (m - 1),
                "if": [0] * (n - 1) + [6],
                "alpha": 0.5,
                "beta": 0.5,
            }
            for i, (m, n) in enumerate(layers)
        ]
        (run / stage / "answers" / f"{task}.info.json").write_text(json.dumps({"routing": routing}))
    write_report([run], tmp_path / "out")
    rows = read_csv(tmp_path / "out/routing-smolora.csv")
    for task, layers in sizes.items():
        for place, branch in enumerate(("vu", "if")):
            found = [int(row["chosen"]) for row in rows if (row["task"], row["branch"]) == (task, branch)]
            assert len(found) == max(layer[place] for layer in layers) and sum(found) == 6 * len(layers)
