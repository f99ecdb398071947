"""The files of a benchmark in small: training and test sets in the released formats, pictures, annotations.

    <instructions>/<task>/           train.json, and test.json or val.json
    annotations/<task>/              further files for scoring: problems.json, TextVQA_0.5.1_val.json, ...
    images/<task>/<split>/           PNG files; the records' paths start in images/
    contact_sheets/<task>.png        pictures with their questions and answers, for people (not part of the data)

All files but the contact sheets have the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from ..instructions.texts import IMAGE_TOKEN
from ..io.files import atomic_write_text, locked, read_text
from ..io.progress import progress
from . import scenes
from .drawing import Canvas, png
from .scenes import PLACES, StableRandom

SHOTS = (5, 10)  # of Places365
UNANSWERABLE = "unanswerable"


class DrawnSample(NamedTuple):
    """A question, about a picture or about none, without its instruction."""

    question: str  # empty where the instruction is the question
    answer: str
    canvas: Canvas | None
    references: tuple[str, ...] = ()  # of captions: five, of which `answer` is one
    choices: tuple[str, ...] = ()
    kind: str = ""  # GQA's type: "query" or "verify"
    more: Mapping[str, Any] = {}  # further keys of its record in a test file


class TaskSpec(NamedTuple):
    """How a task draws a sample, and the number of samples in its files."""

    draw: Callable[[StableRandom, bool], DrawnSample]
    test_file: str
    train: int = 0
    test: int = 100


class Benchmark(NamedTuple):
    """A benchmark in small.

    Attributes:
        name: its name.
        seed: version of its data, from which all of it is drawn.
        tasks: its tasks by name.
        settings: each folder of instructions with each task's wordings.
        numbered: training records have an `id`, as CoIN's do.
    """

    name: str
    seed: str
    tasks: Mapping[str, TaskSpec]
    settings: Mapping[str, Mapping[str, tuple[str, ...]]]
    numbered: bool = False

    def training_files(self, task: str) -> dict[str, int]:
        """Return a task's training files, each with its number of samples."""
        if task == "Places365":
            return {f"train_{shots}shot.json": shots * len(PLACES) for shots in SHOTS}
        return {"train.json": self.tasks[task].train} if self.tasks[task].train else {}

    def samples(self, task: str, split: str, count: int) -> Iterator[tuple[DrawnSample, StableRandom]]:
        """Draw the samples of a split ("train" or "test"), each with its generator for further choices."""
        for index in range(count):
            rng = StableRandom(f"{self.seed}, {task}, {split}, {index}")
            yield self.tasks[task].draw(rng, split == "test"), rng

    def make(self, folder: str | Path, tasks: list[str] | None = None) -> Path:
        """Write the benchmark, except tasks that are complete already.

        Args:
            folder: the destination; the module's docstring has its layout.
            tasks: names of tasks to write; None for all.

        Returns:
            The folder.

        Raises:
            ValueError: there is no such task.
        """
        folder = Path(folder)
        wanted = list(self.tasks) if tasks is None else list(tasks)
        unknown = [name for name in wanted if name not in self.tasks]
        if unknown:
            raise ValueError(f"tasks must be among {', '.join(self.tasks)}, got {', '.join(unknown)}")
        if all(self.is_complete(folder, name) for name in wanted):
            return folder
        with locked(folder / ".lock", str(folder), wait=True):  # another run may be writing it
            missing = [name for name in wanted if not self.is_complete(folder, name)]
            for name in progress(missing, f"drawing {self.name}", len(missing), "task"):
                _write_task(self, folder, name)
        return folder

    def is_complete(self, folder: Path, task: str) -> bool:
        """Return whether a task's files are all there, in this version of the data."""
        path = folder / "annotations" / task / "digest.json"
        return path.is_file() and json.loads(read_text(path))["seed"] == self.seed


def _write_task(benchmark: Benchmark, folder: Path, name: str) -> None:
    task = benchmark.tasks[name]
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
        _write_shots(benchmark, put, image)
    elif task.train:
        drawn = [
            (s, image(s, "train", i), rng) for i, (s, rng) in enumerate(benchmark.samples(name, "train", task.train))
        ]
        for tree, instructions in benchmark.settings.items():
            records = [
                ({"id": f"{name}-{index}"} if benchmark.numbered else {})
                | _conversation(s, path, rng.choice(instructions[name]))
                for index, (s, path, rng) in enumerate(drawn)
            ]
            put(f"{tree}/{name}/train.json", _json(records))
    drawn = [(s, image(s, "test", i), rng) for i, (s, rng) in enumerate(benchmark.samples(name, "test", task.test))]
    ids = [_question_id(name, index) for index in range(task.test)]
    for tree, instructions in benchmark.settings.items():
        records = [
            _question(i, s, path, rng.choice(instructions[name])) for i, (s, path, rng) in zip(ids, drawn, strict=True)
        ]
        put(f"{tree}/{name}/{task.test_file}", _json(records))
    shown, images = [s for s, _, _ in drawn], [path for _, path, _ in drawn]
    for path, content in _annotations(benchmark.seed, name, ids, shown, images):
        put(f"annotations/{name}/{path}", _json(content))
    contact_sheet(folder / "contact_sheets" / f"{name}.png", shown[:24])
    # written last, as the mark of a complete task
    content = json.dumps({"seed": benchmark.seed, "sha256": digest.hexdigest()}) + "\n"
    atomic_write_text(folder / "annotations" / name / "digest.json", content)


def _write_shots(
    benchmark: Benchmark,
    put: Callable[[str, bytes], None],
    image: Callable[[DrawnSample, str, int], str | None],
) -> None:
    """Write Places365's training files: the 5 pictures of each class are among the 10."""
    drawn: list[tuple[int, str | None, StableRandom, DrawnSample]] = []
    for index in range(max(SHOTS) * len(PLACES)):
        shot, place = divmod(index, len(PLACES))
        rng = StableRandom(f"{benchmark.seed}, Places365, train, {index}")
        sample = DrawnSample("", PLACES[place], scenes.draw_place(PLACES[place], rng))
        drawn.append((shot, image(sample, "train", index), rng, sample))
    for tree, instructions in benchmark.settings.items():
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
    return record | {"text": _text(sample, instruction), "answer": answer} | dict(sample.more)


def _annotations(
    seed: str, task: str, ids: list[int | str], drawn: list[DrawnSample], images: list[str | None]
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
            {"question_id": i, "question": s.question, "answers": _ten(s.answer, f"{seed}, ten answers, {task} {i}")}
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
            {"question_id": i, "answers": [{"answer": a} for a in _ten(s.answer, f"{seed}, ten answers, {task} {i}")]}
            for i, s in zip(ids, drawn, strict=True)
        ]
        yield "v2_mscoco_val2014_annotations.json", {"annotations": records}
    elif task == "VizWiz":
        records = [
            {
                "image": str(path).rpartition("/")[2],
                "question": s.question,
                "answers": [{"answer": a} for a in _ten(s.answer, f"{seed}, ten answers, {task} {i}")],
            }
            for i, s, path in zip(ids, drawn, images, strict=True)
        ]
        yield "Annotations/val.json", records


def _ten(answer: str, where: str) -> list[str]:
    """Make ten people's answers; up to two of them are "unanswerable"."""
    rng = StableRandom(where)
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
            picture = Image.fromarray(sample.canvas.pixels)
            size = picture.width * zoom, picture.height * zoom
            sheet.paste(picture.resize(size, Image.Resampling.NEAREST), (x, y))
        said = [*sample.question.split("\n"), *(sample.references[:2] or [sample.answer])]
        lines = [part for line in said for part in textwrap.wrap(line, 31)]
        draw.multiline_text((x, y + side + 3), "\n".join(lines[:7]), (0, 0, 0), font, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
