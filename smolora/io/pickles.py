"""Checkpoints of `torch.save`: verified from end to end, then loaded without running what a pickle asks for.

Such a file is a zip archive with a CRC-32 of each tensor, which `torch.load` ignores. `zipfile.ZipFile.testzip` checks
the CRCs but not the headers in front of the values, so it would miss a bit that flips there. This reader checks both.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

CHUNK = 1 << 24  # bytes read at a time
ZIP32_LIMIT = 0xFFFFFFFF  # sizes and offsets from here on are stored apart, in 8 bytes each


def read_pickle(path: Path, entry: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a file of `torch.save`, mapped into memory.

    Args:
        path: the file.
        entry: where the tensors are in a file that has such an entry; its other entries are ignored.

    Raises:
        ValueError: the file is broken, or holds anything but tensors by name.
    """
    _verify_archive(path, entry)
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
    loaded = _tensors_of(loaded, entry)
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors, got {type(loaded).__name__}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} must hold tensors by name, got {type(value).__name__} for {name!r}")
        if value.layout != torch.strided:
            raise ValueError(f"{path}: {name!r} must be a dense tensor, got {value.layout}")
    return {name: value.detach() for name, value in loaded.items()}


def _tensors_of(loaded: Any, entry: str | None) -> Any:
    """Return what a file holds under an entry, or all of it if it has no such entry."""
    return loaded[entry] if isinstance(loaded, dict) and isinstance(loaded.get(entry), dict) else loaded


def _verify_archive(path: Path, entry: str | None) -> None:
    """Read an archive from end to end and compare every record with the archive's directory.

    Raises:
        ValueError: a record is not where it should be, or does not have the CRC that was written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = sorted(archive.infolist(), key=lambda record: record.header_offset)
            directory_offset, comment = archive.start_dir, archive.comment
    # zipfile raises NotImplementedError for a version or a compression that it does not know
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is cut short, broken, or no file of torch.save (of PyTorch 1.6 or newer): {error}"
        ) from error
    if comment or not _is_directory_of_torch(records):
        raise ValueError(f"{path} is broken: its directory is not one that torch.save writes")
    end = 0
    with open(path, "rb") as file:
        for record in records:
            fault, end = _check_record(file, record, end)
            if fault is not None:
                tensor = _find_tensor(path, record, records, entry)
                name = f"{tensor!r} ({record.filename})" if tensor else record.filename
                raise ValueError(f"{path} is broken: {name} {fault}")
        if end != directory_offset or not _check_end(file, directory_offset, path.stat().st_size, len(records)):
            raise ValueError(f"{path} is broken: its end is not one that torch.save writes")


def _is_directory_of_torch(records: list[zipfile.ZipInfo]) -> bool:
    """Return whether the fields that no reader uses are equal in all records, as one writer leaves them."""
    unused = {
        (
            record.create_system,
            record.create_version,
            record.reserved,
            record.volume,
            record.internal_attr,
            record.external_attr,
            record.date_time,
            record.comment,
            record.compress_type,
        )
        for record in records
    }
    return len(unused) == 1 and records[0].compress_type == zipfile.ZIP_STORED


def _check_record(file: BinaryIO, record: zipfile.ZipInfo, start: int) -> tuple[str | None, int]:
    """Compare one uncompressed record with its entry in the directory.

    Returns:
        What is wrong, or None, and the offset of the record's end.
    """
    file.seek(start)
    header = file.read(30)
    if record.header_offset != start or len(header) < 30:
        return "does not start where it should", start
    signature, version, flags, method, time, date, crc, packed, size, name_length, extra_length = struct.unpack(
        "<4s5H3L2H", header
    )
    name, extra = file.read(name_length), file.read(extra_length)
    values = start + 30 + name_length + extra_length
    sizes_follow = bool(flags & 8)  # CRC and sizes stand behind the values then
    found = (signature, version, flags, method, date, time, crc, packed, size, name)
    expected = (
        b"PK\3\4",
        record.extract_version,
        record.flag_bits,
        zipfile.ZIP_STORED,
        *_dos_date_and_time(record),
        *((0, 0, 0) if sizes_follow else (record.CRC, record.compress_size, record.file_size)),
        record.orig_filename.encode(),
    )
    if found != expected:
        return "has a broken header", values
    beyond_4_gib = record.file_size >= ZIP32_LIMIT
    wide_numbers = [record.file_size, 0 if sizes_follow else record.compress_size] if beyond_4_gib else []
    wide_numbers += [start] if start >= ZIP32_LIMIT else []
    if not _is_padding(extra, wide_numbers):
        return "has broken padding", values
    crc = _crc_of(file, record.file_size)
    if crc is None:
        return "is cut short", values
    end = values + record.file_size
    if crc != record.CRC:
        return f"has CRC {crc:08x} where {record.CRC:08x} was written", end
    if sizes_follow:
        layout = "<4sL2Q" if wide_numbers else "<4s3L"  # wide for a record that begins beyond 4 GiB, too
        summary = struct.pack(layout, b"PK\7\10", record.CRC, record.compress_size, record.file_size)
        end += len(summary)
        if file.read(len(summary)) != summary:
            return "has a broken summary", end
    return None, end


def _dos_date_and_time(record: zipfile.ZipInfo) -> tuple[int, int]:
    year, month, day, hour, minute, second = record.date_time
    return (year - 1980) << 9 | month << 5 | day, hour << 11 | minute << 5 | second // 2


def _is_padding(extra: bytes, wide_numbers: list[int]) -> bool:
    """Return whether a header's extra fields are the numbers beyond 4 GiB, then Zs that align the values."""
    numbers = b""
    if wide_numbers:
        numbers = struct.pack(f"<2H{len(wide_numbers)}Q", 1, 8 * len(wide_numbers), *wide_numbers)
    letters = len(extra) - len(numbers) - 4
    return letters >= 0 and extra == numbers + b"FB" + struct.pack("<H", letters) + b"Z" * letters


def _crc_of(file: BinaryIO, size: int) -> int | None:
    """Return the CRC-32 of the next `size` bytes, or None if there are fewer."""
    crc = 0
    while size:
        chunk = file.read(min(size, CHUNK))
        if not chunk:
            return None
        crc = zlib.crc32(chunk, crc)
        size -= len(chunk)
    return crc


def _check_end(file: BinaryIO, directory_offset: int, size: int, count: int) -> bool:
    """Return whether the archive's last bytes fit a directory of `count` records at that offset."""
    file.seek(size - 98)
    tail = file.read(98)
    expected = b""
    if tail.startswith(b"PK\6\6"):  # the end of an archive that may pass 4 GiB; any version of its writer is right
        length = size - 98 - directory_offset
        expected += struct.pack("<4sQ", b"PK\6\6", 44) + tail[12:14]
        expected += struct.pack("<H2L4Q", 45, 0, 0, count, count, length, directory_offset)
        expected += struct.pack("<4sLQL", b"PK\6\7", 0, directory_offset + length, 1)
    else:
        length = size - 22 - directory_offset
        tail = tail[-22:]
    counts = (min(count, 0xFFFF),) * 2
    places = (min(length, ZIP32_LIMIT), min(directory_offset, ZIP32_LIMIT))
    return tail == expected + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *counts, *places, 0)


def _find_tensor(path: Path, record: zipfile.ZipInfo, records: list[zipfile.ZipInfo], entry: str | None) -> str | None:
    """Find the tensor whose values a broken record holds, by its CRC, for an error message."""
    if record.filename.endswith("data.pkl"):  # holds the names, not a tensor
        return None
    crcs = {r.CRC for r in records}
    try:
        loaded = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        for name, value in _tensors_of(loaded, entry).items():
            crc = zlib.crc32(torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).numpy().data)
            if crc == record.CRC or crc not in crcs:
                return name
    except Exception:  # a broken archive may raise anything; the caller reports the fault that it found
        pass
    return None
