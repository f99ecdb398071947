"""MiniCVIT: a small synthetic version of the benchmark's ten tasks, in the released files and formats.

    Instructions_Single/<task>/      train.json, test.json or val.json (Places365: train_5shot.json, train_10shot.json)
    Instructions_Multi/<task>/       the same questions, with instructions of five wordings
    annotations/<task>/              further files for scoring: problems.json, TextVQA_0.5.1_val.json, ...
    images/<task>/<split>/           PNG files; the records' paths start in images/
    contact_sheets/<task>.png        pictures with their questions and answers, for people (not part of the data)

Digits are real, from scikit-learn, and split into training and test. Everything else is drawn. All files but the
contact sheets have the same bytes on every machine. Training and test files share words, objects and places, but not
pictures: combinations, colours and positions vary.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ..instructions.texts import IMAGE_TOKEN, MULTI_TYPE, SINGLE_TYPE
from ..io.files import atomic_write_text, locked, read_text
from . import scenes
from .drawing import Canvas, png
from .scenes import COLOURS, COMPANIONS, DIGITS, OBJECTS, PLACES, SHAPES, WORDS, StableRandom

SEED = "MiniCVIT 1"
SETTINGS = {"Instructions_Single": SINGLE_TYPE, "Instructions_Multi": MULTI_TYPE}
SHOTS = (5, 10)
UNANSWERABLE = "unanswerable"


class DrawnSample(NamedTuple):
    """A question, about a picture or about none, without its instruction."""

    question: str  # empty where the instruction is the question
    answer: str
    canvas: Canvas | None
    references: tuple[str, ...] = ()  # of captions: five, of which `answer` is one
    choices: tuple[str, ...] = ()
    kind: str = ""  # GQA's type: "query" or "verify"


# ---- one sample of each task


# a question's choices always have the same order, so a letter can be learned from the picture
QUIZ: dict[str, tuple[tuple[str, ...], ...]] = {
    "Which number is written here?": (DIGITS[:5], DIGITS[5:]),
    "What is shown in the picture?": (OBJECTS[:4], OBJECTS[4:]),
    "Which colour is the shape?": (tuple(COLOURS),),
    "Which shape is it?": (SHAPES,),
}
KINDS = {"colour": tuple(COLOURS), "number": DIGITS, "object": OBJECTS, "place": PLACES, "shape": SHAPES}


def science_qa(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Ask a multiple-choice question about a picture, or about a word without a picture; the answer is a letter."""
    topic = rng.choice(["digit", "object", "object", "colour", "shape", "kind"])
    colour = rng.choice(list(COLOURS))
    if topic == "kind":
        kind = rng.choice(list(KINDS))
        question, right, choices, canvas = f"What is {rng.choice(KINDS[kind])}?", kind, tuple(KINDS), None
    elif topic == "digit":
        question, right = "Which number is written here?", rng.choice(DIGITS)
        canvas = scenes.draw_digit(DIGITS.index(right), colour, rng, held_out)
    elif topic == "object":
        question, right = "What is shown in the picture?", rng.choice(OBJECTS)
        canvas = scenes.draw_object(right, colour, rng)
    else:
        shape = rng.choice(SHAPES)
        question, right = ("Which colour is the shape?", colour) if topic == "colour" else ("Which shape is it?", shape)
        canvas = scenes.draw_one_shape(shape, colour, rng)
    if topic != "kind":
        choices = next(choices for choices in QUIZ[question] if right in choices)
    return DrawnSample(question + options(choices), "ABCDE"[choices.index(right)], canvas, choices=choices)


def options(choices: Sequence[str]) -> str:
    """Format choices as the prompt lists them, one on each line."""
    return "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCDE", choices, strict=False))


def text_vqa(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Ask for the word on a sign."""
    word = rng.choice(WORDS)
    question = rng.choice(["What word is on the sign?", "What does the sign say?", "Which word is written here?"])
    return DrawnSample(question, word, scenes.draw_sign(word, rng.choice(list(COLOURS)), rng))


SUBJECTS = ("A person", "A man", "Somebody", "Our friend")
SHIRTS = ("in a {} shirt", "wearing {}", "dressed in {}", "with a {} top")
VERBS = ("stands", "is", "waits", "rests")
WITH = {
    "dog": ("with a dog", "beside a dog", "next to a dog"),
    "ball": ("with a ball", "beside a ball", "next to a ball"),
    "umbrella": ("with an umbrella", "holding an umbrella", "under an umbrella"),
}
WHERE = {
    "beach": ("on the beach", "by the sea", "at the shore"),
    "forest": ("in the forest", "among trees", "between tall pines"),
    "desert": ("in the desert", "on hot sand", "near a cactus"),
    "city": ("in the city", "on a street", "downtown"),
    "mountain": ("in the mountains", "below high peaks", "under snowy tops"),
    "field": ("in a field", "on green grass", "on a meadow"),
}


def flickr(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Draw a person, a companion and a place, captioned by five people."""
    colour, companion, where = rng.choice(list(COLOURS)), rng.choice(COMPANIONS), rng.choice(PLACES)
    canvas = scenes.draw_person(colour, companion, where, rng)

    def caption() -> str:
        parts = (SUBJECTS, SHIRTS, VERBS, WITH[companion], WHERE[where])
        return " ".join(rng.choice(part) for part in parts).format(colour) + "."

    references = tuple(caption() for _ in range(5))
    return DrawnSample("", references[0], canvas, references)


def image_net(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Ask for the class of an object or of a handwritten digit."""
    colour = rng.choice(list(COLOURS))
    name = rng.choice(OBJECTS + DIGITS)
    if name in DIGITS:
        return DrawnSample("", name, scenes.draw_digit(DIGITS.index(name), colour, rng, held_out))
    return DrawnSample("", name, scenes.draw_object(name, colour, rng))


def gqa(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Draw two shapes, side by side or one above the other, and ask a question of several steps."""
    shape, other = rng.sample(SHAPES, 2)
    colour, other_colour = rng.sample(list(COLOURS), 2)
    first, second, relation, inverse = rng.choice(
        [
            (0, 1, "to the left of", "to the right of"),
            (2, 3, "to the left of", "to the right of"),
            (0, 2, "above", "below"),
            (1, 3, "above", "below"),
        ]
    )
    canvas = scenes.draw_shapes({first: (shape, colour), second: (other, other_colour)}, rng)
    asked = rng.choice(["colour", "shape", "relation"])
    if asked == "relation":
        right = rng.chance(50)
        claim = relation if right else inverse
        return DrawnSample(f"Is the {shape} {claim} the {other}?", "yes" if right else "no", canvas, kind="verify")
    if rng.chance(50):  # ask about the other shape
        shape, colour, other, other_colour, relation = other, other_colour, shape, colour, inverse
    if asked == "colour":
        return DrawnSample(f"What colour is the shape {relation} the {other}?", colour, canvas, kind="query")
    return DrawnSample(f"What is {relation} the {other_colour} shape?", shape, canvas, kind="query")


def vqa(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Ask a question whose answer is yes, no or a number."""
    asked = rng.choice(["count", "there", "digit", "larger"])
    if asked in ("digit", "larger"):
        number = rng.below(10)
        canvas = scenes.draw_digit(number, rng.choice(list(COLOURS)), rng, held_out)
        if asked == "digit":
            return DrawnSample("What number is written here?", str(number), canvas)
        return DrawnSample("Is the number larger than 4?", "yes" if number > 4 else "no", canvas)
    cells = rng.sample(range(4), rng.between(1, 4))
    shown = {cell: (rng.choice(SHAPES), rng.choice(list(COLOURS))) for cell in cells}
    canvas = scenes.draw_shapes(shown, rng)
    if asked == "count":
        return DrawnSample("How many shapes are there?", str(len(cells)), canvas)
    there = {shape for shape, _ in shown.values()}
    missing = [shape for shape in SHAPES if shape not in there]
    right = rng.chance(50) or not missing
    shape = rng.choice(sorted(there) if right else missing)
    return DrawnSample(f"Is there a {shape}?", "yes" if right else "no", canvas)


def viz_wiz(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Ask TextVQA's and other questions about blurred pictures, some of them unreadable."""
    unreadable = rng.chance(15)
    if rng.chance(50):
        sample = text_vqa(rng, held_out)
    else:
        sample = image_net(rng, held_out)._replace(question="What is this?")
    assert sample.canvas is not None  # either kind has a picture
    sample.canvas.blur(7 if unreadable else 1)
    return sample._replace(answer=UNANSWERABLE) if unreadable else sample


def text_caps(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Ask for a caption that has the word in the picture."""
    word, colour = rng.choice(WORDS), rng.choice(list(COLOURS))
    canvas = scenes.draw_sign(word, colour, rng)
    forms: tuple[str, ...] = ("A {} sign with the word {}.", "A {} sign says {}.", "There is a {} sign that reads {}.")
    forms += ("On a {} sign is the word {}.", "A {} sign stands here with the text {}.")
    references = tuple(form.format(colour, word) for form in rng.sample(forms, len(forms)))
    return DrawnSample("", references[0], canvas, references)


def ocr_vqa(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Ask for the title on a book's cover, two words."""
    words = rng.sample(WORDS, 2)
    question = rng.choice(["What is the title of this book?", "What is the book called?"])
    return DrawnSample(question, " ".join(words), scenes.draw_book(words, rng.choice(list(COLOURS)), rng))


def places(rng: StableRandom, held_out: bool) -> DrawnSample:
    """Ask for the background."""
    name = rng.choice(PLACES)
    return DrawnSample("", name, scenes.draw_place(name, rng))


# ---- the table


class TaskSpec(NamedTuple):
    """How a task draws a sample, and the number of samples in its files."""

    draw: Callable[[StableRandom, bool], DrawnSample]
    test_file: str
    train: int = 0
    test: int = 100


TRAIN = 1600
TASKS: dict[str, TaskSpec] = {
    "ScienceQA": TaskSpec(science_qa, "test.json", TRAIN),
    "TextVQA": TaskSpec(text_vqa, "val.json", TRAIN),
    "Flickr30k": TaskSpec(flickr, "val.json", TRAIN),
    "ImageNet": TaskSpec(image_net, "test.json", TRAIN),
    "GQA": TaskSpec(gqa, "test.json", TRAIN),
    "VQAv2": TaskSpec(vqa, "val.json", TRAIN),
    "VizWiz": TaskSpec(viz_wiz, "val.json"),
    "TextCaps": TaskSpec(text_caps, "val.json"),
    "OCRVQA": TaskSpec(ocr_vqa, "test.json"),
    "Places365": TaskSpec(places, "val.json"),
}


def training_files(task: str) -> dict[str, int]:
    """Return a task's training files, each with its number of samples."""
    if task == "Places365":
        return {f"train_{shots}shot.json": shots * len(PLACES) for shots in SHOTS}
    return {"train.json": TASKS[task].train} if TASKS[task].train else {}


def samples(task: str, split: str, count: int) -> Iterator[tuple[DrawnSample, StableRandom]]:
    """Draw the samples of a split ("train" or "test"), each with its generator for further choices."""
    for index in range(count):
        rng = StableRandom(f"{SEED}, {task}, {split}, {index}")
        yield TASKS[task].draw(rng, split == "test"), rng


# ---- files


def make_minicvit(folder: str | Path, tasks: list[str] | None = None) -> Path:
    """Write MiniCVIT, except tasks that are complete already.

    Args:
        folder: the destination; the module's docstring has its layout.
        tasks: names of `TASKS` to write; None for all.

    Returns:
        The folder.

    Raises:
        ValueError: there is no such task.
    """
    folder = Path(folder)
    wanted = list(TASKS) if tasks is None else list(tasks)
    unknown = [name for name in wanted if name not in TASKS]
    if unknown:
        raise ValueError(f"tasks must be among {', '.join(TASKS)}, got {', '.join(unknown)}")
    if all(is_complete(folder, name) for name in wanted):
        return folder
    with locked(folder / ".lock", str(folder), wait=True):  # another run may be writing it
        missing = [name for name in wanted if not is_complete(folder, name)]
        for name in tqdm(missing, desc="MiniCVIT", unit="task"):
            _write_task(folder, name)
    return folder


def is_complete(folder: Path, task: str) -> bool:
    """Return whether a task's files are all there, in this version of the data."""
    path = folder / "annotations" / task / "digest.json"
    return path.is_file() and json.loads(read_text(path))["seed"] == SEED


def _write_task(folder: Path, name: str) -> None:
    task = TASKS[name]
    digest = hashlib.sha256()

    def put(path: str, data: bytes) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
        digest.update(path.encode() + b"\0" + hashlib.sha256(data).digest())

    def image(sample: DrawnSample, split: str, index: int) -> str | None:
        if sample.canvas is None:
            return None
        path = f"{name}/{split}/{index:05d}.png"
        put(f"images/{path}", png(sample.canvas.pixels))
        return path

    if name == "Places365":
        _write_shots(put, image)
    elif task.train:
        drawn = [(s, image(s, "train", i), rng) for i, (s, rng) in enumerate(samples(name, "train", task.train))]
        for tree, instructions in SETTINGS.items():
            records = [_conversation(s, path, rng.choice(instructions[name])) for s, path, rng in drawn]
            put(f"{tree}/{name}/train.json", _json(records))
    drawn = [(s, image(s, "test", i), rng) for i, (s, rng) in enumerate(samples(name, "test", task.test))]
    ids = [_question_id(name, index) for index in range(task.test)]
    for tree, instructions in SETTINGS.items():
        records = [
            _question(i, s, path, rng.choice(instructions[name])) for i, (s, path, rng) in zip(ids, drawn, strict=True)
        ]
        put(f"{tree}/{name}/{task.test_file}", _json(records))
    for path, content in _annotations(name, ids, [s for s, _, _ in drawn], [path for _, path, _ in drawn]):
        put(f"annotations/{name}/{path}", _json(content))
    contact_sheet(folder / "contact_sheets" / f"{name}.png", [s for s, _, _ in drawn[:24]])
    # written last, as the mark of a complete task
    content = json.dumps({"seed": SEED, "sha256": digest.hexdigest()}) + "\n"
    atomic_write_text(folder / "annotations" / name / "digest.json", content)


def _write_shots(put: Callable[[str, bytes], None], image: Callable[[DrawnSample, str, int], str | None]) -> None:
    """Write Places365's training files: the 5 pictures of each class are among the 10."""
    drawn: list[tuple[int, str | None, StableRandom, DrawnSample]] = []
    for index in range(max(SHOTS) * len(PLACES)):
        shot, place = divmod(index, len(PLACES))
        rng = StableRandom(f"{SEED}, Places365, train, {index}")
        sample = DrawnSample("", PLACES[place], scenes.draw_place(PLACES[place], rng))
        drawn.append((shot, image(sample, "train", index), rng, sample))
    for tree, instructions in SETTINGS.items():
        chosen = [(shot, _conversation(s, path, rng.choice(instructions["Places365"]))) for shot, path, rng, s in drawn]
        for shots in SHOTS:
            records = [record for shot, record in chosen if shot < shots]
            put(f"{tree}/Places365/train_{shots}shot.json", _json(records))


def _text(sample: DrawnSample, instruction: str) -> str:
    return f"{sample.question}\n{instruction}" if sample.question else instruction


def _conversation(sample: DrawnSample, image: str | None, instruction: str) -> dict[str, Any]:
    value = _text(sample, instruction)
    turns = [
        {"from": "human", "value": value if image is None else f"{IMAGE_TOKEN}\n{value}"},
        {"from": "gpt", "value": sample.answer},
    ]
    return ({} if image is None else {"image": image}) | {"conversations": turns}


def _question_id(task: str, index: int) -> int | str:
    return str(index + 1) if task in ("ScienceQA", "GQA") else index + 1


def _question(question_id: int | str, sample: DrawnSample, image: str | None, instruction: str) -> dict[str, Any]:
    record = {"question_id": question_id} | ({} if image is None else {"image": image})
    answer = list(sample.references) if sample.references else sample.answer
    return record | {"text": _text(sample, instruction), "answer": answer}


def _annotations(
    task: str, ids: list[int | str], drawn: list[DrawnSample], images: list[str | None]
) -> Iterator[tuple[str, Any]]:
    """Make the further files that a dataset's own scoring reads."""
    if task == "ScienceQA":
        yield "pid_splits.json", {"train": [], "val": [], "test": ids}
        yield (
            "problems.json",
            {
                i: {"question": s.question.split("\n")[0], "choices": s.choices, "answer": "ABCDE".index(s.answer)}
                for i, s in zip(ids, drawn, strict=True)
            },
        )
    elif task == "TextVQA":
        data = [
            {"question_id": i, "question": s.question, "answers": _ten(s.answer, f"{task} {i}")}
            for i, s in zip(ids, drawn, strict=True)
        ]
        yield "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": data}
    elif task == "GQA":
        yield (
            "testdev_balanced_questions.json",
            {
                i: {
                    "question": s.question,
                    "answer": s.answer,
                    "isBalanced": True,
                    "types": {"structural": s.kind, "semantic": "rel"},
                }
                for i, s in zip(ids, drawn, strict=True)
            },
        )
    elif task == "VQAv2":
        records = [
            {"question_id": i, "answers": [{"answer": a} for a in _ten(s.answer, f"{task} {i}")]}
            for i, s in zip(ids, drawn, strict=True)
        ]
        yield "v2_mscoco_val2014_annotations.json", {"annotations": records}
    elif task == "VizWiz":
        records = [
            {
                "image": str(path).rpartition("/")[2],
                "question": s.question,
                "answers": [{"answer": a} for a in _ten(s.answer, f"{task} {i}")],
            }
            for i, s, path in zip(ids, drawn, images, strict=True)
        ]
        yield "Annotations/val.json", records


def _ten(answer: str, where: str) -> list[str]:
    """Make ten people's answers; up to two of them are "unanswerable"."""
    rng = StableRandom(f"{SEED}, ten answers, {where}")
    answers = [answer] * 10
    for _ in range(rng.below(3)):
        answers[rng.below(10)] = UNANSWERABLE
    return answers


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


# ---- contact sheets


def contact_sheet(path: Path, shown: list[DrawnSample], *, columns: int = 6, zoom: int = 4) -> None:
    """Draw a sheet of enlarged pictures, each above its question and answer."""
    side, caption = scenes.SIDE * zoom, 92
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * (side + 8) + 8, rows * (side + caption) + 8), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default_imagefont()
    for index, sample in enumerate(shown):
        x, y = 8 + index % columns * (side + 8), 8 + index // columns * (side + caption)
        if sample.canvas is None:
            draw.rectangle((x, y, x + side - 1, y + side - 1), outline=(160, 160, 160))
            draw.text((x + 8, y + 8), "(no image)", (120, 120, 120), font)
        else:
            sheet.paste(Image.fromarray(sample.canvas.pixels).resize((side, side), Image.Resampling.NEAREST), (x, y))
        said = [*sample.question.split("\n"), *(sample.references[:2] or [sample.answer])]
        lines = [part for line in said for part in textwrap.wrap(line, 31)]
        draw.multiline_text((x, y + side + 3), "\n".join(lines[:7]), (0, 0, 0), font, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
