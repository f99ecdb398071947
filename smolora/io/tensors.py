"""Tensor files that are either whole or refused: safetensors, PyTorch's pickles, shards of both.

What can be known of a file differs. A safetensors file says where each tensor lies and nothing about its values; those
written here carry a SHA-256 of each tensor besides. A pickle is a zip archive with a CRC-32 of each tensor, which
`torch.load` does not look at; it is compared here. A flipped bit among the values of any other safetensors file cannot
be found.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import atomic_file, read_text

# entries of a safetensors file's metadata: {tensor: digest} as JSON, with one digest for all other entries, and who
# wrote them, so that no single flipped bit makes a file with checksums pass for one without
CHECKSUMS, OTHER_ENTRIES, WRITER = "sha256", "__metadata__", {"writer": "smolora"}
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
MIB = 1 << 20
ZIP32_LIMIT = 0xFFFFFFFF  # sizes and offsets from here on are stored apart, in 8 bytes each


# ------------------------------------------------------------------------------------------------------------- writing


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Save tensors where nothing good can be lost: as safetensors if the name says so, else with `torch.save`.

    Raises:
        OSError: the file cannot be written, a full disk for one.
    """
    try:
        if Path(path).suffix == ".safetensors":
            save_file(tensors, path, metadata)
        else:
            torch.save(tensors, path)
    except (SafetensorError, RuntimeError) as error:  # what the libraries make of the system's errors
        raise OSError(f"{path} cannot be written: {error}") from error


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    value = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    value.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return value.hexdigest()


def _metadata_digest(metadata: Mapping[str, str]) -> str:
    entries = sorted((name, value) for name, value in metadata.items() if name != CHECKSUMS)
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file in one step, with a checksum of each tensor among its metadata.

    Args:
        path: the file; what is there is replaced once the new one is on disk.
        tensors: dense tensors by name.
        metadata: further entries, text each.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", **WRITER, **(metadata or {})}
    checksums = {name: digest(tensor) for name, tensor in tensors.items()} | {OTHER_ENTRIES: _metadata_digest(metadata)}
    with atomic_file(path) as temporary:
        save_tensors(temporary, tensors, {**metadata, CHECKSUMS: json.dumps(checksums, sort_keys=True)})


# ------------------------------------------------------------------------------------------------------------- reading


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a file, and is {'a folder' if path.is_dir() else 'not there'}")


def _cut_tensor(path: Path) -> str:
    """The first tensor of a safetensors file whose place in it is not as it must be, for an error message."""
    widths = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100 * MIB)))
        header.pop("__metadata__", None)
        at, space = 0, path.stat().st_size - 8 - length
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            width = widths.get(entry["dtype"], 1)
            if start != at or end > space or (width > 1 and end - start != width * math.prod(entry["shape"])):
                return f" at {name!r} ({entry['dtype']} {entry['shape']}, bytes {start} to {end} of {space})"
            at = end
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        pass  # the header itself is broken, so it names nothing
    return ""


def _open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors, mapped into memory, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is broken or no safetensors file{_cut_tensor(path)}: {error}") from error


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
    odd = sorted(checksums.keys() ^ tensors.keys())
    if odd:
        raise ValueError(f"{path} is broken: tensors and checksums do not match, see {odd[0]!r}")
    for name, tensor in tensors.items():
        if digest(tensor) != checksums[name]:
            raise ValueError(f"{path} is broken: the values of {name!r} are not those that were written")


def _tensor_of(path: Path, record: zipfile.ZipInfo, records: list[zipfile.ZipInfo]) -> str | None:
    """The tensor whose values a faulty record of a pickle's archive holds, told by its CRC, for an error message."""
    if record.filename.endswith("data.pkl"):  # the names themselves
        return None
    crcs = {r.CRC for r in records}
    try:
        for name, value in torch.load(path, weights_only=True, map_location="cpu", mmap=True).items():
            crc = zlib.crc32(torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).numpy())
            if crc == record.CRC or crc not in crcs:
                return name
    except Exception:  # whatever a broken archive may lead to: the error to report is the one that was found before
        pass
    return None


def _zip_fault(file: BinaryIO, record: zipfile.ZipInfo, start: int) -> tuple[str | None, int]:
    """Compare one record of an archive, uncompressed as PyTorch writes them, with what the archive says about it.

    Returns:
        What is wrong, and where the record ends.
    """
    file.seek(start)
    head = file.read(30)
    if record.header_offset != start or len(head) < 30:
        return "does not start where it should", start
    signature, version, flags, method, time, date, crc, packed, size, name, extra = struct.unpack("<4s5H3L2H", head)
    stored = file.read(name)
    padding = file.read(extra)
    values = start + 30 + name + extra
    year, month, day, hour, minute, second = record.date_time
    stamps = ((year - 1980) << 9 | month << 5 | day, hour << 11 | minute << 5 | second // 2)
    later = bool(flags & 8)  # sizes and CRC follow the values
    sizes = (0, 0, 0) if later else (record.CRC, record.compress_size, record.file_size)
    found = (signature, version, flags, method, date, time, crc, packed, size, stored)
    if found != (
        b"PK\3\4", record.extract_version, record.flag_bits, zipfile.ZIP_STORED, *stamps, *sizes,
        record.orig_filename.encode(),
    ):  # fmt: skip
        return "has a broken header", values
    # numbers beyond 4 GiB, then a field of Zs that aligns the values
    wide = [record.file_size, 0 if later else record.compress_size] if record.file_size >= ZIP32_LIMIT else []
    wide += [start] if start >= ZIP32_LIMIT else []
    numbers = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    letters = len(padding) - len(numbers) - 4
    if letters < 0 or padding != numbers + b"FB" + struct.pack("<H", letters) + b"Z" * letters:
        return "has broken padding", values
    left, found = record.file_size, 0
    while left:
        piece = file.read(min(left, 16 * MIB))
        if not piece:
            return "is cut short", values
        found = zlib.crc32(piece, found)
        left -= len(piece)
    end = values + record.file_size
    if found != record.CRC:
        return f"has CRC {found:08x} where {record.CRC:08x} was written", end
    if later:
        width = "Q" if wide else "L"
        summary = struct.pack(f"<4sL2{width}", b"PK\7\10", record.CRC, record.compress_size, record.file_size)
        end += len(summary)
        if file.read(len(summary)) != summary:
            return "has a broken summary", end
    return None, end


def _ends_well(file: BinaryIO, directory: int, size: int, records: int) -> bool:
    """Whether an archive ends as its directory, of so many records at that offset, asks for."""
    file.seek(size - 98)
    tail = file.read(98)
    expected = b""
    if tail.startswith(b"PK\6\6"):  # with what files beyond 4 GiB need; the writer's version is its own affair
        length = size - 98 - directory
        expected += struct.pack("<4sQ", b"PK\6\6", 44) + tail[12:14]
        expected += struct.pack("<H2L4Q", 45, 0, 0, records, records, length, directory)
        expected += struct.pack("<4sLQL", b"PK\6\7", 0, directory + length, 1)
    else:
        length = size - 22 - directory
        tail = tail[-22:]
    counts = (min(records, 0xFFFF),) * 2
    places = (min(length, ZIP32_LIMIT), min(directory, ZIP32_LIMIT))
    return tail == expected + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *counts, *places, 0)


def _verify_zip(path: Path) -> None:
    """Read a pickle's archive from end to end: every record lies where it should and has the CRC that was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = sorted(archive.infolist(), key=lambda record: record.header_offset)
            start_of_directory, comment = archive.start_dir, archive.comment
    # NotImplementedError is zipfile's for a version or compression it does not know: a broken directory names any
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is cut short, broken, or no file of torch.save (of PyTorch 1.6 or newer): {error}"
        ) from error
    # what the directory says of a record and nobody reads is the same for all records of one writer
    common = {
        (r.create_system, r.create_version, r.reserved, r.volume, r.internal_attr, r.external_attr, r.date_time,
         r.comment, r.compress_type)
        for r in records
    }  # fmt: skip
    if comment or len(common) != 1 or records[0].compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path} is broken: its directory is not one that torch.save writes")
    at = 0
    with open(path, "rb") as file:
        for record in records:
            fault, at = _zip_fault(file, record, at)
            if fault is not None:
                name = _tensor_of(path, record, records)
                raise ValueError(
                    f"{path} is broken: {f'{name!r} ({record.filename})' if name else record.filename} {fault}"
                )
        size = path.stat().st_size
        if at != start_of_directory or not _ends_well(file, start_of_directory, size, len(records)):
            raise ValueError(f"{path} is broken: its end is not one that torch.save writes")


def _open_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`, mapped into memory."""
    _verify_zip(path)
    try:
        loaded = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} is refused: a checkpoint must hold tensors alone, and this pickle asks for "
            f"{asked[1] if asked else 'something else'}, which could run code"
        ) from error
    except (RuntimeError, EOFError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is broken or no checkpoint: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors, got {type(loaded).__name__}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} must hold tensors by name, got {type(value).__name__} for {name!r}")
        if value.layout != torch.strided:
            raise ValueError(f"{path}: {name!r} must be a dense tensor, got {value.layout}")
    return {name: value.detach() for name, value in loaded.items()}


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file or a pickle of tensors, and verify all that can be verified of it.

    The tensors are mapped into memory: they take none of it until they are used, and must not be written to.

    Args:
        path: `*.safetensors`, or a file of `torch.save` of any other name, read with `weights_only=True`.

    Returns:
        The tensors by name, and the safetensors metadata (empty for a pickle).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short, its values are not those that were written, or it holds more than tensors;
            the message names the tensor where there is one.
    """
    path = Path(path)
    _require_file(path)
    if path.suffix != ".safetensors":
        return _open_pickle(path), {}
    tensors, metadata = _open_safetensors(path)
    _verify_checksums(path, tensors, metadata)
    return tensors, metadata


def add_checksums(path: str | os.PathLike) -> None:
    """Write a safetensors file again with checksums, in one step, if it has none."""
    tensors, metadata = read_tensors(path)
    if CHECKSUMS not in metadata:
        write_tensors(path, tensors, metadata)


def read_json(path: str | os.PathLike) -> dict:
    """Read a JSON file that holds an object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or no object.
    """
    path = Path(path)
    _require_file(path)
    try:
        value = json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is broken: no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_model(folder: str | os.PathLike, argument: str = "folder") -> dict[str, Tensor]:
    """Read a model's weights as transformers saves them: one file or shards with an index, safetensors or pickles.

    Args:
        folder: where `model.safetensors`, `pytorch_model.bin` or the index of either lies; they are looked for in
            transformers' order.
        argument: what an error calls it.

    Returns:
        All tensors by name, mapped into memory.

    Raises:
        FileNotFoundError: there are no weights, or a shard is missing.
        ValueError: a file is broken, two shards have a tensor of the same name, or one lacks what the index says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{argument} must be a folder, got {folder}")
    for name in MODEL_FILES:
        if not (folder / name).exists():
            continue
        if not name.endswith(".json"):
            return read_tensors(folder / name)[0]
        places = read_json(folder / name).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise ValueError(f"{folder / name} must map tensors to files under 'weight_map', got {places!r:.80}")
        tensors: dict[str, Tensor] = {}
        for shard in sorted(set(places.values())):
            if Path(shard).name != shard:
                raise ValueError(f"{folder / name} must name files beside it, got {shard!r}")
            wanted = [tensor for tensor, place in places.items() if place == shard]
            if not (folder / shard).is_file():
                raise FileNotFoundError(f"{folder / shard} is missing, with {len(wanted)} tensors ({wanted[0]!r}, ...)")
            found = read_tensors(folder / shard)[0]
            for tensor in wanted:
                if tensor not in found:
                    raise ValueError(f"{folder / shard} lacks {tensor!r}, which {name} says is in it")
            for tensor in found:
                if tensor in tensors:
                    raise ValueError(f"{folder / shard} has {tensor!r}, which another shard has too")
            tensors.update(found)
        return tensors
    raise FileNotFoundError(f"{argument} must hold one of {', '.join(MODEL_FILES)}; {folder} has none")


def named(names: Iterable[str], limit: int = 4) -> str:
    """Some of many names, for an error message."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more
