"""MiniCVIT: the benchmark's ten tasks in small, in the files and formats of the released data, made in code.

    Instructions_Single/<task>/      train.json, test.json or val.json (Places365: train_5shot.json, train_10shot.json)
    Instructions_Multi/<task>/       the same questions, with instructions of five wordings
    annotations/<task>/              what scoring needs besides: problems.json, TextVQA_0.5.1_val.json, ...
    images/<task>/<split>/           PNG files; the records' paths start in images/
    contact_sheets/<task>.png        pictures with their questions and answers, to look at (not part of the data)

Digits are real ones, from scikit-learn; those of the test files occur in no training file. Everything else is drawn.
All of it but the contact sheets is the same, byte for byte, on every machine. Words, objects and places are the same in
training and test files; their combinations, colours and positions vary, and no picture occurs twice.
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

from ..instructions.texts import MULTI_TYPE, SINGLE_TYPE
from ..io.files import atomic_write_text, locked, read_text
from . import scenes
from .drawing import Canvas, png
from .scenes import COLOURS, COMPANIONS, DIGITS, OBJECTS, PLACES, SHAPES, WORDS, Dice

SEED = "MiniCVIT 1"
SETTINGS = {"Instructions_Single": SINGLE_TYPE, "Instructions_Multi": MULTI_TYPE}
SHOTS = (5, 10)
UNANSWERABLE = "unanswerable"


class Sample(NamedTuple):
    """A question about a picture, or about none, before it gets its instruction."""

    question: str  # empty: the instruction asks it
    answer: str
    canvas: Canvas | None
    references: tuple[str, ...] = ()  # captions: five ways to say it, of which `answer` is one
    choices: tuple[str, ...] = ()
    kind: str = ""  # GQA: whether it asks ("query") or checks ("verify")


# ---- one sample of each task


# choices stand in the same order whenever they are asked for: which letter is right is told by the picture, or known
QUIZ: dict[str, tuple[tuple[str, ...], ...]] = {
    "Which number is written here?": (DIGITS[:5], DIGITS[5:]),
    "What is shown in the picture?": (OBJECTS[:4], OBJECTS[4:]),
    "Which colour is the shape?": (tuple(COLOURS),),
    "Which shape is it?": (SHAPES,),
}
KINDS = {"colour": tuple(COLOURS), "number": DIGITS, "object": OBJECTS, "place": PLACES, "shape": SHAPES}


def science_qa(dice: Dice, held_out: bool) -> Sample:
    """A picture, or a word and no picture, and four or five choices: the answer is a letter."""
    topic = dice.choice(["digit", "object", "object", "colour", "shape", "kind"])
    colour = dice.choice(list(COLOURS))
    if topic == "kind":
        kind = dice.choice(list(KINDS))
        question, right, choices, canvas = f"What is {dice.choice(KINDS[kind])}?", kind, tuple(KINDS), None
    elif topic == "digit":
        question, right = "Which number is written here?", dice.choice(DIGITS)
        canvas = scenes.digit(DIGITS.index(right), colour, dice, held_out)
    elif topic == "object":
        question, right = "What is shown in the picture?", dice.choice(OBJECTS)
        canvas = scenes.thing(right, colour, dice)
    else:
        shape = dice.choice(SHAPES)
        question, right = ("Which colour is the shape?", colour) if topic == "colour" else ("Which shape is it?", shape)
        canvas = scenes.one_shape(shape, colour, dice)
    if topic != "kind":
        choices = next(choices for choices in QUIZ[question] if right in choices)
    return Sample(question + options(choices), "ABCDE"[choices.index(right)], canvas, choices=choices)


def options(choices: Sequence[str]) -> str:
    """Choices as the prompt lists them, a line each."""
    return "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCDE", choices, strict=False))


def text_vqa(dice: Dice, held_out: bool) -> Sample:
    """The word on a sign."""
    word = dice.choice(WORDS)
    question = dice.choice(["What word is on the sign?", "What does the sign say?", "Which word is written here?"])
    return Sample(question, word, scenes.sign(word, dice.choice(list(COLOURS)), dice))


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


def flickr(dice: Dice, held_out: bool) -> Sample:
    """Someone, something and a place, said by five people."""
    colour, companion, where = dice.choice(list(COLOURS)), dice.choice(COMPANIONS), dice.choice(PLACES)
    canvas = scenes.person(colour, companion, where, dice)

    def caption() -> str:
        parts = (SUBJECTS, SHIRTS, VERBS, WITH[companion], WHERE[where])
        return " ".join(dice.choice(part) for part in parts).format(colour) + "."

    references = tuple(caption() for _ in range(5))
    return Sample("", references[0], canvas, references)


def image_net(dice: Dice, held_out: bool) -> Sample:
    """The class of an object, or of a handwritten digit."""
    colour = dice.choice(list(COLOURS))
    name = dice.choice(OBJECTS + DIGITS)
    if name in DIGITS:
        return Sample("", name, scenes.digit(DIGITS.index(name), colour, dice, held_out))
    return Sample("", name, scenes.thing(name, colour, dice))


def gqa(dice: Dice, held_out: bool) -> Sample:
    """Two shapes side by side or above each other, and a question that takes more than one step."""
    shape, other = dice.sample(SHAPES, 2)
    colour, other_colour = dice.sample(list(COLOURS), 2)
    first, second, relation, inverse = dice.choice(
        [
            (0, 1, "to the left of", "to the right of"),
            (2, 3, "to the left of", "to the right of"),
            (0, 2, "above", "below"),
            (1, 3, "above", "below"),
        ]
    )
    canvas = scenes.shapes({first: (shape, colour), second: (other, other_colour)}, dice)
    asked = dice.choice(["colour", "shape", "relation"])
    if asked == "relation":
        right = dice.chance(50)
        claim = relation if right else inverse
        return Sample(f"Is the {shape} {claim} the {other}?", "yes" if right else "no", canvas, kind="verify")
    if dice.chance(50):  # ask from the other side
        shape, colour, other, other_colour, relation = other, other_colour, shape, colour, inverse
    if asked == "colour":
        return Sample(f"What colour is the shape {relation} the {other}?", colour, canvas, kind="query")
    return Sample(f"What is {relation} the {other_colour} shape?", shape, canvas, kind="query")


def vqa(dice: Dice, held_out: bool) -> Sample:
    """Yes, no, or a number."""
    asked = dice.choice(["count", "there", "digit", "larger"])
    if asked in ("digit", "larger"):
        number = dice.below(10)
        canvas = scenes.digit(number, dice.choice(list(COLOURS)), dice, held_out)
        if asked == "digit":
            return Sample("What number is written here?", str(number), canvas)
        return Sample("Is the number larger than 4?", "yes" if number > 4 else "no", canvas)
    cells = dice.sample(range(4), dice.between(1, 4))
    shown = {cell: (dice.choice(SHAPES), dice.choice(list(COLOURS))) for cell in cells}
    canvas = scenes.shapes(shown, dice)
    if asked == "count":
        return Sample("How many shapes are there?", str(len(cells)), canvas)
    there = {shape for shape, _ in shown.values()}
    missing = [shape for shape in SHAPES if shape not in there]
    right = dice.chance(50) or not missing
    shape = dice.choice(sorted(there) if right else missing)
    return Sample(f"Is there a {shape}?", "yes" if right else "no", canvas)


def viz_wiz(dice: Dice, held_out: bool) -> Sample:
    """TextVQA's questions and others about photographs that are out of focus, some beyond reading."""
    hopeless = dice.chance(15)
    if dice.chance(50):
        sample = text_vqa(dice, held_out)
    else:
        sample = image_net(dice, held_out)._replace(question="What is this?")
    sample.canvas.blur(7 if hopeless else 1)
    return sample._replace(answer=UNANSWERABLE) if hopeless else sample


def text_caps(dice: Dice, held_out: bool) -> Sample:
    """A caption with the word that is read in the picture."""
    word, colour = dice.choice(WORDS), dice.choice(list(COLOURS))
    canvas = scenes.sign(word, colour, dice)
    forms = ("A {} sign with the word {}.", "A {} sign says {}.", "There is a {} sign that reads {}.")
    forms += ("On a {} sign is the word {}.", "A {} sign stands here with the text {}.")
    references = tuple(form.format(colour, word) for form in dice.sample(forms, len(forms)))
    return Sample("", references[0], canvas, references)


def ocr_vqa(dice: Dice, held_out: bool) -> Sample:
    """The title on a book's cover, two words."""
    words = dice.sample(WORDS, 2)
    question = dice.choice(["What is the title of this book?", "What is the book called?"])
    return Sample(question, " ".join(words), scenes.book(words, dice.choice(list(COLOURS)), dice))


def places(dice: Dice, held_out: bool) -> Sample:
    """The background."""
    name = dice.choice(PLACES)
    return Sample("", name, scenes.place(name, dice))


# ---- the table


class Task(NamedTuple):
    """A task: how a sample is drawn, and how many there are in which files."""

    draw: Callable[[Dice, bool], Sample]
    test_file: str
    train: int = 0
    test: int = 100


TRAIN = 1600
TASKS: dict[str, Task] = {
    "ScienceQA": Task(science_qa, "test.json", TRAIN),
    "TextVQA": Task(text_vqa, "val.json", TRAIN),
    "Flickr30k": Task(flickr, "val.json", TRAIN),
    "ImageNet": Task(image_net, "test.json", TRAIN),
    "GQA": Task(gqa, "test.json", TRAIN),
    "VQAv2": Task(vqa, "val.json", TRAIN),
    "VizWiz": Task(viz_wiz, "val.json"),
    "TextCaps": Task(text_caps, "val.json"),
    "OCRVQA": Task(ocr_vqa, "test.json"),
    "Places365": Task(places, "val.json"),
}


def training_files(task: str) -> dict[str, int]:
    """A task's training files, each with its number of samples."""
    if task == "Places365":
        return {f"train_{shots}shot.json": shots * len(PLACES) for shots in SHOTS}
    return {"train.json": TASKS[task].train} if TASKS[task].train else {}


def samples(task: str, split: str, count: int) -> Iterator[tuple[Sample, Dice]]:
    """Samples of a split ("train" or "test"), each with the dice that goes on choosing for it."""
    for index in range(count):
        dice = Dice(f"{SEED}, {task}, {split}, {index}")
        yield TASKS[task].draw(dice, split == "test"), dice


# ---- files


def make_minicvit(folder: str | Path, tasks: list[str] | None = None) -> Path:
    """Write MiniCVIT; what is there already and complete is left as it is.

    Args:
        folder: where to; see the module for what is in it then.
        tasks: those of `TASKS` to write; None for all.

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
    with locked(folder / ".lock", str(folder), wait=True):  # two runs may want it
        missing = [name for name in wanted if not is_complete(folder, name)]
        for name in tqdm(missing, desc="MiniCVIT", unit="task"):
            _write_task(folder, name)
    return folder


def is_complete(folder: Path, task: str) -> bool:
    """Whether a task's files are there, those of this version of the data."""
    path = folder / "annotations" / task / "digest.json"
    return path.is_file() and json.loads(read_text(path))["seed"] == SEED


def _write_task(folder: Path, name: str) -> None:
    task = TASKS[name]
    digest = hashlib.sha256()

    def put(path: str, data: bytes) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
        digest.update(path.encode() + b"\0" + hashlib.sha256(data).digest())

    def image(sample: Sample, split: str, index: int) -> str | None:
        if sample.canvas is None:
            return None
        path = f"{name}/{split}/{index:05d}.png"
        put(f"images/{path}", png(sample.canvas.pixels))
        return path

    if name == "Places365":
        _write_shots(put, image)
    elif task.train:
        drawn = [(s, image(s, "train", i), dice) for i, (s, dice) in enumerate(samples(name, "train", task.train))]
        for tree, instructions in SETTINGS.items():
            records = [_conversation(s, path, dice.choice(instructions[name])) for s, path, dice in drawn]
            put(f"{tree}/{name}/train.json", _json(records))
    drawn = [(s, image(s, "test", i), dice) for i, (s, dice) in enumerate(samples(name, "test", task.test))]
    ids = [_question_id(name, index) for index in range(task.test)]
    for tree, instructions in SETTINGS.items():
        records = [
            _question(i, s, path, dice.choice(instructions[name]))
            for i, (s, path, dice) in zip(ids, drawn, strict=True)
        ]
        put(f"{tree}/{name}/{task.test_file}", _json(records))
    for path, content in _annotations(name, ids, [s for s, _, _ in drawn], [path for _, path, _ in drawn]):
        put(f"annotations/{name}/{path}", _json(content))
    contact_sheet(folder / "contact_sheets" / f"{name}.png", [s for s, _, _ in drawn[:24]])
    # last: it says that the rest is there
    content = json.dumps({"seed": SEED, "sha256": digest.hexdigest()}) + "\n"
    atomic_write_text(folder / "annotations" / name / "digest.json", content)


def _write_shots(put: Callable[[str, bytes], None], image: Callable[[Sample, str, int], str | None]) -> None:
    """Places365: so many pictures of each class, those of fewer shots among those of more."""
    drawn: list[tuple[int, str, Dice, Sample]] = []
    for index in range(max(SHOTS) * len(PLACES)):
        shot, place = divmod(index, len(PLACES))
        dice = Dice(f"{SEED}, Places365, train, {index}")
        sample = Sample("", PLACES[place], scenes.place(PLACES[place], dice))
        drawn.append((shot, image(sample, "train", index), dice, sample))
    for tree, instructions in SETTINGS.items():
        chosen = [
            (shot, _conversation(s, path, dice.choice(instructions["Places365"]))) for shot, path, dice, s in drawn
        ]
        for shots in SHOTS:
            records = [record for shot, record in chosen if shot < shots]
            put(f"{tree}/Places365/train_{shots}shot.json", _json(records))


def _text(sample: Sample, instruction: str) -> str:
    return f"{sample.question}\n{instruction}" if sample.question else instruction


def _conversation(sample: Sample, image: str | None, instruction: str) -> dict[str, Any]:
    value = _text(sample, instruction)
    turns = [
        {"from": "human", "value": value if image is None else f"<image>\n{value}"},
        {"from": "gpt", "value": sample.answer},
    ]
    return ({} if image is None else {"image": image}) | {"conversations": turns}


def _question_id(task: str, index: int) -> int | str:
    return str(index + 1) if task in ("ScienceQA", "GQA") else index + 1


def _question(question_id: int | str, sample: Sample, image: str | None, instruction: str) -> dict[str, Any]:
    record = {"question_id": question_id} | ({} if image is None else {"image": image})
    answer = list(sample.references) if sample.references else sample.answer
    return record | {"text": _text(sample, instruction), "answer": answer}


def _annotations(
    task: str, ids: list[int | str], drawn: list[Sample], images: list[str | None]
) -> Iterator[tuple[str, Any]]:
    """The files beside the questions that a dataset's own scoring reads."""
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
        yield "testdev_balanced_questions.json", {
            i: {
                "question": s.question, "answer": s.answer, "isBalanced": True,
                "types": {"structural": s.kind, "semantic": "rel"},
            }
            for i, s in zip(ids, drawn, strict=True)
        }  # fmt: skip
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
    """Ten people's answers: up to two of them cannot tell."""
    dice = Dice(f"{SEED}, ten answers, {where}")
    answers = [answer] * 10
    for _ in range(dice.below(3)):
        answers[dice.below(10)] = UNANSWERABLE
    return answers


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


# ---- contact sheets


def contact_sheet(path: Path, shown: list[Sample], *, columns: int = 6, zoom: int = 4) -> None:
    """Pictures, enlarged, with question and answer below each."""
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
