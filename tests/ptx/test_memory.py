"""The bookkeeping of shared memory, access by access: what is a fault, and what a barrier or a wait makes right."""

from collections.abc import Callable

import numpy as np
import pytest

from support.ptx.faults import Faults
from support.ptx.memory import SharedMemory
from support.ptx.operands import SHARED_BASE

LANES = 32


class Played:
    """A block of two warps, whose accesses are played by hand; each takes 4 bytes a lane, from `at` on."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.memory = SharedMemory(1024, self.faults)

    def _where(self, at: int, warp: int) -> tuple[np.ndarray, np.ndarray]:
        return SHARED_BASE + at + 4 * np.arange(LANES, dtype=np.uint32), np.full(LANES, warp)

    def write(self, warp: int, at: int = 0) -> None:
        address, warps = self._where(at, warp)
        self.memory.write(address, np.full((LANES, 4), warp, np.uint8), warps, "write")

    def read(self, warp: int, at: int = 0) -> None:
        address, warps = self._where(at, warp)
        self.memory.read(address, 4, warps, "read")

    def copy(self, warp: int, wait: bool) -> None:
        address, warps = self._where(0, warp)
        index = self.memory.start_copy(address, 4, warps, "copy")
        if wait:
            self.memory.finish_copy(index, np.zeros((LANES, 4), np.uint8), warps)

    def multiply(self, wait: bool) -> None:
        index = self.memory.start_multiply(np.arange(SHARED_BASE, SHARED_BASE + 4 * LANES), "multiply")
        if wait:
            self.memory.finish_multiply(index)

    def barrier(self) -> None:
        self.memory.barrier()

    def fence(self) -> None:
        self.memory.unfenced.fill(False)


Access = Callable[[Played], None]


def play(*accesses: Access) -> set[str]:
    played = Played()
    for access in accesses:
        access(played)
    return played.faults.kinds()


def w(warp: int, at: int = 0) -> Access:
    return lambda played: played.write(warp, at)


def r(warp: int, at: int = 0) -> Access:
    return lambda played: played.read(warp, at)


def copied(wait: bool) -> Access:
    return lambda played: played.copy(0, wait)


def multiplied(wait: bool) -> Access:
    return lambda played: played.multiply(wait)


barrier, fence = Played.barrier, Played.fence


@pytest.mark.parametrize(
    ("fault", "accesses"),
    [
        (None, [w(0), r(0), w(0)]),  # a warp alone
        (None, [w(0), barrier, r(1), r(0), barrier, w(1)]),
        (None, [copied(True), r(0), barrier, r(1)]),
        (None, [w(0), fence, barrier, multiplied(True), barrier, w(1)]),
        ("shared read of another warp's write", [w(0), r(1)]),
        ("shared write over another warp's read", [w(0), barrier, r(1), w(0)]),
        ("shared write over another warp's read", [w(0), barrier, r(0), r(1), w(0)]),  # also where it reads itself
        ("shared write over another warp's, no barrier", [w(0), w(1)]),
        ("shared read of a cp.async", [copied(False), r(0)]),
        ("shared read of another warp's write", [copied(True), r(1)]),  # waiting is no barrier
        ("shared write over a cp.async", [copied(False), w(0)]),
        ("shared read of what nobody wrote", [w(0), r(0, at=64)]),
        ("shared access out of bounds", [w(0, at=1000)]),
        ("misaligned shared access", [w(0, at=2)]),
        ("wgmma reads a warp's write", [w(0), fence, multiplied(True)]),
        ("wgmma reads a write that no fence", [w(0), barrier, multiplied(True)]),
        ("wgmma reads a cp.async", [copied(False), fence, barrier, multiplied(True)]),
        ("what a wgmma reads that is not waited for", [w(0), fence, barrier, multiplied(False), w(0)]),
    ],
)
def test_accesses(fault: str | None, accesses: list[Access]):
    found = play(*accesses)
    assert not found if fault is None else any(fault in kind for kind in found), found
