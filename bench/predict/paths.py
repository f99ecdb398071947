"""The way that a warp takes through a kernel: its instructions in order, loops with their trip counts.

Of two branches the longer one is taken, except where the kernel's programs are of two kinds (`trips.DISPATCH`). A loop
that the compiler unrolled has a main loop of several source iterations, straight code for a part of the rest, and a
loop of single iterations; the declared trips are shared out among them.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from predict.flow import Block, Loop, basic_blocks, natural_loops
from predict.opcodes import CLASSES
from predict.sass import Function, Instruction

Trips = Callable[[str, ast.For | ast.While | None], float]  # of a loop by the name of its variable


class UndeclaredLoop(ValueError):
    """A loop in machine code whose trip count nobody declared."""


@dataclass(frozen=True)
class Repeat:
    """Instructions of a loop and how often they run."""

    items: tuple[Instruction | Repeat, ...]
    trips: int
    variable: str

    @property
    def instructions(self) -> list[Instruction]:
        """Instructions of one iteration, those of inner loops once."""
        return [i for item in self.items for i in (item.instructions if isinstance(item, Repeat) else [item])]


Items = tuple[Instruction | Repeat, ...]


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text(encoding="utf-8"))


@cache
def loop_at(file: str, line: int) -> ast.For | ast.While | None:
    """Return the statement of a loop that begins at a source line."""
    loops = (node for node in ast.walk(_tree(file)) if isinstance(node, ast.For | ast.While))
    return next((node for node in loops if node.lineno == line), None)


@cache
def dispatch_lines(file: str, function: str, condition: str) -> tuple[range, range]:
    """Return the lines of the body and of the `else` of a kernel's `if` with a condition."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            for inner in ast.walk(node):
                if isinstance(inner, ast.If) and inner.orelse and ast.unparse(inner.test) == condition:
                    first, last = inner.body[0].lineno, inner.body[-1].end_lineno
                    return range(first, last + 1), range(inner.orelse[0].lineno, inner.orelse[-1].end_lineno + 1)
    raise ValueError(
        f"{file}: {function} has no `if {condition}: ... else: ...`, see DISPATCH in bench/predict/trips.py"
    )


def _memory(instructions: Collection[Instruction], lines: range | None = None, file: str = "") -> int:
    """Count loads of global memory, those of some lines alone if these are given."""
    return sum(
        CLASSES.get(i.mnemonic) in ("load", "async_copy") and (lines is None or (i.file == file and i.line in lines))
        for i in instructions
    )


class _Walk:
    """Builds the path of one kernel."""

    def __init__(self, function: Function, trips: Trips, without: Callable[[Instruction], bool]) -> None:
        self.blocks = basic_blocks(function)
        self.loops = natural_loops(self.blocks)
        self.name = function.name
        self.without = without
        self.count: dict[Loop, int] = {}
        self.variable: dict[Loop, str] = {}
        self.skipped: set[Block] = set()
        by_source: dict[tuple[str, int], list[Loop]] = {}
        for loop in self.loops:
            by_source.setdefault(loop.source, []).append(loop)
        for (file, line), loops in by_source.items():
            statement = loop_at(file, line) if file.endswith(".py") else None
            name = ast.unparse(statement.target) if isinstance(statement, ast.For) else "while"
            total = round(trips(name if statement is not None else f"line {line}", statement))
            self.variable.update(dict.fromkeys(loops, name))
            lines = range(statement.lineno, statement.end_lineno + 1) if statement is not None else None
            self._share_out(loops, total, file, lines)

    def _share_out(self, loops: list[Loop], total: int, file: str, lines: range | None) -> None:
        """Share a source loop's trips out among the loops that became of it; loads tell how often one was unrolled."""
        rest = list(loops)
        while rest:
            loop = rest.pop(0)
            self.count[loop] = total
            if not rest or not _memory(rest[0].instructions):
                continue
            tail = rest[0]
            single = _memory(tail.instructions)
            unrolled = _memory(loop.instructions) / single
            if unrolled < 2 or unrolled != int(unrolled) or loop.parent is not tail.parent:
                continue
            rest.pop(0)
            self.count[loop], left = divmod(total, int(unrolled))
            within = [b for b in self.blocks if loop.tails[-1].index < b.index < tail.head.index]
            for block in within:
                copies = _memory(block.instructions, lines, file) // single
                if copies and copies <= left:
                    left -= copies
                elif copies:
                    self.skipped.add(block)
            self.count[tail] = left

    def _weight(self, items: Items) -> float:
        return sum(item.trips * self._weight(item.items) if isinstance(item, Repeat) else 1 for item in items)

    def region(self, entry: Block, within: Collection[Block], parent: Loop | None) -> Items:
        """Return the longest way from a block through a loop's body, or through the kernel."""
        inner = {loop.head: loop for loop in self.loops if loop.parent is parent}
        home = {block: loop for loop in inner.values() for block in loop.blocks}
        best: dict[Block, tuple[float, Items]] = {}

        def visit(block: Block) -> tuple[float, Items]:
            if block in best:
                return best[block]
            loop = home.get(block)
            if loop is not None:
                body = self.region(loop.head, loop.blocks, loop)
                own: Items = (Repeat(body, self.count[loop], self.variable[loop]),) if self.count[loop] else ()
                following = {n for b in loop.blocks for n in b.next if n not in loop.blocks}
            else:
                own = () if block in self.skipped else tuple(i for i in block.instructions if not self.without(i))
                last = block.instructions[-1]
                following = set(block.next)
                if last.opcode.startswith("BRA.DIV"):  # for warps whose threads have parted
                    following = {n for n in following if n.index == block.index + 1}
            ways = [visit(n) for n in following if n in within and n is not entry]
            weight, rest = max(ways, key=lambda way: way[0], default=(0.0, ()))
            best[block] = self._weight(own) + weight, own + rest
            return best[block]

        if parent is not None:
            home = {block: loop for block, loop in home.items() if loop is not parent}
        return visit(entry)[1]


def path(function: Function, trips: Trips, without: Callable[[Instruction], bool] = lambda i: False) -> Items:
    """Return the instructions that a warp runs, those that `without` picks left out.

    Args:
        trips: the trip count of a loop by its variable, and by its statement if it has one in Python; "while" for a
            loop without a variable, "line 7" where the source is not Python.

    Raises:
        UndeclaredLoop: `trips` does not know a loop.
    """
    walk = _Walk(function, trips, without)
    return walk.region(walk.blocks[0], walk.blocks, None)


def flatten(items: Items, limit: int | None = None) -> list[Instruction]:
    """Return the instructions of a path as they run, of no loop more than `limit` iterations."""
    out: list[Instruction] = []
    for item in items:
        if isinstance(item, Repeat):
            out += flatten(item.items, limit) * (item.trips if limit is None else min(item.trips, limit))
        else:
            out.append(item)
    return out


def counted(items: Items, times: float = 1.0) -> list[tuple[Instruction, float]]:
    """Return each instruction of a path with the number of times it runs."""
    out: list[tuple[Instruction, float]] = []
    for item in items:
        out += counted(item.items, times * item.trips) if isinstance(item, Repeat) else [(item, times)]
    return out
