"""Answer shards: one file of finished batches per process, so that a killed evaluation can be continued."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


class AnswerShards:
    """The finished batches of an evaluation: one line per batch, one file per process.

    Args:
        output: the answers file that they are merged into.
        run: settings of the run. Shards of a run with other settings are refused.
    """

    def __init__(self, output: Path, run: dict[str, Any]) -> None:
        self.folder = output.with_name(output.name + ".parts")
        self.run = run

    def read(self) -> dict[int, dict[str, Any]]:
        """Read the finished batches, by number.

        Raises:
            ValueError: they belong to a run with other settings, or a file is broken before its last line.
        """
        done = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in _complete_lines(path):
                try:
                    content = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path} is broken ({error}): remove it") from error
                if "run" in content:
                    check_same_run(content["run"], self.run, self.folder)
                else:
                    done[content["batch"]] = content
        return done

    def writer(self, process: int) -> ShardWriter:
        """Open the shard of one process for appending."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return ShardWriter(self.folder / f"process-{process}.jsonl", self.run)

    def remove(self) -> None:
        """Remove all shards."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)


class ShardWriter:
    """Appends lines to a shard, each synced to disk before the next. A torn last line is cut off first."""

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self.path, self.run = path, run

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        kept = b"".join(_complete_lines(self.path)) if self.path.exists() else b""
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


def _complete_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def check_same_run(found: dict[str, Any], run: dict[str, Any], where: Path) -> None:
    """Refuse to continue what belongs to a run with other settings.

    Raises:
        ValueError: the settings differ. The message says which.
    """
    different = [f"{name} {found.get(name)!r}, now {run[name]!r}" for name in run if found.get(name) != run[name]]
    if different:
        raise ValueError(f"{where} belongs to another run ({'; '.join(different)}): remove it or name another output")
