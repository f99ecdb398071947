"""Matrix products: mma.sync of one warp, and wgmma of four. Products are summed exactly and rounded once."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray

from support.ptx.movement import WARP, whole_warps
from support.ptx.operands import Builder, Run, Source, each_thread, nothing, opcode, wide_of

if TYPE_CHECKING:
    from support.ptx.block import Block

ROW, COLUMN = np.arange(WARP) // 4, np.arange(WARP) % 4 * 2  # of a lane's first element in an 8x8 part of a fragment
GROUP_THREADS = 128


def left_fragments(registers: list[ndarray], half: str) -> ndarray:
    """The 16x16 left operand of each warp, of the four registers (warps, 32) that hold it."""
    out = np.empty((len(registers[0]), 16, 16))
    for register, (row, column) in zip(registers, ((0, 0), (8, 0), (0, 8), (8, 8)), strict=True):
        pair = wide_of(register.view(np.uint16), half).reshape(-1, WARP, 2)
        out[:, ROW + row, COLUMN + column], out[:, ROW + row, COLUMN + column + 1] = pair[..., 0], pair[..., 1]
    return out


def right_fragments(registers: list[ndarray], half: str) -> ndarray:
    """The 16x8 right operand of each warp, of its two registers (warps, 32)."""
    out = np.empty((len(registers[0]), 16, 8))
    for register, row in zip(registers, (0, 8), strict=True):
        pair = wide_of(register.view(np.uint16), half).reshape(-1, WARP, 2)
        out[:, COLUMN + row, ROW], out[:, COLUMN + row + 1, ROW] = pair[..., 0], pair[..., 1]
    return out


def accumulators(product: ndarray) -> list[ndarray]:
    """The registers (warps, 32) that hold products (warps, 16, columns), four for every eight columns."""
    return [
        product[:, ROW + row, first + COLUMN + column]
        for first in range(0, product.shape[2], 8)
        for row, column in ((0, 0), (0, 1), (8, 0), (8, 1))
    ]


@opcode("mma")
def mma(build: Builder) -> Run:
    half, where = build.op[-2], build.where
    types = [build.op[-4], build.op[-3], build.op[-2], build.op[-1]]
    if "m16n8k16" not in build.op or half not in ("f16", "bf16") or types != ["f32", half, half, "f32"]:
        raise build.unknown()
    groups = [build.group(text) for text in build.operands]
    puts = [build.target(text) for text in groups[0]]
    A, B = ([build.source(text, np.uint32) for text in group] for group in groups[1:3])
    C = [build.source(text, np.float32) for text in groups[3]]

    def run(block: Block, mask: ndarray | None) -> None:
        whole_warps(block, mask, where)

        def registers(sources: list[Source]) -> list[ndarray]:
            return [each_thread(block, source(block)).reshape(-1, WARP) for source in sources]

        product = left_fragments(registers(A), half) @ right_fragments(registers(B), half)
        for put, new, old in zip(puts, accumulators(product), registers(C), strict=True):
            put(block, (new + old).astype(np.float32).ravel(), mask)

    return run


def operand_addresses(descriptor: int, rows: int, transposed: bool) -> ndarray:
    """Byte addresses (rows, 16) of a wgmma operand's elements; the second axis is the one that is summed over.

    The descriptor's fields and the swizzles are those of the PTX manual, "Asynchronous warpgroup level matrix shared
    memory layout".
    """
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise NotImplementedError("a wgmma descriptor with a base offset")
    swizzle = {0: 0, 1: 3, 2: 2, 3: 1}[descriptor >> 62]  # how many address bits: none, or 128, 64, 32 bytes
    width = 16 << swizzle
    m, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if transposed and swizzle:
        chunk = m // 8
        at = m % 8 * 2 + chunk % (1 << swizzle) * 16 + (chunk >> swizzle) * leading + k % 8 * width + k // 8 * stride
    elif transposed:
        at = m % 8 * 2 + m // 8 * stride + k % 8 * 16 + k // 8 * leading
    elif swizzle:
        at = m % 8 * width + m // 8 * stride + k * 2
    else:
        at = m % 8 * 16 + m // 8 * stride + k // 8 * leading + k % 8 * 2
    at = at + start
    return at ^ (at >> 7 & (1 << swizzle) - 1) << 4


@opcode("wgmma")
def wgmma(build: Builder) -> Run:
    what = build.op[1]
    if what == "fence":
        return nothing
    if what == "commit_group":
        return commit_products
    if what == "wait_group":
        return wait_for_products(int(build.operands[0]))
    if what != "mma_async" or build.op[5] != "f32" or build.op[-1] != build.op[-2]:
        raise build.unknown()
    return Wgmma(build).run


def commit_products(block: Block, mask: ndarray | None) -> None:
    block.products.append(block.open_products)
    block.open_products = []


def wait_for_products(left: int) -> Run:
    def run(block: Block, mask: ndarray | None) -> None:
        while len(block.products) > left:
            for index, _ in block.products.pop(0):
                block.shared.finish_multiply(index)
        later = {slot for group in [*block.products, block.open_products] for _, slots in group for slot in slots}
        for slot in [slot for slot in block.unread if slot not in later]:
            block.registers[slot] = block.unread.pop(slot)

    return run


class Wgmma:
    """D = A B + D of a warpgroup: D (64, N) in registers, A (64, 16) in either, and B (16, N) in shared memory."""

    def __init__(self, build: Builder) -> None:
        shape = re.fullmatch(r"m64n(\d+)k16", build.op[4])
        self.half, self.where = build.op[-1], build.where
        operands = build.operands
        if shape is None or self.half not in ("f16", "bf16") or [int(text) for text in operands[4:6]] != [1, 1]:
            raise build.unknown()
        self.columns = int(shape[1])
        self.D = [build.slots[text] for text in build.group(operands[0])]
        self.registers = [build.slots[t] for t in build.group(operands[1])] if "{" in operands[1] else None
        self.A = build.source(operands[1], np.uint64) if self.registers is None else None
        self.B, self.adds = build.source(operands[2], np.uint64), build.source(operands[3], np.bool_)
        self.A_transposed = self.registers is None and bool(int(operands[6]))
        self.B_transposed = bool(int(operands[-1]))

    def _shared(self, block: Block, descriptors: ndarray, rows: int, transposed: bool) -> ndarray:
        """An operand (rows, 16) in shared memory."""
        if (descriptors != descriptors[0]).any():
            block.faults.add("a wgmma descriptor differs within its warpgroup", self.where)
        at = operand_addresses(int(descriptors[0]), rows, transposed)
        index = at[..., None] + np.arange(2)
        block.open_products.append((block.shared.start_multiply(index, self.where), self.D))
        raw = block.shared.data[np.minimum(index, block.shared.size - 1)]
        return wide_of(raw.view(np.uint16)[..., 0], self.half)

    def run(self, block: Block, mask: ndarray | None) -> None:
        if mask is not None:
            block.faults.add("a part of the threads runs a wgmma", self.where)
        old = [block.unread.get(slot, block.registers[slot]) for slot in self.D]
        new = [np.empty(block.threads, np.float32) for _ in self.D]
        for first in range(0, block.threads, GROUP_THREADS):
            lanes = slice(first, first + GROUP_THREADS)
            B = self._shared(block, each_thread(block, self.B(block))[lanes], self.columns, self.B_transposed)
            if self.registers is None:
                A = self._shared(block, each_thread(block, self.A(block))[lanes], 64, self.A_transposed)
            else:
                parts = [block.registers[slot][lanes].reshape(-1, WARP) for slot in self.registers]
                A = left_fragments(parts, self.half).reshape(64, 16)
            adds = each_thread(block, self.adds(block))[lanes]
            sums = accumulators((A @ B.T).reshape(4, 16, self.columns))
            for register, product, before in zip(new, sums, old, strict=True):
                register[lanes] = product.ravel() + np.where(adds, before[lanes].view(np.float32), np.float32(0))
        for slot, value in zip(self.D, new, strict=True):
            block.unread[slot] = value.view(np.uint32)
            block.registers[slot] = np.full(block.threads, 0xFFFFFFFF, np.uint32)  # NaN until it is waited for
