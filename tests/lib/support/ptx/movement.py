"""Instructions that move data: between registers and memory, and between the threads of a warp."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray

from support.ptx.operands import BITS, TYPES, Builder, Run, Source, each_thread, nothing, opcode, size_of

if TYPE_CHECKING:
    from support.ptx.block import Block

WARP = 32


@opcode("ld")
def load(build: Builder) -> Run:
    read_as = (
        build.kind if issubclass(build.kind, np.signedinteger) else BITS[size_of(build.kind)]
    )  # a sign is extended
    if "param" in build.op:
        put, name = build.target(build.operands[0]), build.operands[1].strip("[] ")
        kind = build.register_kind(build.operands[0])
        return lambda block, mask: put(block, block.parameters[name].view(read_as).astype(kind), mask)
    if not {"shared", "global"} & set(build.op):
        raise build.unknown()
    shared, size, lanes = "shared" in build.op, size_of(build.kind), build.numbered("v")
    registers = build.group(build.operands[0])
    puts = [build.target(text) for text in registers]
    kinds = [BITS[size] if text == "_" else build.register_kind(text) for text in registers]
    address, where = build.address(build.operands[1]), build.where

    def run(block: Block, mask: ndarray | None) -> None:
        active = slice(None) if mask is None else np.flatnonzero(mask)
        at, warp = address(block)[active], block.warp[active]
        if shared:
            raw = block.shared.read(at, lanes * size, warp, where)
        else:
            raw = block.memory.read(at, lanes * size, block, warp, where)
        values = raw.view(read_as)
        for i, (put, kind) in enumerate(zip(puts, kinds, strict=True)):
            value = np.zeros(block.threads, kind)
            value[active] = values[:, i]
            put(block, value, mask)

    return run


@opcode("st")
def store(build: Builder) -> Run:
    if not {"shared", "global"} & set(build.op):
        raise build.unknown()
    shared, bits = "shared" in build.op, BITS[size_of(build.kind)]
    sources = [_narrowed(build, text, bits) for text in build.group(build.operands[1])]
    address, where = build.address(build.operands[0]), build.where

    def run(block: Block, mask: ndarray | None) -> None:
        active = slice(None) if mask is None else np.flatnonzero(mask)
        value = np.stack([each_thread(block, source(block))[active] for source in sources], 1).view(np.uint8)
        at, warp = address(block)[active], block.warp[active]
        if shared:
            block.shared.write(at, value, warp, where)
        else:
            block.memory.write(at, value, block, warp, where)

    return run


def _narrowed(build: Builder, text: str, bits: type) -> Source:
    """A stored operand, whose register may be wider than what is stored of it."""
    have = build.register_kind(text) if text in build.slots else bits
    source = build.source(text, have)
    return source if have is bits else lambda block: source(block).astype(bits)


@opcode("cp")
def copy_async(build: Builder) -> Run:
    if "commit_group" in build.op:
        return commit_copies
    if "wait_group" in build.op or "wait_all" in build.op:
        return wait_for_copies(0 if "wait_all" in build.op else int(build.operands[0]), build.where)
    if "async" not in build.op or "bulk" in build.op:
        raise build.unknown()
    to, source = build.address(build.operands[0]), build.address(build.operands[1])
    size, where = int(build.operands[2], 0), build.where
    taken = build.source(build.operands[3] if len(build.operands) > 3 else str(size), np.uint32)

    def run(block: Block, mask: ndarray | None) -> None:
        active = np.arange(block.threads) if mask is None else np.flatnonzero(mask)
        number = each_thread(block, taken(block))[active]
        value = np.zeros((len(active), size), np.uint8)  # what is not taken is zero
        at, warp = source(block)[active], block.warp[active]
        for bytes_taken in np.unique(number[number > 0]).tolist():
            lanes = np.flatnonzero(number == bytes_taken)
            value[lanes, :bytes_taken] = block.memory.read(at[lanes], bytes_taken, block, warp[lanes], where)
        index = block.shared.start_copy(to(block)[active], size, warp, where)
        block.open_copies.append((index, value, warp))

    return run


def commit_copies(block: Block, mask: ndarray | None) -> None:
    block.copies.append(block.open_copies)
    block.open_copies = []


def wait_for_copies(left: int, where: str) -> Run:
    def run(block: Block, mask: ndarray | None) -> None:
        if mask is not None:
            block.faults.add("a part of the threads waits for copies", where)
        while len(block.copies) > left:
            for copy in block.copies.pop(0):
                block.shared.finish_copy(*copy)

    return run


def whole_warps(block: Block, mask: ndarray | None, where: str) -> ndarray:
    """The warps that take part, of which each must do so as a whole."""
    if mask is None:
        return np.arange(block.threads // WARP)
    lanes = mask.reshape(-1, WARP)
    if (lanes.any(1) != lanes.all(1)).any():
        block.faults.add("a part of a warp runs what the whole warp must", where)
    return np.flatnonzero(lanes.any(1))


@opcode("ldmatrix")
def load_matrix(build: Builder) -> Run:
    """Loads count 8x8 matrices of 16-bit elements a warp; row i of matrix j is at the address of lane 8 j + i."""
    count, where = build.numbered("x"), build.where
    puts = [build.target(text) for text in build.group(build.operands[0])]
    address = build.address(build.operands[1])
    transposed = "trans" in build.op

    def run(block: Block, mask: ndarray | None) -> None:
        warps = whole_warps(block, mask, where)
        rows = address(block).reshape(-1, WARP)[warps, : 8 * count]
        raw = block.shared.read(rows.ravel(), 16, np.repeat(warps, 8 * count), where)
        tiles = raw.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            tiles = tiles.swapaxes(2, 3)
        values = np.ascontiguousarray(tiles).view(np.uint32).reshape(-1, count, WARP)
        for i, put in enumerate(puts):
            value = np.zeros((block.threads // WARP, WARP), np.uint32)
            value[warps] = values[:, i]
            put(block, value.ravel(), mask)

    return run


@opcode("stmatrix")
def store_matrix(build: Builder) -> Run:
    count, where = build.numbered("x"), build.where
    sources = [build.source(text, np.uint32) for text in build.group(build.operands[1])]
    address = build.address(build.operands[0])
    transposed = "trans" in build.op

    def run(block: Block, mask: ndarray | None) -> None:
        warps = whole_warps(block, mask, where)
        rows = address(block).reshape(-1, WARP)[warps, : 8 * count]
        values = np.stack([each_thread(block, source(block)).reshape(-1, WARP)[warps] for source in sources], 1)
        tiles = values.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            tiles = tiles.swapaxes(2, 3)
        value = np.ascontiguousarray(tiles).view(np.uint8).reshape(-1, 16)
        block.shared.write(rows.ravel(), value, np.repeat(warps, 8 * count), where)

    return run


@opcode("shfl")
def shuffle(build: Builder) -> Run:
    mode, where = build.op[2], build.where
    if int(build.operands[3], 0) != 31 or mode not in ("bfly", "idx"):
        raise build.unknown()
    put = build.target(build.operands[0].split("|")[0])
    a, b = build.source(build.operands[1], np.uint32), build.source(build.operands[2], np.uint32)

    def run(block: Block, mask: ndarray | None) -> None:
        whole_warps(block, mask, where)
        value = each_thread(block, a(block)).reshape(-1, WARP)
        by = each_thread(block, b(block)).reshape(-1, WARP).astype(np.int64)
        lane = np.arange(WARP) ^ by if mode == "bfly" else by & 31
        put(block, np.take_along_axis(value, lane, 1).ravel(), mask)

    return run


REDUCTIONS = {
    **{"max": np.maximum, "min": np.minimum, "add": np.add},
    **{"or": np.bitwise_or, "and": np.bitwise_and, "xor": np.bitwise_xor},
}


@opcode("redux")
def reduce_warp(build: Builder) -> Run:
    function, kind, where = REDUCTIONS[build.op[2]], TYPES[build.op[3]], build.where
    put, source = build.target(build.operands[0]), build.source(build.operands[1], kind)

    def run(block: Block, mask: ndarray | None) -> None:
        whole_warps(block, mask, where)
        total = function.reduce(each_thread(block, source(block)).reshape(-1, WARP), 1, dtype=kind)
        put(block, np.repeat(total, WARP), mask)

    return run


@opcode("vote")
def vote(build: Builder) -> Run:
    mode, where = build.op[2], build.where
    put, source = build.target(build.operands[0]), build.source(build.operands[1], np.bool_)

    def run(block: Block, mask: ndarray | None) -> None:
        whole_warps(block, mask, where)
        votes = each_thread(block, source(block)).reshape(-1, WARP)
        if mode == "ballot":
            result = np.packbits(votes, axis=1, bitorder="little").view(np.uint32)[:, 0]
        else:
            result = votes.any(1) if mode == "any" else votes.all(1)
        put(block, np.repeat(result, WARP), mask)

    return run


@opcode("fence")
def fence(build: Builder) -> Run:
    if "proxy" not in build.op:
        return nothing
    where = build.where

    def run(block: Block, mask: ndarray | None) -> None:
        if mask is not None:
            block.faults.add("a part of the threads fences", where)
        block.shared.unfenced.fill(False)

    return run
