"""What the adapters of an evaluated model route by: embeddings of the questions' instructions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft import PeftConfig
from torch import Tensor

from ..config import INSTRUCTION_FILE, SMoLoRAConfig
from .datasets import DATASETS
from .generate import Embed


def instruction_embeds(config: PeftConfig, adapter: str | Path, tasks: Sequence[str]) -> dict[str, Embed] | None:
    """For each task what makes the instruction embeddings of its questions; None for adapters that take none.

    Args:
        config: the adapter's.
        adapter: its folder, with `instruction_embeddings.safetensors`.
        tasks: names of `DATASETS`.

    Raises:
        ValueError: the folder has no embeddings, or a task has no row in them.
    """
    if not isinstance(config, SMoLoRAConfig):
        return None
    config.load_instruction_embeddings(Path(adapter) / INSTRUCTION_FILE)
    return {task: _row(config.instruction_embeddings, task, adapter) for task in tasks}


def _row(embeddings: Tensor, task: str, adapter: str | Path) -> Embed:
    row = DATASETS[task].instruction_row
    if row is None or row >= len(embeddings):
        raise ValueError(f"{task} needs row {row} of the {len(embeddings)} instruction embeddings saved with {adapter}")
    return lambda texts: embeddings[row].expand(len(texts), -1)
