"""Files of instruction embeddings: a row for each instruction, and its text."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .tensors import read_tensors, write_tensors

INSTRUCTION_FILE = "instruction_embeddings.safetensors"  # beside an adapter's files
INSTRUCTION_KEY = "embeddings"  # its tensor, (rows, instruction_dim)


def write_instruction_embeddings(
    path: str | os.PathLike, embeddings: Tensor, texts: Sequence[str | list[str] | None]
) -> None:
    """Write embeddings and their texts to one safetensors file.

    Args:
        path: the file, or an existing folder (an adapter's), where `instruction_embeddings.safetensors` is written.
        embeddings: (rows, e), floating point.
        texts: for each row its text, a list of texts if the row is their mean, or None if it is unknown.

    Raises:
        ValueError: `path` is neither; the embeddings are not rows of finite numbers; or there are not as many texts.
    """
    path = Path(path)
    if not path.is_dir() and path.suffix != ".safetensors":
        raise ValueError(f"path must be a .safetensors file or an existing folder, got {path}")
    if embeddings.dim() != 2 or not embeddings.numel() or not embeddings.is_floating_point():
        raise ValueError(
            f"embeddings must be floating point of shape (rows, e), got {embeddings.dtype} of {tuple(embeddings.shape)}"
        )
    if not torch.isfinite(embeddings).all():
        raise ValueError("embeddings must be finite, got a NaN or an infinity")
    if len(texts) != len(embeddings):
        raise ValueError(f"texts must be one for each of the {len(embeddings)} embeddings, got {len(texts)}")
    metadata = {"texts": json.dumps(list(texts), ensure_ascii=False)}
    write_tensors(path / INSTRUCTION_FILE if path.is_dir() else path, {INSTRUCTION_KEY: embeddings}, metadata)


def read_instruction_embeddings(path: str | os.PathLike) -> tuple[Tensor, list[str | list[str] | None]]:
    """Read a file of `write_instruction_embeddings`.

    Returns:
        The embeddings (rows, e), and for each row its text, a list of texts, or None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, or holds something else.
    """
    path = Path(path)
    path = path / INSTRUCTION_FILE if path.is_dir() else path
    tensors, metadata = read_tensors(path)
    embeddings = tensors.get(INSTRUCTION_KEY)
    if embeddings is None or len(tensors) > 1 or embeddings.dim() != 2 or not embeddings.is_floating_point():
        found = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
        raise ValueError(f"{path} must hold floating point rows named {INSTRUCTION_KEY!r} alone, got {found}")
    if not torch.isfinite(embeddings).all():
        raise ValueError(f"{path}: {INSTRUCTION_KEY!r} must be finite, got a NaN or an infinity")
    try:
        texts = json.loads(metadata.get("texts", "null"))
    except ValueError as error:
        raise ValueError(f"{path} is broken: its texts cannot be read ({error})") from error
    texts = [None] * len(embeddings) if texts is None else texts
    if not isinstance(texts, list) or len(texts) != len(embeddings):
        raise ValueError(f"{path} must hold a text for each of its {len(embeddings)} rows, got {texts!r:.80}")
    return embeddings.clone(), texts
