"""Instructions of PTX and their operands, as functions of a block."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

if TYPE_CHECKING:
    from support.ptx.block import Block

Run = Callable[["Block", "ndarray | None"], None]  # with the mask of the threads that take part; None: all do
Source = Callable[["Block"], Any]

TYPES: dict[str, type] = {
    **{f"{letter}8": np.uint8 for letter in "bu"},
    **{f"{letter}16": np.uint16 for letter in "bu"},
    **{f"{letter}32": np.uint32 for letter in "bu"},
    **{f"{letter}64": np.uint64 for letter in "bu"},
    **{"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64},
    **{"f16": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.bool_},
}
BITS: dict[int, type] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # registers' types, by bytes
SHARED_BASE = 1024  # the address of a block's shared memory: a card keeps the first KB for itself
SPECIAL = ("tid", "ctaid", "nctaid", "ntid")

OPCODES: dict[str, Callable[[Builder], Run]] = {}


def opcode(*names: str) -> Callable:
    """Register what builds these instructions, by the first part of their names."""

    def register(build: Callable[[Builder], Run]) -> Callable:
        OPCODES.update(dict.fromkeys(names, build))
        return build

    return register


def size_of(kind: type) -> int:
    return np.dtype(kind).itemsize


def is_float(kind: type) -> bool:
    return issubclass(kind, np.floating)


def wide_of(bits: ndarray, half: str) -> ndarray:
    """float64 of the bits of "f16" or "bf16"."""
    if half == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def half_of(numbers: ndarray, half: str) -> ndarray:
    """The bits of "f16" or "bf16", rounded to nearest even, of float32."""
    if half == "f16":
        return numbers.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(numbers), np.uint16(0x7FFF), rounded.astype(np.uint16))


@dataclass
class Instruction:
    """One instruction; `run` does what it does, but for control flow."""

    op: list[str]  # its name's parts
    operands: list[str]
    guard: tuple[int, bool] | None  # register of a predicate, and whether it is negated
    text: str
    where: str
    run: Run
    control: str = ""  # "barrier", "branch", "exit"


def nothing(block: Block, mask: ndarray | None) -> None:
    """What an instruction does that only orders others, or moves the program counter."""


class Builder:
    """What an instruction is built with: its parts, and its operands as functions of a block."""

    def __init__(self, op: list[str], operands: list[str], text: str, where: str, slots: dict, kinds: list) -> None:
        self.op, self.operands, self.text, self.where = op, operands, text, where
        self.slots: dict[str, int] = slots  # of registers
        self.kinds: list[type] = kinds  # of slots

    def unknown(self) -> NotImplementedError:
        return NotImplementedError(f"the executor does not know {self.text!r} of {self.where}")

    @property
    def kind(self) -> type:
        """The type that the name ends in."""
        return TYPES[self.op[-1]]

    @property
    def wrapping(self) -> type:
        """The same, unsigned for integers, which add and multiply without a warning."""
        return self.kind if is_float(self.kind) else BITS[size_of(self.kind)]

    def register_kind(self, text: str) -> type:
        return self.kinds[self.slots[text]]

    def source(self, text: str, kind: type) -> Source:
        """An operand's bits as numbers of a type: an array, or a scalar for a constant."""
        if text in self.slots:
            slot, have = self.slots[text], self.register_kind(text)
            if have is kind:
                return lambda block: block.registers[slot]
            if size_of(have) != size_of(kind):
                raise self.unknown()
            return lambda block: block.registers[slot].view(kind)
        special = re.fullmatch(r"%(\w+)\.([xyz])", text)
        if special and special[1] in SPECIAL:
            return lambda block: block.special(special[1], "xyz".index(special[2])).view(kind)
        value = self.constant(text, kind)
        return lambda block: value

    def constant(self, text: str, kind: type) -> Any:
        if text == "global_smem":
            bits = SHARED_BASE
        elif text[:2].lower() in ("0f", "0d"):
            bits = int(text[2:], 16)
        else:
            bits = int(text.rstrip("U"), 0)
        if kind is np.bool_:
            return np.bool_(bits != 0)
        unsigned = BITS[size_of(kind)]
        return np.array(bits & (2 ** (8 * size_of(kind)) - 1), unsigned).view(kind)[()]

    def target(self, text: str) -> Callable[[Block, Any, ndarray | None], None]:
        """A function that sets a register, where the mask says so."""
        if text == "_":
            return lambda block, value, mask: None
        slot, kind = self.slots[text], self.register_kind(text)

        def put(block: Block, value: Any, mask: ndarray | None) -> None:
            value = np.asarray(value)
            if value.dtype != kind:
                value = value.view(kind)
            if value.ndim == 0:
                value = np.full(block.threads, value)
            block.registers[slot] = value if mask is None else np.where(mask, value, block.registers[slot])

        return put

    def address(self, text: str) -> Source:
        """The addresses of an operand like [%rd1+16]."""
        inside = re.fullmatch(r"\[\s*(%?\w+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if inside is None:
            raise self.unknown()
        offset = int(inside[2] or 0)
        if inside[1] == "global_smem":
            return lambda block: np.full(block.threads, SHARED_BASE + offset, np.uint32)
        slot, kind = self.slots[inside[1]], self.register_kind(inside[1])
        delta = np.array(offset % 2 ** (8 * size_of(kind)), kind)[()]
        return lambda block: block.registers[slot] + delta

    @staticmethod
    def group(text: str) -> list[str]:
        """The elements of a vector operand, or the operand alone."""
        return [each.strip() for each in text.strip("{} ").split(",")]

    def numbered(self, letter: str, default: int = 1) -> int:
        """The number in a part of the name such as x4 or v2."""
        return next((int(part[1:]) for part in self.op if re.fullmatch(letter + r"\d+", part)), default)

    def elementwise(self, function: Callable, *kinds: type) -> Run:
        """The first operand is the function of the others, which have these types."""
        put = self.target(self.operands[0])
        sources = [self.source(text, kind) for text, kind in zip(self.operands[1:], kinds, strict=True)]
        if len(sources) == 1:
            (a,) = sources
            return lambda block, mask: put(block, function(a(block)), mask)
        if len(sources) == 2:
            a, b = sources
            return lambda block, mask: put(block, function(a(block), b(block)), mask)
        a, b, c = sources
        return lambda block, mask: put(block, function(a(block), b(block), c(block)), mask)


def each_thread(block: Block, value: Any) -> ndarray:
    """A value for each thread, contiguous."""
    return np.ascontiguousarray(np.broadcast_to(value, (block.threads,)))
