"""Questions to ask: a test set's, with another instruction, or about a picture of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..data.format import Question, read_questions
from ..data.images import BrokenImageError, read_image
from ..evaluate.benchmarks import find_dataset
from ..evaluate.datasets import Files
from ..evaluate.rules import Item, Rule
from ..instructions.texts import instruction_of, known_instructions
from ..recipe import Recipe, TaskRecipe

MOST_BYTES = 10 * 2**20  # of an uploaded picture
MOST_PIXELS = 40_000_000
MOST_CHARACTERS = 4000  # of a question with its instruction
NO_REFERENCE = Item("", "", ())


class UploadError(ValueError):
    """Raised for a picture that is not taken; the message is a sentence for the person who sent it."""


class Query(NamedTuple):
    """A question as the models get it."""

    task: str  # whose settings are used
    text: str
    image: Path | None
    item: Item | None  # what scoring knows of it; None unless it is a test set's question as it stands


class TaskQuestions:
    """The questions of a recipe's task.

    Raises:
        ValueError: a file is missing or malformed.
    """

    def __init__(self, recipe: Recipe, task: TaskRecipe) -> None:
        self.recipe, self.task = recipe, task
        self.images = recipe.images(task)
        self.questions = read_questions(recipe.test_file(task), broken=[])
        self.dataset = find_dataset(task.benchmark_name, recipe.evaluation.protocol)
        self.instructions = instructions_of(task)
        self._items: dict[str, Item] | None = None

    def image(self, question: Question) -> Path | None:
        """The picture of a question."""
        return None if question.image is None else self.images / question.image

    def item(self, question: Question) -> Item | None:
        """What scoring knows of a question; None if it does not score it."""
        if self._items is None:
            files = Files(self.recipe.annotations(self.task), self.task.benchmark_name)
            name = self.recipe.test_file(self.task).name
            self._items = {item.question_id: item for item in self.dataset.load(files, name)}
        return self._items.get(str(question.question_id))

    def split(self, question: Question) -> tuple[str, str]:
        """The text of a question, divided into what is asked and the instruction that it ends with."""
        instruction = instruction_of(question.text, self.instructions)
        text = question.text.strip()
        if not text.endswith(instruction):  # with other line ends than the instruction's
            return "", text
        return text.removesuffix(instruction).strip(), instruction

    def query(self, question: Question, asked: str, instruction: str) -> Query:
        """A question as it stands, or asked otherwise.

        Args:
            question: the question whose picture is used.
            asked, instruction: the two parts of `split`, or others.

        Raises:
            ValueError: the text is empty or too long.
        """
        image = self.image(question)
        if (asked.strip(), instruction.strip()) == self.split(question):
            return Query(self.task.name, question.text, image, self.item(question))
        return Query(self.task.name, compose(asked, instruction), image, None)


def instructions_of(task: TaskRecipe) -> tuple[str, ...]:
    """The instructions of a task: the recipe's, or the benchmark's."""
    return tuple(task.instructions) or known_instructions(task.benchmark_name)


def compose(asked: str, instruction: str) -> str:
    """Put a question and its instruction together as the benchmark does, each from a new line.

    Raises:
        ValueError: both are empty, or they are too long.
    """
    text = "\n".join(part.strip() for part in (asked, instruction) if part.strip())
    if not text:
        raise ValueError("There is nothing to answer: write a question or an instruction.")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"Question and instruction may have {MOST_CHARACTERS:,} characters, these have {len(text):,}.")
    return text


def form_rule(recipe: Recipe, task: TaskRecipe, text: str) -> Rule | None:
    """The rule for the form that a text's instruction asks for; None if nothing says what that is.

    It is that of the task if the instruction is one of its own, else of the first task that has it.
    """
    for other in (task, *recipe.all_tasks):
        known = instructions_of(other)
        if instruction_of(text, known) in known:
            protocol = recipe.evaluation.protocol
            return find_dataset(other.benchmark_name, protocol).scoring(protocol).follows_format
    return None


def known_to(recipes: Sequence[Recipe]) -> list[str]:
    """All instructions of recipes' tasks, each once."""
    tasks = [task for recipe in recipes for task in recipe.all_tasks]
    return list(dict.fromkeys(text for task in tasks for text in instructions_of(task)))


def check_upload(path: Path) -> None:
    """Check an uploaded picture before it is decoded.

    Raises:
        UploadError: it is too large, or no picture.
    """
    name, size = path.name, path.stat().st_size
    if size > MOST_BYTES:
        raise UploadError(f"{name} has {size / 2**20:.1f} MiB; a picture may have {MOST_BYTES / 2**20:.0f}.")
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Exception as error:  # a decoder may raise anything for a broken file
        raise UploadError(f"{name} is no picture that can be read.") from error
    if width * height > MOST_PIXELS:
        raise UploadError(f"{name} has {width} x {height} pixels; a picture may have {MOST_PIXELS:,} in all.")
    try:
        read_image(path)
    except BrokenImageError as error:
        raise UploadError(f"{name} cannot be decoded: it is damaged, or of an unusual kind.") from error
