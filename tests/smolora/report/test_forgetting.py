"""Forgetting of the form and of the content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smolora.evaluate.rules import Item
from smolora.evaluate.score import judge
from smolora.report import write_report
from smolora.report.forgetting import Fate, Judge, forgetting_table, holds_content
from smolora.report.layout import read_runs
from support.reports import read_csv
from support.scoring import GOLDEN, golden, vqa_files

CHOICES = "What is it?\nA. a cat\nB. a dog\nAnswer with the option's letter."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is a dog in a garden", True),
        ("The answer is B.", True),
        ("(b) a cat", False),
        ("A dogma", False),
        ("B team", False),  # not the letter by itself
        ("", False),
    ],
)
def test_multiple_choice(text, expected):
    assert holds_content(Item("0", "B", ("B",), 2), text, CHOICES, caption=False) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("There is a red bus here", True), ("There is a red-hot bus", False), ("Red BUS!", True), ("bus red", False)],
)
def test_words(text, expected):
    assert holds_content(Item("0", "red bus", ("red bus", "tram")), text, "", caption=False) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("dog on the beach", True), ("cat", False), ("the", False), ("a man, a dog", True)]
)
def test_captions(text, expected):
    references = ("A man walks a dog.", "Beach with a dog.")
    assert holds_content(Item("0", references, references), text, "", caption=True) == expected


def run_of_two(make_run, tmp_path: Path, before: list[str], after: list[str], answers: list[str]) -> Path:
    """A run whose first task is VQAv2, with its answers after the own stage and at the end."""
    run = make_run("a", [[80.0], [20.0, 60.0]], tasks=["first", "second"])
    results = json.loads((run / "results.json").read_text())
    for stage, texts in zip(results["stages"], (before, after), strict=True):
        vqa_files(tmp_path / "vqa", answers, texts).replace(run / stage / "answers" / "first.jsonl")
    results["tests"]["first"] = {
        "questions": "../vqa/val.json",
        "images": "../data",
        "dataset": "VQAv2",
        "annotations": ["../vqa"],
    }
    (run / "results.json").write_text(json.dumps(results))
    return run


ANSWERS = ["red", "blue", "green", "black", "white", "grey"]
AFTER = ["red", "it is the colour blue", "yellow", "there is a man here", "white", "grey"]


def test_questions_fall_into_four_cells(make_run, tmp_path):
    run = run_of_two(make_run, tmp_path, [*ANSWERS[:5], "never known"], AFTER, ANSWERS)
    (read,) = read_runs([run])
    # red and white are kept; grey was not learned, whatever comes of it later
    assert Judge(read).fate("first") == Fate(5, 2, 1, 1, 1)
    assert Judge(read).fate("second") is None
    out = write_report([run], tmp_path / "out").parent
    (row,) = read_csv(out / "forgetting.csv")
    assert list(row.values()) == ["smolora", "first", "5", "2", "1", "1", "1"]
    assert "| smolora | first | 5 | 2 | 1 | 1 | 1 |" in (out / "report.md").read_text()
    html = (out / "report.html").read_text()
    assert "40.0% " in html and "20.0% " in html and 'class="wrong-form"' in html


def test_cases_are_marked(make_run, tmp_path):
    run = run_of_two(make_run, tmp_path, ANSWERS, AFTER, ANSWERS)
    html = (write_report([run], tmp_path / "out", cases_per_task=6).parent / "report.html").read_text()
    assert '<span class="note bad">wrong form</span>' in html and '<span class="note good">right</span>' in html


@pytest.mark.parametrize("lost", ["file", "folder", "entry"])
def test_without_files_for_scoring_the_page_says_so(make_run, tmp_path, lost):
    run = run_of_two(make_run, tmp_path, ANSWERS, AFTER, ANSWERS)
    if lost == "file":
        (tmp_path / "vqa/val.json").unlink()
    else:
        results = json.loads((run / "results.json").read_text())
        if lost == "folder":
            results["tests"]["first"]["annotations"] = ["../nowhere"]
        else:
            del results["tests"]["first"]["annotations"]
        (run / "results.json").write_text(json.dumps(results))
    out = write_report([run], tmp_path / "out").parent
    assert "No task can be judged" in (out / "report.html").read_text() and not (out / "forgetting.csv").exists()
    assert forgetting_table(tmp_path / "x.csv", [Judge(each) for each in read_runs([run])]) is None


@pytest.mark.parametrize("dataset", ["ScienceQA", "Flickr30k", "GQA"])
def test_judged_answers_average_to_the_score(dataset):
    judged = judge(dataset, [GOLDEN / dataset], GOLDEN / dataset / "answers.jsonl").values()
    counted = [each.score for each in judged if each.score is not None]
    whole = golden(dataset)
    assert 100 * sum(counted) / len(counted) == pytest.approx(whole.score) and len(counted) == whole.count
    assert 100 * sum(each.follows_format for each in judged) / len(judged) == pytest.approx(whole.mif)
