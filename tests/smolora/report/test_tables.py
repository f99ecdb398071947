"""The tables, with the paper's rows and over seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smolora.evaluate import paper
from smolora.report import tables, write_report
from smolora.report.layout import read_runs
from support.reports import MATRIX, TASKS, read_csv


def test_runs_side_by_side(two):
    rows = read_csv(two / "final.csv")
    assert [row["run"] for row in rows] == ["smolora", "seqlora"]  # three tasks: no rows of the paper
    assert {row["run"] for row in read_csv(two / "accuracy.csv")} == {"smolora", "seqlora"}
    assert len(list(two.glob("routing-*.png"))) == 1  # seqlora has no routes


def test_the_papers_rows(make_run, tmp_path):
    ours = make_run("a", paper.TABLE_6["single"], tasks=list(paper.UPSTREAM))
    other = make_run("b", paper.TABLE_5["single"], tasks=list(paper.UPSTREAM), method="seqlora")
    tables.final_table(tmp_path / "final.csv", read_runs([ours, other]))
    rows = read_csv(tmp_path / "final.csv")
    published = [f"{method}, paper" for method in paper.TABLE_1["single"]]
    assert [row["run"] for row in rows] == [*published, "smolora", "seqlora"]
    printed = next(row for row in rows if row["run"] == "SMoLoRA, paper")
    assert float(rows[-2]["BWT"]) == pytest.approx(float(printed["BWT"]), abs=0.0101)
    assert float(rows[-2]["Flickr30k"]) == float(printed["Flickr30k"])


def test_the_papers_rows_of_minigpt4(make_run, tmp_path):
    """Table 7 beside runs on MiniGPT-4, and no table beside runs of both."""
    settings = {"tasks": list(paper.UPSTREAM), "benchmark": "CVIT, MiniGPT-4", "setting": "multi"}
    ours = make_run("a", paper.TABLE_6["single"], **settings)
    of_llava = make_run("b", paper.TABLE_6["single"], tasks=list(paper.UPSTREAM))
    tables.final_table(tmp_path / "final.csv", read_runs([ours]))
    rows = read_csv(tmp_path / "final.csv")
    assert [row["run"] for row in rows] == ["Zero-shot, paper", "SeqLoRA, paper", "SMoLoRA, paper", "smolora"]
    assert (rows[2]["AP"], rows[2]["BWT"], rows[0]["MAP"]) == ("56.02", "1.84", "")
    assert "paper" not in str(tables.final_table(tmp_path / "final.csv", read_runs([ours, of_llava])))


@pytest.mark.parametrize("change", [{"benchmark": "MiniCVIT"}, {"protocol": "standard"}])
def test_the_papers_rows_stand_beside_comparable_runs_alone(make_run, tmp_path, change):
    folder = make_run("a", paper.TABLE_6["single"], tasks=list(paper.UPSTREAM), **change)
    assert "paper" not in str(tables.final_table(tmp_path / "final.csv", read_runs([folder])))


def test_downstream(make_run, tmp_path):
    accuracy = {"folder": "downstream-zero-shot", "tasks": list(paper.ZERO_SHOT), "accuracy": [30.0, 20.0, 40.0]}
    folder = make_run("a", MATRIX, downstream={"zero-shot": {**accuracy, "mif": [90.0] * 3, "AP": 30.0, "MIF": 90.0}})
    tables.downstream_tables(tmp_path, read_runs([folder]))
    rows = read_csv(tmp_path / "downstream-zero-shot.csv")
    assert [row["run"] for row in rows] == [f"{method}, paper" for method in paper.TABLE_2["single"]] + ["smolora"]
    assert rows[-1]["AP"] == "30.0"


def test_means_over_seeds(make_run, tmp_path):
    """Runs that differ in the seed alone, by hand: 50, 40, 150 and 60, 40, 170 after the last stage."""

    def run(name: str, seed: int, last: list[float], **adapter) -> Path:
        config = {"seed": seed, "output": name, "adapter": {"r": 8, **adapter}}
        folder = make_run(name, [[80.0], [70.0, 60.0], last], config=config)
        results = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps({**results, "name": "small"}))
        return folder

    runs = [run("a", 0, [50.0, 40.0, 150.0]), run("b", 1, [60.0, 40.0, 170.0]), run("c", 2, [0.0, 0.0, 0.0], r=9)]
    text = write_report(runs, tmp_path / "out").read_text()
    assert "| small | smolora | single | 0, 1 | 55.00 ± 7.07 | 40.00 ± 0.00 | 160.00 ± 14.14 | 85.00 ± 7.07 |" in text
    rows = {row["figure"]: row for row in read_csv(tmp_path / "out/seeds.csv")}
    assert float(rows["AP"]["mean"]) == 85 and float(rows["AP"]["standard deviation"]) == pytest.approx(50**0.5)
    assert rows.keys() == {*TASKS, "AP", "MAP", "BWT", "MIF"}
    assert "recipe small, seed 1" in text and "captions weigh most" in text
    text = write_report([runs[0], runs[2]], tmp_path / "alone").read_text()
    assert "Over seeds" not in text and not (tmp_path / "alone/seeds.csv").exists()
