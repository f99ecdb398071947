"""MiniCVIT-20: five tasks of MiniCVIT split by what they ask about, into twenty.

    Instructions_Single/<task>/      train.json and test.json

Samples are MiniCVIT's, drawn until one is of the part. Answers are scored without annotations (`metric: exact`), since
parts of a dataset share its annotations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from ..instructions.texts import SINGLE_TYPE
from . import tasks
from .files import Benchmark, DrawnSample, TaskSpec
from .scenes import DIGITS, OBJECTS, WORDS, StableRandom

Draw = Callable[[StableRandom, bool], DrawnSample]


def part(draw: Draw, *, answers: Collection[str] = (), asks: str | tuple[str, ...] = "") -> Draw:
    """A drawing that goes on until a sample has one of `answers` (if there are any) and a question that begins so."""

    def draw_part(rng: StableRandom, held_out: bool) -> DrawnSample:
        while True:
            sample = draw(rng, held_out)
            if (not answers or sample.answer in answers) and sample.question.startswith(asks):
                return sample

    return draw_part


PARTS: dict[str, dict[str, Draw]] = {
    "ScienceQA": {
        "number": part(tasks.science_qa, asks="Which number"),
        "object": part(tasks.science_qa, asks="What is shown"),
        "shape": part(tasks.science_qa, asks=("Which colour", "Which shape")),
        "kind": part(tasks.science_qa, asks=tuple(f"What is {name}?" for of in tasks.KINDS.values() for name in of)),
    },
    "TextVQA": {f"words-{i + 1}": part(tasks.text_vqa, answers=WORDS[4 * i : 4 * i + 4]) for i in range(4)},
    "ImageNet": {
        "objects-1": part(tasks.image_net, answers=OBJECTS[:4]),
        "objects-2": part(tasks.image_net, answers=OBJECTS[4:]),
        "digits-1": part(tasks.image_net, answers=DIGITS[:3]),
        "digits-2": part(tasks.image_net, answers=DIGITS[3:6]),
        "digits-3": part(tasks.image_net, answers=DIGITS[6:]),
    },
    "GQA": {
        "colour": part(tasks.gqa, asks="What colour"),
        "shape": part(tasks.gqa, asks=("What is above", "What is below", "What is to")),
        "verify": part(tasks.gqa, asks="Is the"),
    },
    "VQAv2": {
        "count": part(tasks.vqa, asks="How many"),
        "there": part(tasks.vqa, asks="Is there"),
        "digit": part(tasks.vqa, asks="What number"),
        "larger": part(tasks.vqa, asks="Is the number"),
    },
}
TRAIN, TEST = 400, 50
MINICVIT_20 = Benchmark(
    "MiniCVIT-20",
    "MiniCVIT-20 1",
    {
        f"{dataset}-{name}": TaskSpec(draw, "test.json", TRAIN, TEST)
        for dataset, parts in PARTS.items()
        for name, draw in parts.items()
    },
    {
        "Instructions_Single": {
            f"{dataset}-{name}": SINGLE_TYPE[dataset] for dataset, parts in PARTS.items() for name in parts
        }
    },
)
