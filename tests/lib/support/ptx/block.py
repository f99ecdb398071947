"""One program of a launch: a block of threads that run together."""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from support.ptx.faults import Faults
from support.ptx.memory import GlobalMemory, SharedMemory
from support.ptx.movement import WARP
from support.ptx.program import Program

MOST_STEPS = 5_000_000
ENDED = -1  # in place of a program counter
POISON = {
    np.bool_: np.bool_(True),
    np.uint8: np.uint8(0xFF),
    np.uint16: np.uint16(0xFFFF),
    np.uint32: np.uint32(0xFFFFFFFF),
    np.uint64: np.uint64(0xFFFFFFFFFFFF0000),
}


class Block:
    """The state of a block: registers, memories, and what is under way."""

    def __init__(
        self,
        program: Program,
        number: int,
        position: tuple[int, int, int],
        grid: tuple[int, int, int],
        parameters: dict[str, np.unsignedinteger],
        memory: GlobalMemory,
        faults: Faults,
    ) -> None:
        self.program, self.number, self.parameters = program, number, parameters
        self.memory, self.faults = memory, faults
        self.shared = SharedMemory(program.shared, faults)
        self.threads = program.threads
        self.warp = np.arange(self.threads) // WARP
        fresh = {kind: np.full(self.threads, value) for kind, value in POISON.items()}
        self.registers: list[ndarray] = [fresh[kind] for kind in program.kinds]
        self.interval = 0  # grows at every barrier
        self.open_copies: list = []  # of cp.async: those of the group that is open, and of the groups to wait for
        self.copies: list[list] = []
        self.open_products: list = []  # of wgmma, likewise
        self.products: list[list] = []
        self.unread: dict[int, ndarray] = {}  # sums of wgmma by register, until they are waited for
        self._special = {
            **{("tid", axis): np.arange(self.threads, dtype=np.uint32) * np.uint32(axis == 0) for axis in range(3)},
            **{("ntid", axis): self._everywhere(self.threads if axis == 0 else 1) for axis in range(3)},
            **{("ctaid", axis): self._everywhere(position[axis]) for axis in range(3)},
            **{("nctaid", axis): self._everywhere(grid[axis]) for axis in range(3)},
        }

    def _everywhere(self, value: int) -> ndarray:
        return np.full(self.threads, value, np.uint32)

    def special(self, name: str, axis: int) -> ndarray:
        """A special register such as %tid.x."""
        return self._special[name, axis]

    def run(self) -> None:
        """Run to the end. Threads that differ in where they are go on from the least place, so that they meet again."""
        code, labels = self.program.code, self.program.labels
        counter = 0  # of all threads, as long as `counters` is None
        counters: ndarray | None = None
        for _ in range(MOST_STEPS):
            mask = None
            if counters is not None:
                live = counters[counters != ENDED]
                if not len(live):
                    return
                counter = int(live.min())
                mask = counters == counter
                if mask.all():
                    counters = mask = None
            if counter >= len(code):
                return
            instruction = code[counter]
            taking = self._guarded(instruction.guard, mask)
            following = counter + 1
            if instruction.control in ("", "barrier"):
                if instruction.control:
                    self._barrier(taking, instruction.where)
                elif taking is None or taking.any():
                    instruction.run(self, taking)
            else:
                to = ENDED if instruction.control == "exit" else labels[instruction.operands[0]]
                if taking is None and mask is None:
                    following = to
                elif taking is None or taking.any():
                    if counters is None:
                        counters = np.full(self.threads, following)
                    counters[mask if mask is not None else slice(None)] = following
                    counters[taking if taking is not None else mask] = to
                    continue
            if counters is not None:
                counters[mask] = following
            elif following == ENDED:
                return
            else:
                counter = following
        raise RuntimeError(f"{self.program.name} has not ended after {MOST_STEPS} instructions")

    def _guarded(self, guard: tuple[int, bool] | None, mask: ndarray | None) -> ndarray | None:
        """Which threads of the mask run an instruction; None if all of the block do."""
        if guard is None:
            return mask
        predicate = self.registers[guard[0]]
        taking = ~predicate if guard[1] else predicate
        if mask is not None:
            return taking & mask
        return None if taking.all() else taking

    def _barrier(self, taking: ndarray | None, where: str) -> None:
        if taking is not None:
            self.faults.add("a barrier that a part of the threads reaches", where)
        self.shared.barrier()
        self.interval += 1
