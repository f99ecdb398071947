"""The output that both static reports end with: a table of compiled kernels, and the faults found in them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol


class Compiled(Protocol):
    """A row: what one compiled kernel takes and has."""

    arch: int | str
    kernel: str

    def faults(self) -> list[str]: ...


def print_rows(rows: Sequence[Compiled], without: Collection[str] = ()) -> None:
    """Print rows in columns, one a field, but for the fields in `without`."""
    columns = [name for name in rows[0].__dataclass_fields__ if name not in without] if rows else []
    cells = [columns] + [[str(getattr(row, name)) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_faults(rows: Sequence[Compiled], compiler: str) -> int:
    """Print a line for every kernel with faults, and a summary; return the exit status, 1 if there are any."""
    bad = [(row, faults) for row in rows if (faults := row.faults())]
    for row, faults in bad:
        print(f"FAULT sm_{row.arch} {row.kernel} {row}: {'; '.join(faults)}")
    print(f"{len(rows)} kernels compiled with {compiler}, {len(bad)} with faults")
    return 1 if bad else 0
