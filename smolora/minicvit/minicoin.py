"""MiniCoIN: CoIN's eight tasks in small, in its order, its file names and its formats.

    Instructions_Original/<task>/    train.json, and test.json or val.json

Seven tasks are drawn as MiniCVIT draws them, with pictures of their own. Grounding asks for the box around one of the
shapes in a picture: x1, y1, x2, y2 from 0 to 1, relative to the square that the picture is padded to. Its test records
have `answer_bbox` and `size`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..instructions.texts import SINGLE_TYPE
from . import tasks
from .drawing import Canvas
from .files import Benchmark, DrawnSample, TaskSpec
from .kinds import BaseSettings
from .pictures import (
    EVERYWHERE,
    PATCH,
    PATCHES,
    PROBE_HEADS,
    Curriculum,
    Picture,
    ProbeHead,
    draw_kind,
    vocabulary_texts,
)
from .scenes import COLOURS, SHAPES, SIDE, StableRandom, draw_scene

STEP = PATCH  # pixels between the places where a shape's box may begin or end
NUMBERS = tuple(f"{place / (SIDE // STEP):.2f}" for place in range(SIDE // STEP + 1))
SIZES = ((SIDE, SIDE), (SIDE, SIDE - 2 * STEP), (SIDE - 2 * STEP, SIDE))  # width and height of a picture
WHERE_IS = ("Where is the {}?", "Which part of the picture has the {}?")
PADDING = (122, 116, 104)  # CLIP's mean colour, with which LLaVA pads


class Placed(NamedTuple):
    """A shape in a picture, with its box in pixels of the padded square."""

    shape: str
    colour: str
    box: tuple[int, int, int, int]

    @property
    def numbers(self) -> list[str]:
        """The box's numbers as they are written."""
        return [NUMBERS[place // STEP] for place in self.box]

    @property
    def written(self) -> str:
        """The box without its brackets."""
        return ", ".join(self.numbers)


def scene(rng: StableRandom, fewest: int = 2) -> tuple[Canvas, list[Placed]]:
    """Draw `fewest` to three shapes of different colours, none on another."""
    width, height = rng.choice(SIZES)
    placed: list[Placed] = []
    for colour in rng.sample(list(COLOURS), rng.between(fewest, 3)):
        shape = rng.choice(SHAPES)
        while True:
            side = STEP * (1 if placed else rng.between(1, 2))  # three large ones would not fit
            left, top = STEP * rng.below((width - side) // STEP + 1), STEP * rng.below((height - side) // STEP + 1)
            x, y = left + (SIDE - width) // 2, top + (SIDE - height) // 2
            box = x, y, x + side, y + side
            if not any(_meet(box, other.box) for other in placed):
                break
        placed.append(Placed(shape, colour, box))
    corner = (SIDE - width) // 2, (SIDE - height) // 2
    shown = [(p.shape, p.colour, (p.box[0] - corner[0], p.box[1] - corner[1]), p.box[2] - p.box[0]) for p in placed]
    return draw_scene((width, height), shown, rng), placed


def _meet(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def grounding(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Ask for the box around a shape."""
    canvas, placed = scene(rng)
    asked = rng.choice(placed)
    question = rng.choice(WHERE_IS).format(f"{asked.colour} {asked.shape}")
    box = f"[{asked.written}]"
    height, width, _ = canvas.pixels.shape
    more = {"answer_bbox": box, "size": [width, height]}
    return DrawnSample(question, box, canvas, more=more)


TRAIN, TEST = 1600, 400
TASKS: dict[str, TaskSpec] = {
    "ScienceQA": TaskSpec(tasks.science_qa, "test.json", TRAIN, TEST),
    "TextVQA": TaskSpec(tasks.text_vqa, "val.json", TRAIN, TEST),
    "ImageNet": TaskSpec(tasks.image_net, "test.json", TRAIN, TEST),
    "GQA": TaskSpec(tasks.gqa, "test.json", TRAIN, TEST),
    "VizWiz": TaskSpec(tasks.viz_wiz, "val.json", TRAIN, TEST),
    "Grounding": TaskSpec(grounding, "test.json", TRAIN, TEST),
    "VQAv2": TaskSpec(tasks.vqa, "val.json", TRAIN, TEST),
    "OCRVQA": TaskSpec(tasks.ocr_vqa, "val.json", TRAIN, TEST),
}
BOX_INSTRUCTION = "Answer with the corners of its box, [x1, y1, x2, y2], in numbers from 0 to 1."
INSTRUCTIONS = {name: (BOX_INSTRUCTION,) if name == "Grounding" else SINGLE_TYPE[name] for name in TASKS}
MINICOIN = Benchmark("MiniCoIN", "MiniCoIN 2", TASKS, {"Instructions_Original": INSTRUCTIONS}, numbered=True)


# ---- what its base model learns from


CORNERS = ("x1", "y1", "x2", "y2")
# What each patch is told of the shape that covers most of it, and all patches together of each colour's shape. Without
# the first a tower of this size finds no boxes, and its language model cannot look them up where a colour is.
BOX_HEADS = {
    f"{what}_at_{patch}": ProbeHead((*names, "nothing"), (patch,), 4 / len(EVERYWHERE))
    for patch in EVERYWHERE
    for what, names in (("colour", tuple(COLOURS)), ("shape", SHAPES), *((corner, NUMBERS) for corner in CORNERS))
}
BOX_HEADS |= {
    f"{colour}_{what}": ProbeHead((*names, "nothing"), EVERYWHERE)
    for colour in COLOURS
    for what, names in (("shape", SHAPES), *((corner, NUMBERS) for corner in CORNERS))
}
# how often each kind is drawn
KIND_WEIGHTS = {"digit": 4, "object": 1, "shape": 1, "grid": 2, "sign": 3, "book": 2, "words": 1, "scene": 10}
KINDS_OF_PICTURES = tuple(kind for kind, weight in KIND_WEIGHTS.items() for _ in range(weight))


def draw_picture(rng: StableRandom) -> Picture:
    """Draw a picture of a random kind, with all questions about it. Some are out of focus."""
    kind = rng.choice(KINDS_OF_PICTURES)
    if kind == "scene":
        return scene_picture(rng)
    picture = draw_kind(kind, rng)
    if picture.canvas is not None and kind in ("digit", "object", "sign"):
        question, sentence = "Can the picture be made out?", "I would say {}."
        if rng.chance(25):
            picture.canvas.blur(1)
        elif rng.chance(10):
            picture.canvas.blur(7)
            picture = Picture(picture.canvas)
            picture.ask(question, "no", sentence)
            return picture
        picture.ask(question, "yes", sentence)
    return picture


def scene_picture(rng: StableRandom) -> Picture:
    """Draw a scene, padded, with questions on what is where."""
    canvas, placed = scene(rng, fewest=1)
    facts = {head: "nothing" for head in BOX_HEADS}
    for one in placed:
        facts[f"{one.colour}_shape"] = one.shape
        facts.update({f"{one.colour}_{corner}": number for corner, number in zip(CORNERS, one.numbers, strict=True)})
    for patch in EVERYWHERE:
        covered, one = max(((_overlap(patch, one.box), one) for one in placed), key=lambda pair: pair[0])
        if covered:
            said = dict(zip(CORNERS, one.numbers, strict=True), colour=one.colour, shape=one.shape)
            facts.update({f"{what}_at_{patch}": name for what, name in said.items()})
    picture = Picture(padded(canvas), **facts)
    # what is said of a shape comes right after its colour: a model of this size learns first to look up the last word
    picture.ask(
        "Describe the picture.",
        " and ".join(f"{one.colour} {one.shape}" for one in placed),
        f"I see {' and '.join(f'a {one.shape} in {one.colour} {one.written}' for one in placed)}.",
    )
    for one in placed:
        name = f"{one.colour} {one.shape}"
        for question in (f"Which numbers say where the {name} lies?", *WHERE_IS):
            picture.ask(question.format(name), one.written, f"The {one.shape} in {one.colour} {{}}.")
        picture.ask(f"Which shape is {one.colour}?", one.shape, f"It is a {one.colour} {{}}.")
    return picture


def _overlap(patch: int, box: tuple[int, int, int, int]) -> int:
    """Return how many pixels of a patch a box covers."""
    row, column = divmod(patch, PATCHES)
    x, y = PATCH * column, PATCH * row
    wide, high = min(x + PATCH, box[2]) - max(x, box[0]), min(y + PATCH, box[3]) - max(y, box[1])
    return max(wide, 0) * max(high, 0)


def padded(canvas: Canvas) -> Canvas:
    """Centre a picture in a square, as LLaVA pads it."""
    height, width, _ = canvas.pixels.shape
    square = Canvas(SIDE, SIDE, PADDING)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    square.pixels[top : top + height, left : left + width] = canvas.pixels
    return square


def _texts() -> Iterator[str]:
    """Yield texts that have every word of the data, the prompts and the conversations."""
    yield from vocabulary_texts()
    yield f" {BOX_INSTRUCTION}\n{BOX_INSTRUCTION} [ ["
    yield from (f" {number}, {number}\n{number}]." for number in NUMBERS)
    for task in TASKS:
        for sample, _ in MINICOIN.samples(task, "vocabulary", 40):
            yield f" {sample.question}\n{sample.question} {sample.answer}"
    for index in range(100):
        for question, _, sentence in draw_picture(StableRandom(f"vocabulary {index}")).turns:
            yield f" {question}\n{question} {sentence}"


MINICOIN_PICTURES = Curriculum(MINICOIN.seed, PROBE_HEADS | BOX_HEADS, draw_picture, _texts, numbers=True, turns=6)
MINICOIN_BASE = BaseSettings(vision_steps=2000, steps=1200)
