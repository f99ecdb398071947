"""How many bytes each load and store of a launch moves, and from where.

What a warp's instruction moves follows from its width. A tensor comes from device memory once, or not at all if an
earlier launch left it in L2; what is read again comes from L2. Writes go to device memory once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import kernel_report
from predict import trips
from predict.opcodes import GLOBAL, classify
from predict.paths import Items, Repeat, counted
from predict.sass import Instruction
from predict.simulate import Access

FIRST_LEVEL = 32 * 1024  # bytes of a tensor that stays in L1 while a loop reads it again

Group = tuple[bool, frozenset[str]]  # whether it is written, and the arguments that share a source line


def _merged(groups: set[Group]) -> dict[Group, Group]:
    """Map each group to the union of those that share an argument with it."""
    unions: list[tuple[bool, set[str]]] = []
    for written, names in groups:
        mine = set(names)
        rest = []
        for other_written, other in unions:
            if other_written == written and other & mine:
                mine |= other
            else:
                rest.append((other_written, other))
        unions = [*rest, (written, mine)]
    return {group: next((w, frozenset(n)) for w, n in unions if w == group[0] and group[1] <= n) for group in groups}


class UnknownAccess(ValueError):
    """A load or store whose tensor is not known: counted as nothing, it would make a kernel faster."""


class Traffic:
    """The memory traffic of a launch.

    Raises:
        UnknownAccess: a load or store belongs to no tensor.

    Args:
        lines: arguments by source line and whether it stores, see `accesses.tensors_by_line`.
        kinds: the kinds of programs, how many there are of each, and their path.
        in_l2: arguments that are in L2 when the launch starts.
    """

    def __init__(
        self,
        call: kernel_report.Call,
        lines: dict[tuple[str, int, bool], set[str]],
        kinds: Sequence[tuple[int, Items]],
        warps: int,
        in_l2: frozenset[str],
    ) -> None:
        self.lines = lines
        self.kernel = call.launch.kernel.name
        self.arguments = trips.Arguments({**dict(call.launch.constexprs), **call.scalars}, call.grid)
        self.sizes = {name: tensor.untyped_storage().nbytes() for name, tensor in call.tensors.items()}
        self.sizes |= {name: min(size, call.tensors[name].nbytes) for name, size in self.sizes.items()}
        self.looped = {
            i.address for _, items in kinds for item in items if isinstance(item, Repeat) for i in item.instructions
        }
        self.copied = self._copied(kinds)
        moved: Counter[Group] = Counter()
        for number, items in kinds:
            for instruction, times in counted(items):
                if classify(instruction) in GLOBAL and not instruction.never:
                    moved[self.group(instruction)] += times * number * warps * self.bytes(instruction)
        union = _merged(set(moved))
        total: Counter[Group] = Counter()
        for group, count in moved.items():
            total[union[group]] += count
        self.shares: dict[Group, float] = {}
        self.read: dict[str, float] = {}  # bytes of device memory, by arguments
        self.written: dict[str, float] = {}
        for group, count in total.items():
            written, names = group
            size = sum(self.sizes.get(name, 0) for name in names if written or name not in in_l2)
            device = min(count, size)
            self.shares |= {own: device / count for own, of in union.items() if of == group and count}
            (self.written if written else self.read)[" ".join(sorted(names))] = device
        self.l2_bytes = sum(total.values())
        self.memory_bytes = sum(self.read.values()) + sum(self.written.values())

    def _copied(self, kinds: Sequence[tuple[int, Items]]) -> dict[tuple[str, int], float]:
        """Return the share of a loop's copies that are made, by line: the last ones have gone ahead of the loop."""
        inside: Counter[tuple[str, int]] = Counter()
        ahead: Counter[tuple[str, int]] = Counter()
        for _, items in kinds:
            for instruction, times in counted(items):
                if classify(instruction) == "async_copy" and not instruction.never:
                    place = (instruction.file, instruction.line)
                    (inside if instruction.address in self.looped else ahead)[place] += times
        return {place: max(0.0, 1 - ahead[place] / count) for place, count in inside.items()}

    def group(self, instruction: Instruction) -> Group:
        written = classify(instruction) in ("store", "atomic")
        names = self.lines.get((instruction.file, instruction.line, written))
        if names is None:
            place = f"{instruction.file}:{instruction.line}"
            raise UnknownAccess(f"{self.kernel}: Triton's IR has no pointer for the {instruction.opcode} of {place}")
        return written, frozenset(names)

    def bytes(self, instruction: Instruction) -> float:
        """Return the bytes that a warp's instruction moves, but for the share that masks leave out."""
        _, names = self.group(instruction)
        active = 1.0
        for name in names:
            base = name.rstrip("0123456789").rstrip("_") if name[-1].isdigit() else name
            if declared := trips.ACTIVE.get((self.kernel, base)):
                active = declared(self.arguments)
        if classify(instruction) == "async_copy" and instruction.address in self.looped:
            active *= self.copied[instruction.file, instruction.line]
        return 32 * instruction.width * active

    def access(self, instruction: Instruction) -> Access:
        """Return where an instruction's bytes go."""
        kind = classify(instruction)
        if kind not in GLOBAL or instruction.never:
            return Access()
        group = self.group(instruction)
        moved = self.bytes(instruction)
        small = sum(self.sizes.get(name, 0) for name in group[1]) <= FIRST_LEVEL
        if kind == "load" and small and instruction.address in self.looped:
            return Access(first_level=True)
        return Access(moved, moved * self.shares.get(group, 0.0))
