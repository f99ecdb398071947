"""Grounding (RefCOCO, RefCOCO+ and RefCOCOg in CoIN): a box of the answer against the annotated one.

A box is x1, y1, x2, y2 relative to the longer side of the image, to which CoIN pads it: numbers from 0 to 1.
"""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from ..arguments import is_number
from ..data.format import read_json, read_questions
from .datasets import Files
from .rules import Item

Number = TypeVar("Number", float, Decimal)

THRESHOLD = 0.5
_NUMBER = r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*"
_FOUR = ",".join([_NUMBER] * 4)
_BARE, _BRACKETED = re.compile(_FOUR), re.compile(rf"\[{_FOUR}\]")


def iou(a: tuple[Number, ...], b: tuple[Number, ...]) -> Number | int:
    """Intersection over union of two boxes; 0 if they share no area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0
    intersection = width * height
    return intersection / (_area(a) + _area(b) - intersection)


def _area(box: tuple[Number, ...]) -> Number:
    return (box[2] - box[0]) * (box[3] - box[1])


def written_box(text: str) -> tuple[Decimal, ...] | None:
    """The one box in a text: four numbers in 0..1, in brackets or with nothing else. None if there is none."""
    bare = _BARE.fullmatch(text)
    found = [bare.groups()] if bare else _BRACKETED.findall(text)
    if len(found) != 1:
        return None
    box = tuple(map(Decimal, found[0]))
    return box if all(number <= 1 for number in box) else None


def grounded(item: Item, text: str) -> bool:
    """Whether the IoU of the written box and the annotated one is over 0.5. Half is not, whatever floats make of it."""
    box, truth = written_box(text), written_box(item.references[0])
    if box is None or truth is None or box[0] > box[2] or box[1] > box[3]:
        return False
    return iou(box, truth) > THRESHOLD


def follows_box(item: Item, text: str) -> bool:
    """Whether the answer is a box and nothing else, in brackets or without."""
    text = text.strip()
    return written_box(text) is not None and bool(_BARE.fullmatch(text) or _BRACKETED.fullmatch(text))


def coin_grounded(item: Item, text: str) -> bool:
    """CoIN's verdict, as its released scorer gives it.

    It removes the brackets and then cuts the first and the last character. So the last number of an answer in brackets
    loses its last digit, and the first one its first. Both boxes are in pixels of the padded image.
    """
    try:
        box = _numbers(_unbracketed(text)[1:-1])
    except ValueError:
        return False
    truth = _numbers(item.references[0])
    if len(box) != 4:
        return False
    return iou(tuple(number * item.side for number in box), tuple(number * item.side for number in truth)) > THRESHOLD


def true_boxes(path: Path) -> list[str]:
    """The annotated box of each record of a test file, without brackets.

    Raises:
        ValueError: a record has none, or one that is no box. The message names file and record.
    """
    return [
        _annotated(record.get("answer_bbox") if isinstance(record, dict) else None, f"{path}: record {index}")
        for index, record in enumerate(read_json(path))
    ]


def load(files: Files, questions: str) -> list[Item]:
    """Load the questions with their annotated boxes (`answer_bbox`) and sizes of their images (`size`)."""
    path = files.find(questions)
    records = read_json(path)
    items = []
    for question in read_questions(path, skip=files.skip, unique=False):
        record, where = records[question.index], f"{path}: record {question.index}"
        box, side = _annotated(record.get("answer_bbox"), where), _longer_side(record.get("size"), where)
        items.append(Item(str(question.question_id), box, (box,), side=side))
    return items


def _annotated(value: Any, where: str) -> str:
    """Check an annotated box, and return its four numbers without brackets."""
    box = _unbracketed(value) if isinstance(value, str) else ""
    if written_box(box) is None:  # its corners may be in the wrong order, as CoIN's scorer takes them
        raise ValueError(
            f"{where}: answer_bbox must be a text of four numbers in 0..1, [x1, y1, x2, y2], got {value!r}"
        )
    return box


def _longer_side(value: Any, where: str) -> float:
    if not isinstance(value, list) or len(value) != 2 or not all(is_number(side) and side > 0 for side in value):
        raise ValueError(f"{where}: size must be width and height in pixels, got {value!r}")
    return max(value)


def _unbracketed(text: str) -> str:
    return text.replace("[", "").replace("]", "")


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))
