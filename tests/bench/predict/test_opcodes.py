"""Classes and costs of instructions, and those of one loop counted by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from predict.flow import basic_blocks, natural_loops
from predict.machines import machine
from predict.opcodes import UnknownInstruction, classify, cost
from predict.sass import Instruction, decode, parse

H200, A100 = machine("h200", Path("none")), machine("a100", Path("none"))


def test_an_unknown_instruction_is_an_error():
    with pytest.raises(UnknownInstruction, match="XYZZY"):
        classify(decode(0x40, "XYZZY.X R1, R2", 0))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("SHF.R.U32.HI R1, RZ, R2, R3", "logic"),
        ("SHFL.BFLY PT, R1, R2, 0x10, 0x1f", "shuffle"),
        ("IMAD.WIDE.U32 R2, R3, R4, RZ", "imad_wide"),
        ("IMAD.HI.U32 R2, R3, R4, RZ", "imad_wide"),
        ("IMAD.MOV.U32 R2, RZ, RZ, R3", "imad_move"),
        ("IMAD R2, R3, R4, R5", "imad"),
        ("USHF.R.S32.HI UR5, URZ, 0x1f, UR4", "uniform"),
        ("LDS.128 R4, [R1]", "load_shared"),
        ("LDSM.16.M88.4 R4, [R1]", "load_matrix"),
        ("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", "async_copy"),
        ("LDGDEPBAR", "copy_group"),
    ],
)
def test_classes(text: str, kind: str):
    """Names that begin alike are not alike."""
    assert classify(decode(0, text, 0)) == kind


@pytest.mark.parametrize(
    ("text", "pipe", "cycles", "shared"),
    [
        ("LOP3.LUT R1, R2, R3, RZ, 0x3c, !PT", "alu", 2, 0),
        ("FFMA R1, R2, R3, R4", "fp32", 1, 0),
        ("MUFU.EX2 R1, R2", "xu", 8, 0),
        # A of 64 x 16 and B of 16 x 32 at 128 bytes a cycle, and a warp's quarter of both
        ("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "tensor", 16, (16 + 8) / 4),
        ("HGMMA.64x32x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0", "tensor", 16, 8 / 4),
        ("LDSM.16.M88.4 R4, [R1]", "", 0, 4),
        ("LDS.128 R4, [R1]", "", 0, 4),
        ("STG.E desc[UR4][R2.64], R5", "", 0, 1),
        ("SHFL.BFLY PT, R1, R2, 0x10, 0x1f", "", 0, 1),
        ("@!PT LDS.128 R4, [R1]", "", 0, 0),
    ],
)
def test_costs(text: str, pipe: str, cycles: float, shared: float):
    price = cost(decode(0, text, 0), H200)
    assert (price.pipe, price.cycles, price.shared) == (pipe, cycles, shared)


def test_older_cards_have_half_of_the_fp32_lanes():
    assert cost(decode(0, "FADD R1, R2, R3", 0), A100).cycles == 2


def main_loop() -> list[Instruction]:
    """The loop over d of a shrink kernel without dropout: 64 tokens, 64 columns of x, 64 + 16 of rank, 8 warps."""
    text = Path(__file__).with_name("shrink_sm90.sass").read_text()
    loops = natural_loops(basic_blocks(parse(text)["shrink_kernel"]))
    return max((loop.instructions for loop in loops), key=len)


def test_the_shared_memory_of_a_loop_counted_by_hand():
    """Cycles of 128 bytes that 8 warps need in an iteration."""
    cycles: Counter[str] = Counter()
    for instruction in main_loop():
        cycles[classify(instruction)] += 8 * cost(instruction, H200).shared
    assert {kind: count for kind, count in cycles.items() if count} == {
        "async_copy": (64 * 64 + 64 * (64 + 16)) * 2 / 128,  # bfloat16 tiles of x and of A
        # 4 steps of 16 by 2 warpgroups, each with half of a bank's columns: A 16 cycles, B a quarter of the columns
        "wgmma": 4 * 2 * (16 + 32 / 4) + 4 * 2 * (16 + 8 / 4),
        # the column sums take x and the ones in fragments, of 8 x 8 numbers each
        "load_matrix": 128 + 64,
        "shuffle": 6 * 8,
        "store_shared": 8 * 2,
        "load_shared": 8 * 1,
        "store": 8 * 1,
    }
    assert sum(cycles.values()) == 752


def test_the_instructions_of_a_loop_counted_by_hand():
    kinds = Counter(map(classify, main_loop()))
    assert kinds["wgmma"] == 2 * 4  # two banks, 64 columns of x in steps of 16
    assert kinds["async_copy"] == 2 + 2 + 1  # 8 KB of x, 8 and 2 KB of A by 256 threads, 16 or 8 bytes each
    assert kinds["barrier"] == 3
    assert sum(kinds.values()) == 147
