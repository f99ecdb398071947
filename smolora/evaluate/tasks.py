"""Test sets answered and scored one after the other, by `smolora evaluate` and after each training stage.

OUTPUT/answers/TextVQA.jsonl ...    the files of `smolora.evaluate.generate` for each task
OUTPUT/scores.json                  {"TextVQA": {the output of `smolora score --json`}, ...}
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import PartialState
from torch import nn

from ..backbones.base import Backbone
from ..io.files import locked, read_text, write_json
from .benchmarks import find_dataset, question_files
from .datasets import Files
from .generate import AnswerJob, Embed, GenerationSettings, generate_answers, read_answerable_questions
from .score import Score, score

if TYPE_CHECKING:  # needs the extra [eval]; an evaluation by options does not
    from ..recipe import Recipe, TaskRecipe

PADDINGS = ("all", "released")


@dataclass(frozen=True)
class Task:
    """A test set and its files.

    Args:
        name: names its answers file and its score.
        dataset: a name of `datasets_of()`, which decides how it is scored.
        questions: its question file, with the file name that the dataset has.
        images: folder that the records' image paths are relative to.
        annotations: folders with the files for scoring, the question file among them.
        task_id: the task that the model is told its questions are of; None for a model that is not told.

    Raises:
        ValueError: there is no such dataset, or the question file is missing or has another name.
    """

    name: str
    dataset: str
    questions: Path
    images: Path
    annotations: Sequence[Path]
    task_id: int | None = None

    def __post_init__(self) -> None:
        self.check_file_name(question_files(self.dataset))
        if not self.questions.is_file():
            raise ValueError(f"{self.name}: there is no question file {self.questions}")

    def check_file_name(self, expected: Collection[str] | None) -> None:
        """Check the name of the question file, which scoring looks for; None for any.

        Raises:
            ValueError: it has another name.
        """
        if expected is not None and self.questions.name not in expected:
            names = " or ".join(sorted(expected))
            raise ValueError(
                f"{self.name}: the questions of {self.dataset} must be in a file named {names}, by which they are "
                f"scored, got {self.questions}"
            )

    @classmethod
    def from_recipe(cls, recipe: Recipe, task: TaskRecipe, task_id: int | None = None) -> Task:
        """The test set of a recipe's task."""
        files = recipe.test_file(task), recipe.images(task), recipe.annotations(task)
        return cls(task.name, task.benchmark_name, *files, task_id)

    @classmethod
    def of_benchmark(cls, dataset: str, annotations: Sequence[Path], images: Path, protocol: str = "smolora") -> Task:
        """A benchmark's own test set of a dataset, with its files looked up in folders (see `Files`).

        CoIN's is taken for the protocol "coin".
        """
        files = Files(annotations, dataset)
        questions = files.find(find_dataset(dataset, protocol).questions_in(files))
        return cls(dataset, dataset, questions, images, annotations)


def check_tasks(tasks: Sequence[Task], protocol: str, *, skip_broken: bool = False) -> None:
    """Check the files for answering and scoring before a model is loaded.

    Raises:
        ValueError: a file is missing, a record is malformed or lacks its image (unless `skip_broken`), there is no such
            protocol, or it does not score a task's dataset.
    """
    for task in tasks:
        spec = find_dataset(task.dataset, protocol)
        task.check_file_name(spec.question_files)
        _, skipped = read_answerable_questions(task.questions, task.images, skip_broken=skip_broken)
        spec.load(Files(task.annotations, task.dataset, {record.index for record in skipped}), task.questions.name)


def evaluate_tasks(
    model: nn.Module,
    backbone: Backbone,
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
    on_score: Callable[[str, Score, float], None] | None = None,
) -> dict[str, Score]:
    """Answer and score test sets. A second call continues where the first one was stopped; see `generate_answers`.

    Args:
        model: a model, with or without adapters, in eval mode and on its device.
        backbone: makes its prompts and images.
        tasks: the test sets, each with a name of its own.
        output: folder for answers and scores.
        model_id: name of the model in the answers.
        embed: for each task name the function that embeds its instructions, for a model that takes them.
        instructions: where the embeddings come from. Answers made with others are not continued.
        settings: generation settings. Their `max_new_tokens` is replaced.
        max_new_tokens: maximum length of every answer; None for the released limit of each dataset.
        padding: "all" pads every image to a square, as in training. "released" does not for the datasets that the
            released evaluation does not pad: four of CVIT's, all of CoIN's.
        protocol: protocol of the scores.
        on_score: called on the main process with each task's name, score and seconds. By default, the score is added to
            scores.json of `output`, which other processes may write at the same time.

    Returns:
        Scores by task, the same on every process.

    Raises:
        ValueError: a file or an argument is wrong (see `check_tasks`), or two tasks have the same name.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(map(repr, PADDINGS))}, got {padding!r}")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks must have different names, got {names}")
    settings = settings or GenerationSettings()
    save = on_score or partial(_add_score, output / "scores.json")
    scores = {}
    for task in tasks:
        start = time.monotonic()
        dataset = find_dataset(task.dataset, protocol)
        answers = output / "answers" / f"{task.name}.jsonl"
        generate_answers(
            model,
            backbone if padding == "all" or dataset.released_square else backbone.cropping(),
            AnswerJob(task.dataset, task.questions, task.images, answers, model_id, instructions, task.task_id),
            embed=None if embed is None else embed[task.name],
            settings=replace(settings, max_new_tokens=max_new_tokens or dataset.max_new_tokens),
        )
        result = scores[task.name] = score(task.dataset, task.annotations, answers, protocol, task.questions.name)
        if PartialState().is_main_process:
            save(task.name, result, time.monotonic() - start)
    return scores


def _add_score(path: Path, name: str, result: Score, seconds: float) -> None:
    """Add a task's score to those in a file."""
    with locked(path.with_name(f"{path.name}.lock"), str(path), wait=True):
        content = json.loads(read_text(path)) if path.exists() else {}
        write_json(path, {**content, name: result.as_dict()})
