"""Test sets answered and scored, one after the other: what `smolora evaluate` does.

OUTPUT/answers/TextVQA.jsonl ...    what `smolora.evaluate.generate` writes for each task
OUTPUT/scores.json                  {"TextVQA": {what `smolora score --json` prints}, ...}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import PartialState
from torch import nn

from ..data.images import ImageTransform
from ..data.prompts import PromptEncoder
from ..io.files import locked, read_text, write_json
from .datasets import Files, find_dataset
from .generate import Embed, GenerationSettings, Job, generate_answers, read_whole_questions
from .score import Score, score

PADDINGS = ("all", "released")


@dataclass(frozen=True)
class Task:
    """A test set, and where its files are.

    Args:
        name: of its answers file and its scores.
        dataset: a name of `DATASETS`, which says how it is scored.
        questions: its question file, named as the dataset has it.
        images: folder that the records' image paths start in.
        annotations: folders with what scoring needs, the question file among it.

    Raises:
        ValueError: there is no such dataset, or the question file is not there or has another name.
    """

    name: str
    dataset: str
    questions: Path
    images: Path
    annotations: Sequence[Path]

    def __post_init__(self) -> None:
        expected = find_dataset(self.dataset).questions
        if self.questions.name != expected:
            raise ValueError(
                f"{self.name}: the questions of {self.dataset} must be in a file named {expected}, by which they are "
                f"scored, got {self.questions}"
            )
        if not self.questions.is_file():
            raise ValueError(f"{self.name}: there is no question file {self.questions}")

    @classmethod
    def of_benchmark(cls, dataset: str, annotations: Sequence[Path], images: Path) -> Task:
        """The benchmark's own task of a dataset, its files looked for in folders (see `Files`)."""
        questions = Files(annotations, dataset).find(find_dataset(dataset).questions)
        return cls(dataset, dataset, questions, images, annotations)


def check_tasks(tasks: Sequence[Task], protocol: str, *, skip_broken: bool = False) -> None:
    """Whether all that asking and scoring needs is there and whole: before a model is loaded and anything answered.

    Raises:
        ValueError: a file is missing, a record is malformed or its image missing (unless `skip_broken`), or there is no
            such protocol.
    """
    for task in tasks:
        spec = find_dataset(task.dataset)
        spec.scoring(protocol)
        _, skipped = read_whole_questions(task.questions, task.images, skip_broken=skip_broken)
        spec.load(Files(task.annotations, task.dataset, {record.index for record in skipped}), spec.questions)


def evaluate_tasks(
    model: nn.Module,
    encoder: PromptEncoder,
    transform: ImageTransform,
    tasks: Sequence[Task],
    *,
    output: Path,
    model_id: str,
    embed: Mapping[str, Embed] | None = None,
    instructions: str | None = None,
    settings: GenerationSettings | None = None,
    max_new_tokens: int | None = None,
    padding: str = "all",
    protocol: str = "smolora",
) -> dict[str, Score]:
    """Answer and score test sets. Started again, it goes on where it was stopped; see `generate_answers`.

    Args:
        model: a LLaVA, with adapters or without, in eval mode and on its device.
        encoder: makes its prompts.
        transform: makes its images.
        tasks: what to ask, each with a name of its own.
        output: folder for answers and scores.
        model_id: the model's name in the answers.
        embed: by a task's name what makes instruction embeddings of its questions, for a model that takes them.
        instructions: what `embed` makes them of: answers by others are not taken for these.
        settings: of the generation.
        max_new_tokens: of every answer; by default the released number of each dataset.
        padding: "all" pads every image to a square, as in training; "released" leaves that out for the four datasets
            that the released evaluation does not pad.
        protocol: of the scores.

    Returns:
        Scores by task; the same on every process.

    Raises:
        ValueError: a file or an argument is wrong (see `check_tasks`), or two tasks have one name.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(map(repr, PADDINGS))}, got {padding!r}")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks must have different names, got {names}")
    settings = settings or GenerationSettings()
    scores = {}
    for task in tasks:
        spec = find_dataset(task.dataset)
        answers = output / "answers" / f"{task.name}.jsonl"
        generate_answers(
            model, encoder,
            ImageTransform(transform.processor, square=padding == "all" or spec.released_square),
            Job(task.dataset, task.questions, task.images, answers, model_id, instructions),
            embed=embed and embed[task.name],
            settings=replace(settings, max_new_tokens=max_new_tokens or spec.max_new_tokens),
        )  # fmt: skip
        scores[task.name] = score(task.dataset, task.annotations, answers, protocol)
    if PartialState().is_main_process:
        path = output / "scores.json"
        with locked(output / "scores.json.lock", str(path), wait=True):  # another may add other tasks at this moment
            content = json.loads(read_text(path)) if path.exists() else {}  # of other tasks, asked before
            content.update((name, result.as_dict()) for name, result in scores.items())
            write_json(path, content)
    return scores
