"""What the adapters of an evaluated model route by: embeddings of the questions' instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from ..config import SMoLoRAConfig
from ..data.format import Question
from ..instructions.encoder import InstructionEncoder
from ..instructions.texts import instruction_of, known_instructions
from ..io.embeddings import INSTRUCTION_FILE, read_instruction_embeddings
from .datasets import find_dataset
from .generate import Embed
from .tasks import Task

SOURCES = ("sample", "task_mean", "saved")


def embeds_of_texts(
    source: str,
    config: SMoLoRAConfig,
    questions: Mapping[str, Sequence[Question]],
    encoder: str | Path | None = None,
) -> dict[str, Embed]:
    """For each task of the benchmark what makes the instruction embeddings of its questions.

    Args:
        source: "sample", the instruction at each question's end; "task_mean", the mean over the different ones among a
            task's questions (the released multi-type).
        config: the adapter's.
        questions: of each task.
        encoder: folder of a sentence encoder; None for the packaged all-MiniLM-L6-v2.

    Raises:
        FileNotFoundError: there is no sentence encoder.
        ValueError: the embeddings are not of the adapter's size.
    """
    encoder = InstructionEncoder(encoder)
    check_size(encoder.dim, config, "the sentence encoder")
    embeds = {}
    for task, asked in questions.items():
        embeds[task] = partial(_of_each, encoder, known_instructions(task))
        if source == "task_mean":
            different = {instruction_of(question.text, known_instructions(task)) for question in asked}
            embeds[task] = _constant(encoder.encode(sorted(different)).mean(0))
    return embeds


def saved_embeds(config: SMoLoRAConfig, adapter: str | Path, tasks: Sequence[Task]) -> dict[str, Embed]:
    """For each task the row that is saved with the adapter for its dataset, as released.

    Args:
        config: the adapter's.
        adapter: its folder, with `instruction_embeddings.safetensors`.
        tasks: which ones.

    Raises:
        FileNotFoundError: the adapter's folder has no embeddings.
        ValueError: they are not of the adapter's size, or a task has no row.
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


def check_size(size: int, config: SMoLoRAConfig, source: str) -> None:
    """Whether embeddings fit an adapter.

    Raises:
        ValueError: they do not; the message has both sizes.
    """
    if size != config.instruction_dim:
        raise ValueError(
            f"{source} has embeddings of size {size}, the adapter's instruction_dim is {config.instruction_dim}"
        )


def _of_each(encoder: InstructionEncoder, templates: Sequence[str], texts: Sequence[str]) -> Tensor:
    return encoder.encode([instruction_of(text, templates) for text in texts])


def _constant(embedding: Tensor) -> Embed:
    return lambda texts: embedding.expand(len(texts), -1)
