"""Boxes: what counts as one, CoIN's cut characters, and annotations that hold no box."""

from __future__ import annotations

import json

import pytest

from smolora.evaluate import grounding
from smolora.evaluate.rules import Item
from smolora.evaluate.score import score
from support.scoring import write_lines

BOX = "0.10, 0.20, 0.50, 0.60"


def item(box: str = BOX) -> Item:
    return Item("0", box, (box,), side=640.0)


@pytest.mark.parametrize(
    ("text", "coin", "standard", "follows"),
    [
        ("[0.10, 0.20, 0.50, 0.60]", True, True, True),
        ("[0.10, 0.20, 0.50, 0.60] ", True, True, True),
        ("0.10, 0.20, 0.50, 0.60", True, True, True),
        ("[.1, .2, .5, .6]", False, True, True),  # cut to 1, .2, .5, .
        ("[0.1, 0.2, 0.5, 0.6]", False, True, True),  # cut to .1, 0.2, 0.5, 0.
        ("The box is [0.10, 0.20, 0.50, 0.60].", False, True, False),
        ("{0.10, 0.20, 0.50, 0.60}", True, False, False),
        ("[0.10, 0.20], [0.50, 0.60]", True, False, False),
        ("[0.10, 0.20, 0.50, 0.60] [0.10, 0.20, 0.50, 0.60]", False, False, False),
        ("[64, 128, 320, 384]", False, False, False),  # pixels
        ("[0.10, 0.20, 0.50]", False, False, False),
        ("[0.50, 0.60, 0.10, 0.20]", False, False, True),  # corners in the wrong order
        ("[nan, 0.20, 0.50, 0.60]", False, False, False),
        ("", False, False, False),
    ],
)
def test_verdicts(text, coin, standard, follows):
    assert grounding.coin_grounded(item(), text) == coin
    assert grounding.grounded(item(), text) == standard
    assert grounding.follows_box(item(), text) == follows


def test_half_of_the_union_is_not_enough():
    """In floats the first is 0.5000000000000001."""
    for box, half in (("0.10, 0.10, 0.30, 0.30", "[0.10, 0.10, 0.30, 0.20]"), ("0, 0, 1, 1", "[0, 0, 1, 0.5]")):
        assert not grounding.grounded(item(box), half)
        assert grounding.grounded(item(box), half.replace("]", "01]"))


def test_iou():
    assert grounding.iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert grounding.iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert grounding.iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0


def write(folder, **changes):
    record = {"question_id": 0, "text": "q", "answer": "a", "answer_bbox": f"[{BOX}]", "size": [640, 480], **changes}
    (folder / "test.json").write_text(json.dumps([record]))
    return write_lines(folder / "answers.jsonl", [{"question_id": 0, "text": f"[{BOX}]"}])


@pytest.mark.parametrize("protocol", ["coin", "standard"])
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"answer_bbox": None}, "answer_bbox must be a text of four numbers in 0..1, .*got None"),
        ({"answer_bbox": "[0.1, 0.2, 0.5]"}, r"got '\[0.1, 0.2, 0.5\]'"),
        ({"answer_bbox": "[64, 128, 320, 384]"}, r"got '\[64, 128, 320, 384\]'"),
        ({"answer_bbox": "left"}, "got 'left'"),
        ({"answer_bbox": [0.1, 0.2, 0.5, 0.6]}, r"got \[0.1, 0.2, 0.5, 0.6\]"),
        ({"size": None}, "size must be width and height in pixels, got None"),
        ({"size": [640]}, r"got \[640\]"),
        ({"size": [0, 480]}, r"got \[0, 480\]"),
    ],
)
def test_an_annotation_without_a_box_is_named(tmp_path, protocol, changes, match):
    answers = write(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"test\.json: record 0: .*{match}"):
        score("Grounding", [tmp_path], answers, protocol)


def test_standard_grounding(tmp_path):
    result = score("Grounding", [tmp_path], write(tmp_path), "standard")
    assert (result.metric, result.score, result.mif, result.count) == ("acc@0.5", 100, 100, 1)
