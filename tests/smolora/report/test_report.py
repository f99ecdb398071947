"""The report: what is in it, where its data comes from, and that a broken run is named."""

from __future__ import annotations

import json
import re

import pytest

from smolora import cli
from smolora.report import write_report
from support.reports import MATRIX, TASKS, read_csv


def test_one_run(one):
    text = (one / "report.md").read_text()
    assert "| smolora | single | 50.00 | 40.00 | 150.00 | 80.00 |" in text  # accuracies and AP
    assert "-25.00" in text  # BWT: ((50 - 80) + (40 - 60)) / 2
    assert "torch 2.13.0" in text
    pictures = {"accuracy.png", "matrices.png", "routing-smolora.png", "shares-smolora.png"}
    assert {picture.name for picture in one.glob("*.png")} == pictures
    for picture in pictures:
        assert f"({picture})" in text and (one / picture).with_suffix(".csv").is_file()


def test_a_single_row(make_run):
    text = write_report([make_run("a", [[10.0, 20.0, 30.0]], method="zeroshot")]).read_text()
    assert "| zeroshot | single | 10.00 | 20.00 | 30.00 | 20.00 | - | - | 90.00 |" in text


def test_command(make_run, capsys, tmp_path):
    folder = make_run("a", [[10.0, 20.0, 30.0]], method="zeroshot")
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "out")]) == 0
    *table, path = capsys.readouterr().out.splitlines()
    assert path == str(tmp_path / "out" / "report.md")
    assert table[0] == "After the last stage" and any("20.00" in line for line in table)
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "is no finished run: it has no results.json" in capsys.readouterr().err
    assert cli.main(["report", str(folder), "--cases", "-1"]) == 1


def test_command_shows_so_many_cases(make_run, tmp_path):
    runs = [str(make_run(name, MATRIX, method=name)) for name in ("seqlora", "smolora")]
    assert cli.main(["report", *runs, "--cases", "2", "--output", str(tmp_path / "out")]) == 0
    rows = read_csv(tmp_path / "out" / "cases.csv")
    for task in TASKS:
        assert len({row["question_id"] for row in rows if row["task"] == task}) == 2
    assert "## Cases" in (tmp_path / "out" / "report.md").read_text()
    assert cli.main(["report", *runs, "--output", str(tmp_path / "without")]) == 0
    assert "## Cases" not in (tmp_path / "without" / "report.md").read_text()


NASTY = "a | b \\| c\r\n<img src=x> *d* _e_ `f` $g$ [h](i) \x1b[31m"


def test_whatever_people_wrote_shows_as_it_is(make_run, tmp_path):
    """Questions, answers, truths, names of folders, tasks and tables: none of it is markup, a formula or a column."""
    tasks = ["one", "t | w $x_1$ o", "*three*"]
    run = make_run("a $1_2$ | *b*", MATRIX, tasks=tasks)
    other = make_run("a 1 2 b", MATRIX, tasks=tasks)
    for folder in (run, other):
        results = json.loads((folder / "results.json").read_text())
        for stage in results["stages"]:
            for path in (folder / stage / "answers").glob("*.jsonl"):
                lines = [{"question_id": i, "text": NASTY} for i in range(3)]
                path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        table = {"folder": "d", "tasks": ["x | y"], "accuracy": [1.0], "mif": [1.0], "AP": 1.0, "MIF": 1.0}
        (folder / "results.json").write_text(json.dumps({**results, "downstream": {"a/../b | c": table}}))
    questions = tmp_path / "data/one.json"
    records = json.loads(questions.read_text())
    for record in records:
        record.update(text=NASTY, answer=[NASTY, "no"])
    questions.write_text(json.dumps(records))
    page = write_report([run, other], tmp_path / "out", cases_per_task=3).read_bytes().decode()
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table")
    html = parser.render(page)
    assert "<img src=x>" not in html and "<em>" not in html and "\x1b" not in html and "<a href" not in html
    rows = [row for row in re.findall("<tr>(.*?)</tr>", html, re.S) if "src=x" in row]
    assert rows and {len(re.findall("<td", row)) for row in rows} <= {5, 7}
    assert len(list((tmp_path / "out").glob("routing-*.png"))) == 2, "names that are alike keep files of their own"
    assert (tmp_path / "out/downstream-a-..-b - c.csv").is_file()
    for row in read_csv(tmp_path / "out/cases.csv"):
        assert len(row) == 6 and None not in row and "\r" not in "".join(row.values())
