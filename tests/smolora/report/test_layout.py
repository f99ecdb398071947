"""Folders of runs: what is read, and what is wrong with them."""

from __future__ import annotations

import json

import pytest

from smolora.report import write_report
from smolora.report.layout import file_name, read_runs
from support.reports import MATRIX, TASKS


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.pop("stages"), "lacks stages"),
        (lambda c: c["stages"].pop(), "stages must name 3 folders, got 2"),
        (lambda c: c["matrix"][1].pop(), r"AP of stage 2 is 65.0, but None by the matrix"),
        (lambda c: c["matrix"][1].append(1.0), "matrix, row 2: must have 2 cells, got 3"),
        (lambda c: c["AP"].__setitem__(1, 1.0), r"AP of stage 2 is 1.0, but 65.0 by the matrix"),
    ],
)
def test_broken_runs_are_named(make_run, change, match):
    folder = make_run("a", MATRIX)
    content = json.loads((folder / "results.json").read_text())
    change(content)
    (folder / "results.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=match):
        write_report([folder])


def test_what_is_read_of_a_run(make_run):
    (run,) = read_runs([make_run("a", MATRIX, experts=6)])
    assert (run.name, run.method, run.experts, run.seed, run.recipe) == ("smolora", "smolora", 6, None, None)
    assert run.last == {"AP": 80.0, "MAP": pytest.approx(225 / 3), "BWT": -25.0, "MIF": 90.0}
    assert [run.accuracy(1, task) for task in TASKS] == [70.0, 60.0, None]
    assert [run.own_stage(task) for task in TASKS] == [0, 1, 2]
    assert run.answers(2, "TextVQA") == {"0": "same", "1": "stage-3-Flickr30k smolora", "2": "same"}
    assert {task: len(layers) for task, layers in run.routing.items()} == dict.fromkeys(TASKS, 3)


def test_one_evaluation_has_one_stage_for_all_tasks(make_run):
    (run,) = read_runs([make_run("a", [[10.0, 20.0, 30.0]], method="zeroshot")])
    assert [run.own_stage(task) for task in TASKS] == [0, 0, 0] and run.experts is None and run.routing == {}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Places365, 5-shot", "Places365, 5-shot"), ("a/../b | c", "a-..-b - c"), ("../x", "-x"), ("*three*", "-three-")],
)
def test_file_names_stay_in_their_folder(name, expected):
    assert file_name(name) == expected
