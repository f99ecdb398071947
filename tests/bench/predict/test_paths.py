"""The way of a warp through a kernel, and the trips of its loops."""

from __future__ import annotations

from pathlib import Path

import pytest

from predict.paths import Repeat, counted, flatten, path
from predict.sass import Function, Instruction

SOURCE = """
def kernel(n):
    for i in range(n):
        load(i)
    for j in range(8):
        add(j)
"""


def build(file: Path, rows: list[tuple[str, str, int]]) -> Function:
    """A kernel from (label, `opcode ->target`, source line); a guard P for every branch."""
    made = Function("kernel")
    for number, (label, text, line) in enumerate(rows):
        opcode, _, target = text.partition(" ->")
        if label:
            made.labels[label] = 16 * number
        guard, operands = ("P", f"`({target})") if target else ("", "")
        made.instructions.append(
            Instruction(16 * number, guard, opcode, operands, 1, False, 7, 7, 0, target or None, str(file), line)
        )
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "kernel.py"
    file.write_text(SOURCE)
    return file


def runs(items: tuple) -> dict[str, float]:
    found: dict[str, float] = {}
    for instruction, times in counted(items):
        found[instruction.opcode] = found.get(instruction.opcode, 0) + times
    return found


def test_loops_run_as_often_as_declared(source: Path):
    made = build(
        source,
        [
            ("", "MOV", 2),
            ("a", "LDG", 4),
            ("", "BRA ->a", 3),
            ("b", "IADD3", 6),
            ("", "BRA ->b", 5),
            ("", "EXIT", 2),
        ],
    )
    items = path(made, lambda name, statement: {"i": 5, "j": 8}[name])
    assert runs(items) == {"MOV": 1, "LDG": 5, "IADD3": 8, "BRA": 13, "EXIT": 1}
    assert [item.trips for item in items if isinstance(item, Repeat)] == [5, 8]
    assert len(flatten(items)) == 1 + 10 + 16 + 1
    assert len(flatten(items, limit=3)) == 1 + 6 + 6 + 1


@pytest.mark.parametrize("trips", range(12))
def test_an_unrolled_loop_runs_as_often_as_declared(source: Path, trips: int):
    """Four at a time, then two in straight code, then one at a time: every trip is one load."""
    made = build(
        source,
        [
            ("", "BRA ->two", 2),
            *[("four" if n == 0 else "", "LDG", 4) for n in range(4)],
            ("", "BRA ->four", 3),
            ("two", "BRA ->one", 2),
            ("", "LDG", 4),
            ("", "LDG", 4),
            ("one", "LDG", 4),
            ("", "BRA ->one", 3),
            ("", "EXIT", 2),
        ],
    )
    assert runs(path(made, lambda name, statement: trips)).get("LDG", 0) == trips


def test_the_longer_branch_is_taken(source: Path):
    made = build(
        source,
        [
            ("", "BRA ->other", 2),
            ("", "FADD", 2),
            ("", "EXIT", 2),
            ("other", "FMUL", 2),
            ("", "FMUL", 2),
            ("", "EXIT", 2),
        ],
    )
    assert runs(path(made, lambda name, statement: 0)) == {"BRA": 1, "FMUL": 2, "EXIT": 1}
