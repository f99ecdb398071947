"""Boxes on pictures: in their places on the padded square, told apart, and named where an answer has none."""

from __future__ import annotations

import json
from decimal import Decimal

import numpy as np
import pytest
from PIL import Image

from smolora.report import write_report
from smolora.report.boxes import BLACK, LINE, MARGIN, draw_boxes
from smolora.report.palette import LIGHT

SIDE = 320
TRUTH = tuple(map(Decimal, ("0.25", "0.375", "0.5", "0.75")))


def box_of(picture: np.ndarray, colour: tuple[int, ...]) -> tuple[int, ...]:
    """The outermost pixels of a colour: left, top, right, bottom."""
    ys, xs = np.nonzero((picture == colour).all(-1))
    return xs.min(), ys.min(), xs.max(), ys.max()


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


@pytest.mark.parametrize("size", [(640, 320), (48, 24), (320, 320), (24, 48)])
def test_boxes_are_where_they_say(size):
    """As CoIN means them: relative to the longer side, on the picture centred in a square."""
    sheet = draw_boxes(Image.new("RGB", size, "white"), TRUTH, {"one": "[0.5, 0.5, 0.75, 0.625]"}, SIDE)
    width, height = (round(length * SIDE / max(size)) for length in size)
    assert sheet.size == (SIDE, height + 2 * MARGIN + 2 * LINE)
    picture = np.asarray(sheet)[:height]
    across, down = (SIDE - width) // 2, (SIDE - height) // 2
    for box, colour in (((80, 120, 160, 240), BLACK), ((160, 160, 240, 200), rgb(LIGHT[0]))):
        left, top, right, bottom = box
        inside = left - across, top - down, right - across, bottom - down
        limits = width - 1, height - 1, width - 1, height - 1
        wanted = [min(max(at, 0), limit) for at, limit in zip(inside, limits, strict=True)]
        assert np.abs(np.subtract(box_of(picture, colour), wanted)).max() <= 1


def test_an_answer_without_a_box_is_only_named():
    """And one with its corners in the wrong order is drawn all the same."""
    plain = Image.new("RGB", (320, 320), "white")
    answers = {"one": "on the left", "two": "[0.9, 0.9, 0.6, 0.6]"}
    picture = np.asarray(draw_boxes(plain, TRUTH, answers, SIDE))
    assert not (picture[:320] == rgb(LIGHT[0])).all(-1).any()
    assert np.abs(np.subtract(box_of(picture[:320], rgb(LIGHT[1])), (192, 192, 288, 288))).max() <= 1
    legend = picture[320:]
    assert len({legend[y : y + LINE].tobytes() for y in range(MARGIN, len(legend) - MARGIN, LINE)}) == 3


def test_a_reports_cases_have_them(make_run, tmp_path):
    run = make_run("a", [[10.0, 20.0]], method="zeroshot", tasks=["Grounding", "VQAv2"])
    path = tmp_path / "data/Grounding.json"
    records = json.loads(path.read_text())
    for record in records:
        record["answer_bbox"] = "[0.25, 0.375, 0.50, 0.75]"
    path.write_text(json.dumps(records))
    answers = run / "stage-0-zeroshot/answers/Grounding.jsonl"
    lines = [{"question_id": n, "text": "[0.50, 0.50, 0.75, 0.625]"} for n in range(3)]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report([run], tmp_path / "out", cases_per_task=1)
    drawn = np.asarray(Image.open(tmp_path / "out/cases/Grounding-0.png"))
    assert (drawn == rgb(LIGHT[0])).all(-1).any() and (drawn == BLACK).all(-1).any()
    other = np.asarray(Image.open(tmp_path / "out/cases/VQAv2-0.png"))
    assert len(np.unique(other.reshape(-1, 3), axis=0)) == 1  # the picture alone
    assert "cases/Grounding-0.png" in page.read_text()
    records[1]["answer_bbox"] = "[0.25, 0.375, 0.50]"
    path.write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"Grounding.json: record 1: answer_bbox must be a text of four numbers"):
        write_report([run], tmp_path / "out", cases_per_task=1)
