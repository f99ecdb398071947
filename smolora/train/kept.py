"""What a stage leaves for later ones: written whole or not at all, and checked before it is read."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..io.files import write_json
from .methods import Stage
from .paths import RunPaths, read_if_exists


def write_checksums(folder: Path, parts: dict[str, Path]) -> None:
    """Write the checksums of a stage's files.

    Args:
        folder: the stage's folder.
        parts: the folders to hash, by the name that they will have in it.
    """
    sums = {
        f"{name}/{path.relative_to(part)}": _sha256(path)
        for name, part in parts.items()
        for path in sorted(part.rglob("*"))
        if path.is_file()
    }
    write_json(folder / "checksums.json", sums)


def check_sums(paths: RunPaths, stage: Stage) -> None:
    """Check that what a stage left is as it was written.

    Raises:
        ValueError: a file is missing or was changed. The message names it.
    """
    for name, expected in read_if_exists(paths.checksums(stage)).items():  # runs of version 0.1 have none
        path = paths.stage(stage) / name
        if not path.is_file() or _sha256(path) != expected:
            state = "was changed" if path.is_file() else "is missing"
            raise ValueError(f"{path} {state} since its stage was trained, and later stages start from it")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
