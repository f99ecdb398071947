"""CSV files of a report."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..io.files import atomic_write_text
from ..io.markdown import printable


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table. None is an empty cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for row in (header, *rows):
        writer.writerow([printable(cell) if isinstance(cell, str) else cell for cell in row])
    atomic_write_text(path, file.getvalue())
