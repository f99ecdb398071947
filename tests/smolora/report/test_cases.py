"""Cases: which are shown, their pictures, and what stands in their place."""

from __future__ import annotations

import re
from urllib.parse import unquote

from PIL import Image

from smolora.report import write_report
from support.reports import MATRIX, read_csv


def test_cases(two):
    rows = read_csv(two / "cases.csv")
    first = [row for row in rows if row["task"] == "ScienceQA"]
    assert first[0]["question_id"] == "1"  # where answers differ
    assert {row["run"]: row["answer"] for row in first if row["question_id"] == "1"} == {
        "smolora, after 1-ScienceQA": "stage-1-ScienceQA smolora",
        "smolora, at the end": "stage-3-Flickr30k smolora",
        "seqlora, after 1-ScienceQA": "stage-1-ScienceQA seqlora",
        "seqlora, at the end": "stage-3-Flickr30k seqlora",
    }
    # the last task's own stage is the end
    assert {row["run"] for row in rows if row["task"] == "Flickr30k"} == {"smolora, at the end", "seqlora, at the end"}
    text = (two / "report.md").read_text()
    assert "Briefly \\| please." in text and "yes; no" in text  # a table in spite of what is in the texts
    assert "no image" in text
    pictures = sorted(picture.name for picture in (two / "cases").iterdir())
    assert pictures == [f"{task}-{i}.png" for task in ("Flickr30k", "ScienceQA", "TextVQA") for i in (0, 1)]
    assert Image.open(two / "cases" / pictures[0]).size == (320, 240)
    assert f"(cases/{pictures[0]})" in text


def test_names_of_pictures_can_be_followed(make_run, tmp_path):
    run = make_run("a", [[10.0, 20.0]], method="zeroshot", tasks=["Places365, 5-shot", "VQAv2"])
    text = write_report([run], tmp_path / "out", cases_per_task=1).read_text()
    links = [unquote(link) for link in re.findall(r"\]\((cases/[^) ]+)\)", text)]
    assert len(links) == 2 and all((tmp_path / "out" / link).is_file() for link in links)


def test_a_picture_that_is_broken_since_is_told_in_its_place(make_run, tmp_path):
    run = make_run("a", MATRIX)
    (tmp_path / "data/x.png").write_bytes(b"nothing")
    text = write_report([run], tmp_path / "out", cases_per_task=1).read_text()
    assert "x.png is no image that Pillow knows" in text
