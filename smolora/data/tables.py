"""Records of files in other people's formats: JSON, JSON lines, CSV, Parquet, and folders of `datasets`.

A record is a mapping of field names to values, whatever they are. `smolora.data.fields` says what they mean.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..extras import require_extra
from ..io.files import read_text
from .format import read_json, read_lines

Record = dict[str, Any]


def read_table(path: Path) -> list[Record]:
    """Read the records of a file, by its ending, or of a split's folder of `datasets`.

    Raises:
        ValueError: the format is unknown, or the content is malformed. The message names file and record or line.
        OSError: it cannot be read.
        MissingExtraError: pyarrow is not installed, for Parquet and `datasets`.
    """
    if path.is_dir():
        records = list(_arrow(path))
    elif path.suffix.lower() in READERS:
        records = READERS[path.suffix.lower()](path)
    else:
        raise ValueError(f"{path}: must end with {', '.join(READERS)}, or be a folder that datasets saved")
    if not records:
        raise ValueError(f"{path}: must hold a record, got none")
    return records


def splits_of(path: Path) -> dict[str, tuple[Path, ...]]:
    """The tables that a path stands for, by the name of their split: "" for a file, or a folder of one split.

    A split has several files if their names end with the number of a shard, as in train-00000-of-00002.parquet.

    Raises:
        ValueError: there is no such file, or a folder has neither splits nor records.
    """
    if path.is_file():
        return {"": (path,)}
    if not path.is_dir():
        raise ValueError(f"there is no file or folder {path}")
    if (path / "dataset_dict.json").is_file():
        names = read_json(path / "dataset_dict.json")["splits"]
        return {name: (path / name,) for name in names}
    if (path / "state.json").is_file():
        return {"": (path,)}
    splits: dict[str, tuple[Path, ...]] = {}
    for file in sorted(file for file in path.iterdir() if file.suffix.lower() in READERS):
        name = SHARD.sub("", file.stem).lower()
        if name in (*TRAIN, *TEST):
            splits[name] = (*splits.get(name, ()), file)
    if not splits:
        raise ValueError(
            f"{path}: must be a folder that datasets saved, or have a file named {', '.join((*TRAIN, *TEST))}"
        )
    return splits


SHARD = re.compile(r"-\d+-of-\d+$")
TRAIN = ("train", "training")
TEST = ("test", "validation", "val", "valid", "dev", "eval")


def _json(path: Path) -> list[Record]:
    content = read_json(path)
    if isinstance(content, dict):  # {"data": [...]}, as many datasets have it
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, list):
        raise ValueError(f"{path}: must hold a list of records")
    for index, record in enumerate(content):
        if not isinstance(record, dict):
            raise ValueError(f"{path}: record {index}: must be an object, got {record!r:.80}")
    return content


def _json_lines(path: Path) -> list[Record]:
    return [record for _, record in read_lines(path)]


def _csv(path: Path, delimiter: str = ",") -> list[Record]:
    rows = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{path}: columns must have different names, got {', '.join(header)}")
        records = []
        for row in rows:
            if row:
                if len(row) != len(header):
                    raise ValueError(f"{path}: line {rows.line_num}: must have {len(header)} cells, got {len(row)}")
                records.append(dict(zip(header, row, strict=True)))
        return records
    except csv.Error as error:
        raise ValueError(f"{path}: line {rows.line_num}: {error}") from error


def _tsv(path: Path) -> list[Record]:
    return _csv(path, "\t")


def _parquet(path: Path) -> list[Record]:
    require_extra("own", "pyarrow", user="reading Parquet")
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not Parquet: {error}") from error


def _arrow(folder: Path) -> Iterator[Record]:
    """Read the files that `datasets.Dataset.save_to_disk` wrote, in their order."""
    require_extra("own", "pyarrow", user="reading a folder of datasets")
    import pyarrow

    state = read_json(folder / "state.json")
    for entry in state["_data_files"]:
        path = folder / entry["filename"]
        try:
            with pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
                for batch in stream:
                    yield from batch.to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path}: not an Arrow stream: {error}") from error


READERS: dict[str, Callable[[Path], list[Record]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
