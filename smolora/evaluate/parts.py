"""What the processes of an evaluation have written so far, so that it can be killed and started again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Parts:
    """What the processes of a run have written so far: a line a batch, a file a process.

    Args:
        output: the answers file that they will become.
        run: what the run is; parts of another are refused.
    """

    def __init__(self, output: Path, run: dict[str, Any]) -> None:
        self.folder = output.with_name(output.name + ".parts")
        self.run = run

    def read(self) -> dict[int, dict[str, Any]]:
        """The batches that are there, by number.

        Raises:
            ValueError: they belong to a run with other settings, or a file is broken elsewhere than at its end.
        """
        done = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in _whole_lines(path):
                try:
                    content = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path} is broken ({error}): remove it") from error
                if "run" in content:
                    same_run(content["run"], self.run, self.folder)
                else:
                    done[content["batch"]] = content
        return done

    def writer(self, process: int) -> Writer:
        """Appends to the file of one process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return Writer(self.folder / f"process-{process}.jsonl", self.run)

    def remove(self) -> None:
        if self.folder.is_dir():
            shutil.rmtree(self.folder)


class Writer:
    """Appends lines, each on the disk before the next begins; what a killed process tore is cut off."""

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path, self.run = path, run

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        kept = b"".join(_whole_lines(self.path)) if self.path.exists() else b""
        self.file = self.path.open("r+b" if self.path.exists() else "wb")
        self.file.truncate(len(kept))
        self.file.seek(len(kept))
        if not kept:
            self._write({"run": self.run})
        return self._write

    def _write(self, content: dict[str, Any]) -> None:
        self.file.write(json.dumps(content).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def __exit__(self, *error: object) -> None:
        self.file.close()


def _whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def same_run(found: dict[str, Any], run: dict[str, Any], where: Path) -> None:
    """Refuse to go on with what belongs to another run.

    Raises:
        ValueError: the two differ; the message says in what.
    """
    different = [f"{name} {found.get(name)!r}, now {run[name]!r}" for name in run if found.get(name) != run[name]]
    if different:
        raise ValueError(f"{where} belongs to another run ({'; '.join(different)}): remove it or name another output")
