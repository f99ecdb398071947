"""A look at a task's data for the plan: counts, lengths, duplicates across its files, broken pictures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.format import Conversation, Question
from ..io.files import has_file

LOOKED_AT = 200  # pictures of a task that are opened


def look_at(train: Sequence[Conversation], test: Sequence[Question], images: Path) -> dict[str, Any]:
    """Describe a task's data.

    Args:
        train: its training samples.
        test: its questions.
        images: folder of their images.

    Returns:
        "pictures", the number of different ones; "without_picture", samples without one; "question_words" and
        "answer_words", the median and the most of all samples; "in_both", questions of the test that are training
        samples too, with the same turns and pictures; "pictures_in_both", pictures that both have by path; "looked_at",
        pictures that were opened, evenly spread; "broken", those of them that cannot be read.
    """
    trained = {(sample.messages[:-1], sample.images) for sample in train}
    shown = {image for sample in train for image in sample.images}
    asked = {image for question in test for image in question.images}
    answers = [sample.answer for sample in train]
    for question in test:
        answers += [question.answer] if isinstance(question.answer, str) else question.answer or ()
    paths = sorted(str(images / name) for name in shown | asked if has_file(images / name))
    chosen = paths[:: max(1, -(-len(paths) // LOOKED_AT))]
    return {
        "pictures": len(shown | asked),
        "without_picture": sum(not images for images in (*(s.images for s in train), *(q.images for q in test))),
        "question_words": _words([*(sample.text for sample in train), *(question.text for question in test)]),
        "answer_words": _words(answers),
        "in_both": sum((question.messages, question.images) in trained for question in test),
        "pictures_in_both": len(shown & asked),
        "looked_at": len(chosen),
        "broken": [path for path in chosen if _is_broken(Path(path))],
    }


def _words(texts: Sequence[str]) -> list[float]:
    counts = [len(text.split()) for text in texts]
    return [statistics.median(counts), max(counts)] if counts else [0, 0]


def _is_broken(path: Path) -> bool:
    """Whether a picture's structure is damaged. Its pixels are not decoded."""
    try:
        with Image.open(path) as image:
            image.verify()
    except Exception:  # a decoder may raise anything for a broken file
        return True
    return False


def sentence(name: str, look: dict[str, Any]) -> str:
    """A line of text on a task's data."""
    parts = [
        f"{look['pictures']} pictures",
        f"{look['question_words'][0]:g} words a question (at most {look['question_words'][1]})",
        f"{look['answer_words'][0]:g} an answer (at most {look['answer_words'][1]})",
    ]
    parts += [f"{look['without_picture']} samples without a picture"] * bool(look["without_picture"])
    parts += [f"{look['in_both']} questions are training samples too"] * bool(look["in_both"])
    parts += [f"{look['pictures_in_both']} pictures in training and test"] * bool(look["pictures_in_both"])
    if look["broken"]:
        broken = look["broken"]
        parts.append(f"{len(broken)} of {look['looked_at']} pictures looked at are broken, the first is {broken[0]}")
    return f"data of {name}: " + ", ".join(parts)
