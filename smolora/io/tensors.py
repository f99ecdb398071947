"""Verified checkpoint I/O: a file of tensors is read completely or refused, and written completely or not at all.

Safetensors files written here carry a SHA-256 of each tensor, and pickles carry a CRC-32 (see `pickles`). A safetensors
file of another writer has no checksums: its layout is verified, but a flipped bit among its values is not found.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import atomic_file, read_json_object, require_file
from .pickles import read_pickle

# Entries of the metadata: {tensor: digest} as JSON, with one digest for all other entries; and the writer, so that no
# single flipped bit makes a file with checksums pass for one without.
CHECKSUMS, OTHER_ENTRIES, WRITER = "sha256", "__metadata__", {"writer": "smolora"}
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
LONGEST_HEADER = 100 << 20  # bytes, as the safetensors library allows
ITEM_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


# ------------------------------------------------------------------------------------------------------------- writing


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Save tensors to a path that holds nothing yet: `.safetensors` as that format, other names with `torch.save`.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    try:
        if Path(path).suffix == ".safetensors":
            save_file(tensors, path, metadata)
        else:
            torch.save(tensors, path)
    except (SafetensorError, RuntimeError) as error:  # both libraries wrap the system's errors
        raise OSError(f"{path} cannot be written: {error}") from error


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes."""
    value = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    value.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return value.hexdigest()


def _metadata_digest(metadata: Mapping[str, str]) -> str:
    entries = sorted((name, value) for name, value in metadata.items() if name != CHECKSUMS)
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically, with a checksum of each tensor in its metadata.

    Args:
        path: the file; an existing one is replaced once the new one is on disk.
        tensors: dense tensors by name.
        metadata: further entries, each a string.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", **WRITER, **(metadata or {})}
    checksums = {name: digest(tensor) for name, tensor in tensors.items()} | {OTHER_ENTRIES: _metadata_digest(metadata)}
    with atomic_file(path) as temporary:
        save_tensors(temporary, tensors, {**metadata, CHECKSUMS: json.dumps(checksums, sort_keys=True)})


def add_checksums(path: str | os.PathLike) -> None:
    """Rewrite a safetensors file with checksums, atomically, unless it has them."""
    tensors, metadata = read_tensors(path)
    if CHECKSUMS not in metadata:
        write_tensors(path, tensors, metadata)


# ------------------------------------------------------------------------------------------------------------- reading


def read_tensors(path: str | os.PathLike, entry: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read and verify a safetensors file or a pickle of tensors.

    The tensors are mapped into memory: pages are loaded when they are used. Do not write to them.

    Args:
        path: `*.safetensors`, or a file of `torch.save` under any other name, read with `weights_only=True`.
        entry: where the tensors are in a pickle that has such an entry, as training programs write them beside the
            optimiser's state.

    Returns:
        The tensors by name, and the safetensors metadata (empty for a pickle).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short, its values differ from what was written, or it holds more than tensors. The
            message names the tensor where one is at fault.
    """
    path = Path(path)
    require_file(path)
    if path.suffix != ".safetensors":
        return read_pickle(path, entry), {}
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is broken or no safetensors file{_describe_first_fault(path)}: {error}") from error
    _verify_checksums(path, tensors, metadata)
    return tensors, metadata


def _describe_first_fault(path: Path) -> str:
    """Describe the first tensor of a safetensors file whose bytes do not fit the header, for an error message."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, LONGEST_HEADER)))
        header.pop("__metadata__", None)
        expected_start, space = 0, path.stat().st_size - 8 - length
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            item_size = ITEM_SIZES.get(entry["dtype"], 1)
            wrong_size = item_size > 1 and end - start != item_size * math.prod(entry["shape"])
            if start != expected_start or end > space or wrong_size:
                return f" at {name!r} ({entry['dtype']} {entry['shape']}, bytes {start} to {end} of {space})"
            expected_start = end
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        pass  # the header itself is broken
    return ""


def _verify_checksums(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    if CHECKSUMS not in metadata:
        if metadata.items() >= WRITER.items():
            raise ValueError(f"{path} is broken: smolora wrote it, and its checksums are gone")
        return
    try:
        checksums = dict(json.loads(metadata[CHECKSUMS]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is broken: its checksums cannot be read ({error})") from error
    if checksums.pop(OTHER_ENTRIES, None) != _metadata_digest(metadata):
        raise ValueError(f"{path} is broken: its metadata are not those that were written")
    unmatched = sorted(checksums.keys() ^ tensors.keys())
    if unmatched:
        raise ValueError(f"{path} is broken: tensors and checksums do not match, see {unmatched[0]!r}")
    for name, tensor in tensors.items():
        if digest(tensor) != checksums[name]:
            raise ValueError(f"{path} is broken: the values of {name!r} are not those that were written")


def read_model(folder: str | os.PathLike, argument: str = "folder") -> dict[str, Tensor]:
    """Read a model's weights as transformers saves them: one file, or shards with an index; safetensors or pickles.

    Args:
        folder: holds `model.safetensors`, `pytorch_model.bin` or the index of either, tried in transformers' order.
        argument: the argument's name in errors.

    Returns:
        All tensors by name, mapped into memory.

    Raises:
        FileNotFoundError: there are no weights, or a shard is missing.
        ValueError: a file is broken, two shards have a tensor of the same name, or a shard lacks a tensor of the index.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{argument} must be a folder, got {folder}")
    name = next((name for name in MODEL_FILES if (folder / name).exists()), None)
    if name is None:
        raise FileNotFoundError(f"{argument} must hold one of {', '.join(MODEL_FILES)}; {folder} has none")
    if name.endswith(".index.json"):
        return _read_shards(folder / name)
    return read_tensors(folder / name)[0]


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{index} must map tensors to files under 'weight_map', got {places!r:.80}")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index} must name files beside it, got {shard!r}")
        path = index.parent / shard
        wanted = [tensor for tensor, place in places.items() if place == shard]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, with {len(wanted)} tensors ({wanted[0]!r}, ...)")
        found = read_tensors(path)[0]
        for tensor in wanted:
            if tensor not in found:
                raise ValueError(f"{path} lacks {tensor!r}, which {index.name} says is in it")
        for tensor in found:
            if tensor in tensors:
                raise ValueError(f"{path} has {tensor!r}, which another shard has too")
        tensors.update(found)
    return tensors
