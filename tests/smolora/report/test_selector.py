"""Which tasks a selector took questions for, by hand."""

from __future__ import annotations

from smolora.report import selector, write_report
from smolora.report.layout import read_runs
from support.reports import MATRIX, TASKS, read_csv

SELECTED = [
    {"ScienceQA": [3, 0, 0, 0, 0]},
    {"ScienceQA": [2, 0, 0, 0, 1], "TextVQA": [0, 3, 0, 0, 0]},
    {"ScienceQA": [2, 0, 0, 1, 0], "TextVQA": [1, 1, 1, 0, 0], "Flickr30k": [0, 0, 3, 0, 0]},
]


def test_confusion_of_the_last_evaluation(make_run, tmp_path):
    folder = make_run("a", MATRIX, task_source="selector", selected=SELECTED)
    (run,) = read_runs([folder])
    assert selector.taken_for(run) == [*TASKS, "few-shot", "none"]
    assert [row.counts for row in selector.confusion(run)] == list(SELECTED[-1].values())
    assert selector.task_source(run) == "task found by its selector, right for 6 of 9 questions (66.7%)"
    out = write_report([folder], tmp_path / "out").parent
    rows = read_csv(out / "selector-smolora.csv")
    assert len(rows) == 6 * 5 and sum(int(row["questions"]) for row in rows) == 18
    text, html = ((out / name).read_text() for name in ("report.md", "report.html"))
    assert "| TextVQA | 1 (33%) | 1 (33%) | 1 (33%) | 0 | 0 |" in text and "right for 6 of 9 questions" in text
    assert '<h2 id="selector">' in html and 'style="--shade:0.67">2 (67%)</td>' in html
    assert "right for 6 of 9 questions (66.7%)" in html


def test_no_few_shot_task(make_run):
    (run,) = read_runs([make_run("a", MATRIX, task_source="selector", selected=[{"ScienceQA": [1, 0, 0, 2]}] * 3)])
    assert selector.taken_for(run) == [*TASKS, "none"]
    assert selector.confusion(run)[0].shares == [1 / 3, 0, 0, 2 / 3]


def test_runs_without_a_selector(make_run, tmp_path):
    given, without = make_run("a", MATRIX, task_source="given"), make_run("b", MATRIX)
    runs = read_runs([given, without])
    assert [selector.task_source(run) for run in runs] == ["task given at test", ""]
    assert [selector.confusion_table(tmp_path / "x.csv", run) for run in runs] == [None, None]
    out = write_report([given, without], tmp_path / "out").parent
    assert not list(out.glob("selector-*")) and 'id="selector"' not in (out / "report.html").read_text()
