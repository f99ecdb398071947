"""Instructions that compute one register of others, thread by thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

from support.ptx.operands import (
    BITS,
    TYPES,
    Builder,
    Run,
    each_thread,
    half_of,
    is_float,
    opcode,
    size_of,
    wide_of,
)

if TYPE_CHECKING:
    from support.ptx.block import Block

DOUBLE: dict[type, type] = {np.uint16: np.uint32, np.int16: np.int32, np.uint32: np.uint64, np.int32: np.int64}


def halves(function: Callable, build: Builder) -> Run:
    """On "f16", "bf16", or two of them in a register, computed in float64 and rounded through float32."""
    half = build.op[-1].removesuffix("x2")
    size = np.uint32 if build.op[-1].endswith("x2") else np.uint16
    put = build.target(build.operands[0])
    sources = [build.source(text, size) for text in build.operands[1:]]

    def run(block: Block, mask: ndarray | None) -> None:
        values = [wide_of(each_thread(block, source(block)).view(np.uint16), half) for source in sources]
        put(block, half_of(function(*values).astype(np.float32), half).view(size), mask)

    return run


def arithmetic(function: Callable, build: Builder) -> Run:
    if build.op[-1] in ("f16x2", "bf16x2", "f16", "bf16"):
        return halves(function, build)
    return build.elementwise(function, *[build.wrapping] * (len(build.operands) - 1))


@opcode("add")
def add(build: Builder) -> Run:
    return arithmetic(np.add, build)


@opcode("sub")
def sub(build: Builder) -> Run:
    return arithmetic(np.subtract, build)


@opcode("mul")
def mul(build: Builder) -> Run:
    kind = build.kind if build.op[-1] in TYPES else None
    if "wide" in build.op:
        return build.elementwise(lambda a, b: np.multiply(a, b, dtype=DOUBLE[kind]), kind, kind)
    if "hi" in build.op:
        big = DOUBLE[kind]
        shift = big(8 * size_of(kind))
        return build.elementwise(lambda a, b: (np.multiply(a, b, dtype=big) >> shift).astype(kind), kind, kind)
    return arithmetic(np.multiply, build)


@opcode("mad")
def mad(build: Builder) -> Run:
    if "wide" in build.op:
        kind, big = build.kind, DOUBLE[build.kind]
        unsigned = BITS[size_of(big)]
        return build.elementwise(lambda a, b, c: np.multiply(a, b, dtype=big).view(unsigned) + c, kind, kind, unsigned)
    if "lo" not in build.op:
        raise build.unknown()
    return build.elementwise(lambda a, b, c: a * b + c, *[build.wrapping] * 3)


@opcode("fma")
def fma(build: Builder) -> Run:
    if build.op[-1] != "f32":
        return halves(lambda a, b, c: a * b + c, build)
    return build.elementwise(
        lambda a, b, c: (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32), *[np.float32] * 3
    )


@opcode("div")
def div(build: Builder) -> Run:
    kind = build.kind
    if is_float(kind):
        return build.elementwise(np.divide, kind, kind)

    def divide(a: ndarray, b: ndarray) -> ndarray:
        """Rounds to zero; by zero, a card gives what nobody looks at."""
        b = np.where(b == 0, kind(1), b)
        if not issubclass(kind, np.signedinteger):
            return a // b
        return ((a - np.fmod(a, b)) // b).astype(kind)

    return build.elementwise(divide, kind, kind)


@opcode("rem")
def rem(build: Builder) -> Run:
    kind = build.kind
    return build.elementwise(lambda a, b: np.fmod(a, np.where(b == 0, kind(1), b)).astype(kind), kind, kind)


@opcode("neg")
def neg(build: Builder) -> Run:
    if build.op[-1] not in TYPES:
        return halves(np.negative, build)
    return build.elementwise(np.negative, build.kind)


@opcode("abs")
def absolute(build: Builder) -> Run:
    return build.elementwise(np.abs, build.kind)


@opcode("min", "max")
def extreme(build: Builder) -> Run:
    least = build.op[0] == "min"
    if build.op[-1] not in TYPES:
        return halves(np.fmin if least else np.fmax, build)
    if is_float(build.kind) and "NaN" not in build.op:
        return build.elementwise(np.fmin if least else np.fmax, build.kind, build.kind)
    return build.elementwise(np.minimum if least else np.maximum, build.kind, build.kind)


BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@opcode(*BITWISE)
def bitwise(build: Builder) -> Run:
    return build.elementwise(BITWISE[build.op[0]], build.kind, build.kind)


@opcode("not")
def invert(build: Builder) -> Run:
    return build.elementwise(np.invert, build.kind)


@opcode("shl")
def shift_left(build: Builder) -> Run:
    kind = build.wrapping
    bits = 8 * size_of(kind)

    def shift(a: Any, by: Any) -> ndarray:
        by = np.asarray(by)
        return np.where(by >= bits, kind(0), a << np.minimum(by, bits - 1).astype(kind))

    return build.elementwise(shift, kind, np.uint32)


@opcode("shr")
def shift_right(build: Builder) -> Run:
    kind = build.kind
    bits = 8 * size_of(kind)

    def shift(a: Any, by: Any) -> ndarray:
        by = np.asarray(by)
        shifted = a >> np.minimum(by, bits - 1).astype(kind)
        return shifted if issubclass(kind, np.signedinteger) else np.where(by >= bits, kind(0), shifted)

    return build.elementwise(shift, kind, np.uint32)


@opcode("bfe")
def bit_field(build: Builder) -> Run:
    kind = build.kind
    bits = 8 * size_of(kind)
    at, length = (int(text, 0) for text in build.operands[2:])
    if not 0 < length <= bits - at:
        raise build.unknown()
    put, source = build.target(build.operands[0]), build.source(build.operands[1], kind)
    up, down = kind(bits - at - length), kind(bits - length)  # a signed type fills with the sign
    return lambda block, mask: put(block, (source(block) << up) >> down, mask)


@opcode("popc")
def count_bits(build: Builder) -> Run:
    return build.elementwise(lambda a: np.bitwise_count(a).astype(np.uint32), build.kind)


@opcode("prmt")
def permute_bytes(build: Builder) -> Run:
    def permute(a: Any, b: Any, selector: Any) -> ndarray:
        both = np.asarray(b).astype(np.uint64) << np.uint64(32) | np.asarray(a).astype(np.uint64)
        out = np.zeros((), np.uint64)
        for i in range(4):
            chosen = np.asarray(selector).astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
            byte = both >> (chosen & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = (byte >> np.uint64(7)) * np.uint64(255)
            out = out | np.where(chosen & np.uint64(8), sign, byte) << np.uint64(8 * i)
        return out.astype(np.uint32)

    if len(build.op) > 2:
        raise build.unknown()
    return build.elementwise(permute, np.uint32, np.uint32, np.uint32)


@opcode("shf")
def funnel_shift(build: Builder) -> Run:
    if "wrap" not in build.op:
        raise build.unknown()
    left = "l" in build.op

    def funnel(low: Any, high: Any, by: Any) -> ndarray:
        by = np.asarray(by).astype(np.uint64) & np.uint64(31)
        both = np.asarray(high).astype(np.uint64) << np.uint64(32) | np.asarray(low).astype(np.uint64)
        return ((both << by) >> np.uint64(32) if left else both >> by).astype(np.uint32)

    return build.elementwise(funnel, np.uint32, np.uint32, np.uint32)


@opcode("lop3")
def logic_of_three(build: Builder) -> Run:
    table = int(build.operands.pop(), 0)

    def logic(a: Any, b: Any, c: Any) -> Any:
        out = np.uint32(0)
        for i in range(8):
            if table >> i & 1:
                out = out | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return out

    return build.elementwise(logic, np.uint32, np.uint32, np.uint32)


FUNCTIONS = {"ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "sqrt": np.sqrt}


@opcode(*FUNCTIONS)
def function_of_one(build: Builder) -> Run:
    if build.op[-1] != "f32":
        raise build.unknown()
    return build.elementwise(FUNCTIONS[build.op[0]], np.float32)


COMPARISONS: dict[str, Callable] = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal},
    **{"gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal},
    **{"hi": np.greater, "hs": np.greater_equal},
}


@opcode("setp")
def set_predicate(build: Builder) -> Run:
    comparison = build.op[1]
    if len(build.operands) != 3 or "|" in build.operands[0]:
        raise build.unknown()
    if not is_float(build.kind):
        return build.elementwise(COMPARISONS[comparison], build.kind, build.kind)
    unordered = comparison in ("equ", "neu", "ltu", "leu", "gtu", "geu")
    number = COMPARISONS.get(comparison[:2])

    def compare(a: Any, b: Any) -> ndarray:
        nan = np.isnan(a) | np.isnan(b)
        if comparison in ("num", "nan"):
            return ~nan if comparison == "num" else nan
        return number(a, b) | nan if unordered else number(a, b) & ~nan

    return build.elementwise(compare, build.kind, build.kind)


@opcode("selp")
def select(build: Builder) -> Run:
    bits = BITS[size_of(build.kind)]
    return build.elementwise(lambda a, b, p: np.where(p, a, b), bits, bits, np.bool_)


@opcode("mov")
def move(build: Builder) -> Run:
    """Of one register, or between one and the parts of a vector."""
    target, value = build.operands
    if build.op[-1] == "pred" or "{" not in target + value:
        return build.elementwise(lambda a: a, build.kind if build.op[-1] == "pred" else build.wrapping)
    whole = build.wrapping
    parts = build.group(target if "{" in target else value)
    part = BITS[size_of(whole) // len(parts)]
    if "{" in target:
        puts, source = [build.target(text) for text in parts], build.source(value, whole)

        def unpack(block: Block, mask: ndarray | None) -> None:
            values = each_thread(block, source(block)).view(part).reshape(-1, len(parts))
            for i, put in enumerate(puts):
                put(block, values[:, i].copy(), mask)

        return unpack
    sources, put = [build.source(text, part) for text in parts], build.target(target)

    def pack(block: Block, mask: ndarray | None) -> None:
        values = np.stack([each_thread(block, source(block)) for source in sources], 1)
        put(block, values.view(whole)[:, 0], mask)

    return pack


ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@opcode("cvt")
def convert(build: Builder) -> Run:
    """cvt[.rounding].to.from, of one number, or of two into the halves of a register."""
    to, source_kind = build.op[-2:]
    if to in ("bf16x2", "f16x2"):
        half = to.removesuffix("x2")
        put = build.target(build.operands[0])
        high, low = (build.source(text, np.float32) for text in build.operands[1:])

        def pair(block: Block, mask: ndarray | None) -> None:
            both = [half_of(each_thread(block, source(block)), half) for source in (low, high)]
            put(block, np.stack(both, 1).view(np.uint32)[:, 0], mask)

        return pair
    if "sat" in build.op:
        raise build.unknown()
    put, text = build.target(build.operands[0]), build.operands[1]
    have = build.register_kind(text)
    want = np.uint16 if source_kind == "bf16" else BITS[size_of(TYPES[source_kind])]
    room = BITS[size_of(build.register_kind(build.operands[0]))]
    source = build.source(text, have)

    def run(block: Block, mask: ndarray | None) -> None:
        value = source(block)
        if have is not want:  # a register may be wider than the type
            value = value.astype(want)
        value = wide_of(value, "bf16").astype(np.float32) if source_kind == "bf16" else value.view(TYPES[source_kind])
        if to == "bf16":
            value = half_of(value.astype(np.float32), "bf16")
        else:
            if is_float(value.dtype.type) and not is_float(TYPES[to]):
                value = ROUNDINGS[build.op[1]](value)
            value = value.astype(TYPES[to])
            if value.dtype.itemsize != size_of(room):  # signs are extended
                value = value.astype(room)
        put(block, value, mask)

    return run
