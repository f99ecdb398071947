"""Embeddings of the instructions in a task's prompts, which route the instruction-following experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..config import SMoLoRAConfig, TaskConfig
from ..data.format import Question
from ..instructions.encoder import InstructionEncoder
from ..instructions.texts import instruction_of, known_instructions, marked_instruction
from ..io.embeddings import INSTRUCTION_FILE, read_instruction_embeddings
from .benchmarks import find_dataset
from .generate import Embed
from .tasks import Task

if TYPE_CHECKING:  # needs the extra [eval]; an evaluation by options does not
    from ..recipe import Recipe

SOURCES = ("sample", "task_mean", "saved")


class TaskInstructions:
    """Embeds the instructions of one task's prompts, in training and in evaluation.

    Each prompt gets the embedding of its own instruction, or all get the mean of the task's: the released multi-type
    setting averages the task's five instructions, however often each occurs. A recipe lists them. Without a list, the
    distinct ones among the task's questions stand for them.

    Args:
        encoder: the sentence encoder.
        templates: known instructions, to find the one that a prompt ends with; see `instruction_of`.
        mean_of: instructions whose mean every prompt gets; None for each prompt's own.
        where: what of a prompt is its instruction, see `InstructionRecipe`. "system" is for prompts that are system
            messages.
    """

    def __init__(
        self,
        encoder: InstructionEncoder,
        templates: Sequence[str],
        mean_of: Sequence[str] | None = None,
        where: str = "last_line",
    ) -> None:
        self.encoder, self.templates, self.mean_of, self.where = encoder, templates, mean_of, where

    def table(self, prompts: Sequence[str]) -> tuple[Tensor, list[int]]:
        """The distinct embeddings of prompts, (rows, e), and each prompt's row."""
        if self.mean_of is not None:
            return self.encoder.encode(self.mean_of).mean(0, keepdim=True), [0] * len(prompts)
        found = [self._found(prompt) for prompt in prompts]
        rows = {text: row for row, text in enumerate(dict.fromkeys(found))}
        return self.encoder.encode(list(rows)), [rows[text] for text in found]

    def _found(self, prompt: str) -> str:
        """The instruction of a prompt."""
        if self.where == "last_line":
            return instruction_of(prompt, self.templates)
        return marked_instruction(prompt) if self.where == "marked" else prompt.strip()

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """The embedding of each prompt, (n, e)."""
        table, rows = self.table(prompts)
        return table[rows]


class QuestionTexts:
    """Embeds the whole question of each prompt, by which a selector finds its task.

    Args:
        encoder: the sentence encoder.
    """

    def __init__(self, encoder: InstructionEncoder) -> None:
        self.encoder = encoder

    def table(self, prompts: Sequence[str]) -> tuple[Tensor, list[int]]:
        """The distinct embeddings of prompts, (rows, e), and each prompt's row."""
        rows = {text: row for row, text in enumerate(dict.fromkeys(prompts))}
        return self.encoder.encode(list(rows)), [rows[text] for text in prompts]

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """The embedding of each prompt, (n, e)."""
        table, rows = self.table(prompts)
        return table[rows]


def whole_questions(config: TaskConfig, tasks: Sequence[Task], encoder: str | Path | None = None) -> dict[str, Embed]:
    """For each task the embeddings of its whole questions, for an adapter with a `TaskSelector`.

    Args:
        config: configuration of the adapter.
        tasks: the test sets.
        encoder: folder of a sentence encoder; None for the packaged all-MiniLM-L6-v2.

    Raises:
        FileNotFoundError: there is no sentence encoder.
        ValueError: the embeddings do not have the adapter's size.
    """
    texts = QuestionTexts(InstructionEncoder(encoder))
    check_size(texts.encoder.dim, config, "the sentence encoder")
    return {task.name: texts for task in tasks}


def recipe_questions(recipe: Recipe) -> dict[str, QuestionTexts]:
    """For each task of a recipe the embeddings of its whole questions.

    Raises:
        FileNotFoundError: there is no sentence encoder.
    """
    settings = recipe.instructions
    texts = QuestionTexts(InstructionEncoder(settings.encoder, normalize=settings.normalize, device="cpu"))
    return {task.name: texts for task in recipe.all_tasks}


def recipe_instructions(recipe: Recipe) -> dict[str, TaskInstructions]:
    """For each task of a recipe the embeddings that its `instructions` section asks for.

    Raises:
        FileNotFoundError: there is no sentence encoder.
    """
    settings = recipe.instructions
    known = (text for task in recipe.all_tasks for text in task.instructions or known_instructions(task.benchmark_name))
    encoder = InstructionEncoder(
        settings.encoder, normalize=settings.normalize, templates=dict.fromkeys(known), device="cpu"
    )
    mean = settings.embed == "task_mean"
    return {
        task.name: TaskInstructions(encoder, encoder.templates, task.instructions if mean else None, settings.where)
        for task in recipe.all_tasks
    }


def question_instructions(
    source: str,
    config: SMoLoRAConfig,
    questions: Mapping[str, Sequence[Question]],
    encoder: str | Path | None = None,
) -> dict[str, TaskInstructions]:
    """For each task of the benchmark the embeddings of its questions' instructions.

    Args:
        source: "sample" or "task_mean", see `TaskInstructions`.
        config: configuration of the adapter.
        questions: the questions of each task.
        encoder: folder of a sentence encoder; None for the packaged all-MiniLM-L6-v2.

    Raises:
        FileNotFoundError: there is no sentence encoder.
        ValueError: the embeddings do not have the adapter's size.
    """
    model = InstructionEncoder(encoder)
    check_size(model.dim, config, "the sentence encoder")
    embeds = {}
    for task, asked in questions.items():
        templates, mean_of = known_instructions(task), None
        if source == "task_mean":
            mean_of = sorted({instruction_of(question.text, templates) for question in asked})
        embeds[task] = TaskInstructions(model, templates, mean_of)
    return embeds


def saved_instructions(config: SMoLoRAConfig, adapter: str | Path, tasks: Sequence[Task]) -> dict[str, Embed]:
    """For each task the row that is saved with the adapter for its dataset, as released.

    Args:
        config: configuration of the adapter.
        adapter: its folder, with `instruction_embeddings.safetensors`.
        tasks: the test sets.

    Raises:
        FileNotFoundError: the adapter's folder has no embeddings.
        ValueError: they do not have the adapter's size, or a task has no row.
    """
    path = Path(adapter) / INSTRUCTION_FILE
    embeddings, _ = read_instruction_embeddings(path)
    check_size(embeddings.shape[1], config, str(path))
    embeds = {}
    for task in tasks:
        row = find_dataset(task.dataset).instruction_row
        if row is None or row >= len(embeddings):
            raise ValueError(f"{task.name} needs row {row} of {path}, which has {len(embeddings)}")
        embeds[task.name] = _constant(embeddings[row])
    return embeds


def check_size(size: int, config: SMoLoRAConfig | TaskConfig, source: str) -> None:
    """Check that embeddings fit an adapter.

    Raises:
        ValueError: they do not. The message has both sizes.
    """
    if size != config.instruction_dim:
        raise ValueError(
            f"{source} has embeddings of size {size}, the adapter's instruction_dim is {config.instruction_dim}"
        )


def _constant(embedding: Tensor) -> Embed:
    return lambda prompts: embedding.expand(len(prompts), -1)
