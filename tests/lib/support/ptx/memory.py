"""Global and shared memory, in which every byte knows who wrote and who read it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy import ndarray

from support.ptx.faults import Faults
from support.ptx.operands import BITS, SHARED_BASE

if TYPE_CHECKING:
    from support.ptx.block import Block

ALL_BITS = {"masks_ptr"}  # tensors of which any word may be what fresh memory is filled with
NOBODY, SEVERAL = -1, -2  # in place of the number of a block or warp
POISON = 0xFF  # shared memory that nobody wrote: NaN in every format


class Segment:
    """A tensor's storage, and for every byte who wrote and who read it in this launch."""

    def __init__(self, storage: torch.UntypedStorage, dtype: torch.dtype, name: str) -> None:
        self.base, self.size, self.name = storage.data_ptr(), storage.nbytes(), name
        self.data = np.ctypeslib.as_array((ctypes.c_uint8 * self.size).from_address(self.base))
        number = torch.nan if dtype.is_floating_point else None if dtype == torch.bool else torch.iinfo(dtype).max
        if name in ALL_BITS:
            number = None
        # what torch fills fresh memory with, as tests/conftest.py asks it to
        self.poison = None if number is None else torch.full((1,), number, dtype=dtype).view(torch.uint8).numpy()
        self.writer, self.reader = (np.full(self.size, NOBODY, np.int32) for _ in range(2))  # blocks
        # within a block: the last warp, and in which interval between barriers
        self.writing_warp, self.reading_warp = (np.full(self.size, NOBODY, np.int8) for _ in range(2))
        self.written_in, self.read_in = (np.full(self.size, -1, np.int32) for _ in range(2))

    def holds_poison(self, value: ndarray) -> bool:
        """Whether any element among the bytes (lanes, bytes) is one that nobody wrote."""
        if self.poison is None or value.shape[1] < len(self.poison):
            return False
        bits = BITS[len(self.poison)]
        return bool((value.view(bits) == self.poison.view(bits)).any())


def mark_readers(readers: ndarray, index: ndarray, who: ndarray | int) -> None:
    """Note in `readers` who reads the bytes; the same byte may occur for several readers."""
    before = readers[index]
    now = np.where((before == NOBODY) | (before == who), who, SEVERAL)
    readers[index] = now
    lost = readers[index] != now
    if lost.any():
        readers[index[lost]] = SEVERAL


class GlobalMemory:
    """Global memory of a launch: the storages of its tensors, and nothing else."""

    def __init__(self, segments: list[Segment], faults: Faults) -> None:
        self.segments = sorted(segments, key=lambda segment: segment.base)
        self.bases = np.array([segment.base for segment in self.segments], np.uint64)
        self.faults = faults

    def _pieces(self, address: ndarray, size: int, where: str) -> Iterator[tuple[Segment, ndarray | slice, ndarray]]:
        """Segment, lanes, and the offsets (lanes, size) of their bytes; lanes out of bounds are left out."""
        if (address % np.uint64(size)).any():
            self.faults.add("misaligned global access", where)
        owner = np.searchsorted(self.bases, address, "right") - 1
        span = np.arange(size)
        owners = [int(owner[0])] if (owner == owner[0]).all() else np.unique(owner).tolist()
        for number in owners:
            lanes = np.flatnonzero(owner == number) if len(owners) > 1 else slice(None)
            if number < 0:
                self.faults.add("global access out of bounds", where)
                continue
            segment = self.segments[number]
            offset = (address[lanes] - np.uint64(segment.base)).astype(np.int64)
            within = offset + size <= segment.size
            if not within.all():
                self.faults.add("global access out of bounds", f"{where}, past {segment.name}")
                lanes = np.arange(len(address))[lanes][within]
                offset = offset[within]
            if len(offset):
                yield segment, lanes, offset[:, None] + span

    def read(self, address: ndarray, size: int, block: Block, warp: ndarray, where: str) -> ndarray:
        """The bytes (lanes, size) at each lane's address."""
        out = np.full((len(address), size), POISON, np.uint8)
        for segment, lanes, index in self._pieces(address, size, where):
            value = segment.data[index]
            out[lanes] = value
            if segment.holds_poison(value):
                self.faults.add("global read of what nobody wrote", f"{where}: {segment.name}")
            writer, warps = segment.writer[index], warp[lanes][:, None]
            if ((writer != NOBODY) & (writer != block.number)).any():
                self.faults.add("race: a program reads what another of the launch wrote", f"{where}: {segment.name}")
            if (writer == block.number).any():
                fresh = (writer == block.number) & (segment.written_in[index] == block.interval)
                if (fresh & (segment.writing_warp[index] != warps)).any():
                    self.faults.add("race: global read of another warp's write, no barrier", f"{where}: {segment.name}")
            mark_readers(segment.reader, index, block.number)
            stale = segment.read_in[index] != block.interval
            if stale.any():
                segment.reading_warp[index[stale]] = NOBODY
            segment.read_in[index] = block.interval
            mark_readers(segment.reading_warp, index, warps)
        return out

    def write(self, address: ndarray, values: ndarray, block: Block, warp: ndarray, where: str) -> None:
        """Store the bytes (lanes, size) of each lane at its address."""
        for segment, lanes, index in self._pieces(address, values.shape[1], where):
            value, warps = values[lanes], warp[lanes][:, None]
            writer, reader = segment.writer[index], segment.reader[index]
            if ((writer != NOBODY) & (writer != block.number)).any():
                self.faults.add("race: two programs of a launch write a byte", f"{where}: {segment.name}")
            if ((reader != NOBODY) & (reader != block.number)).any():
                self.faults.add("race: a program writes what another of the launch reads", f"{where}: {segment.name}")
            mine = (writer == block.number) & (segment.written_in[index] == block.interval)
            if (mine & (segment.writing_warp[index] != warps) & (segment.data[index] != value)).any():
                self.faults.add("race: global write over another warp's, no barrier", f"{where}: {segment.name}")
            read = (segment.read_in[index] == block.interval) & (segment.reading_warp[index] != warps)
            if (read & (reader == block.number)).any():
                self.faults.add("race: global write over another warp's read, no barrier", f"{where}: {segment.name}")
            segment.writer[index], segment.written_in[index] = block.number, block.interval
            segment.writing_warp[index] = warps
            segment.data[index] = value
            if (segment.data[index] != value).any():
                self.faults.add("race: lanes of a store write different values to a byte", f"{where}: {segment.name}")


class SharedMemory:
    """A block's shared memory; for every byte the warps that wrote and read it since the last barrier."""

    def __init__(self, size: int, faults: Faults) -> None:
        self.size = SHARED_BASE + size
        self.faults = faults
        self.data = np.full(self.size, POISON, np.uint8)
        self.writer, self.reader = (np.full(self.size, NOBODY, np.int8) for _ in range(2))  # warps
        self.copying = np.full(self.size, NOBODY, np.int8)  # the warp of a cp.async that is not waited for
        self.multiplying = np.zeros(self.size, np.int16)  # how many wgmma that are not waited for read it
        self.written = np.zeros(self.size, np.bool_)
        self.unfenced = np.zeros(self.size, np.bool_)  # written, and no fence.proxy.async since

    def barrier(self) -> None:
        self.writer.fill(NOBODY)
        self.reader.fill(NOBODY)

    def _index(self, address: ndarray, size: int, where: str) -> ndarray:
        at = address.astype(np.int64)
        if (at % size).any():
            self.faults.add("misaligned shared access", where)
        if at.min() < SHARED_BASE or at.max() + size > self.size:
            self.faults.add("shared access out of bounds", where)
            at = np.clip(at, SHARED_BASE, self.size - size)
        return at[:, None] + np.arange(size)

    def read(self, address: ndarray, size: int, warp: ndarray, where: str) -> ndarray:
        index, warps = self._index(address, size, where), warp[:, None]
        writer = self.writer[index]
        if ((writer != NOBODY) & (writer != warps)).any():
            self.faults.add("race: shared read of another warp's write, no barrier", where)
        if (self.copying[index] != NOBODY).any():
            self.faults.add("race: shared read of a cp.async that is not waited for", where)
        if not self.written[index].all():
            self.faults.add("shared read of what nobody wrote", where)
        mark_readers(self.reader, index, warps)
        return self.data[index]

    def write(self, address: ndarray, value: ndarray, warp: ndarray, where: str) -> None:
        index = self._index(address, value.shape[1], where)
        self._overwrite(index, warp, where)
        self.writer[index] = warp[:, None]
        self.written[index] = True
        self.data[index] = value
        if (self.data[index] != value).any():
            self.faults.add("race: lanes of a store write different values to a shared byte", where)

    def start_copy(self, address: ndarray, size: int, warp: ndarray, where: str) -> ndarray:
        """Begin a cp.async into each lane's address; `finish_copy` takes the result."""
        index = self._index(address, size, where)
        self._overwrite(index, warp, where)
        self.copying[index] = warp[:, None]
        self.data[index] = POISON  # neither the old nor the new value can be relied on
        return index

    def finish_copy(self, index: ndarray, value: ndarray, warp: ndarray) -> None:
        """The copy has been waited for: its own warp may read it, others after a barrier."""
        self.data[index] = value
        self.copying[index] = NOBODY
        self.writer[index] = warp[:, None]
        self.written[index] = True

    def _overwrite(self, index: ndarray, warp: ndarray, where: str) -> None:
        reader, writer = self.reader[index], self.writer[index]
        if ((reader != NOBODY) & (reader != warp[:, None])).any():
            self.faults.add("race: shared write over another warp's read, no barrier", where)
        if ((writer != NOBODY) & (writer != warp[:, None])).any():
            self.faults.add("race: shared write over another warp's, no barrier", where)
        if (self.copying[index] != NOBODY).any():
            self.faults.add("race: shared write over a cp.async that is not waited for", where)
        if self.multiplying[index].any():
            self.faults.add("race: shared write over what a wgmma reads that is not waited for", where)
        self.unfenced[index] = True

    def start_multiply(self, index: ndarray, where: str) -> ndarray:
        """A wgmma reads these bytes, by the async proxy and for four warps; `finish_multiply` takes the result."""
        index = np.unique(index)
        if index[0] < SHARED_BASE or index[-1] >= self.size:
            self.faults.add("shared access out of bounds", where)
            index = index[(index >= SHARED_BASE) & (index < self.size)]
        if (self.writer[index] != NOBODY).any():
            self.faults.add("race: wgmma reads a warp's write, no barrier", where)
        if (self.copying[index] != NOBODY).any():
            self.faults.add("race: wgmma reads a cp.async that is not waited for", where)
        if self.unfenced[index].any():
            self.faults.add("race: wgmma reads a write that no fence.proxy.async follows", where)
        if not self.written[index].all():
            self.faults.add("shared read of what nobody wrote", where)
        self.multiplying[index] += 1
        return index

    def finish_multiply(self, index: ndarray) -> None:
        self.multiplying[index] -= 1
