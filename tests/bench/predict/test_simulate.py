"""The simulated multiprocessor on programs whose time follows from a division."""

from __future__ import annotations

from pathlib import Path

import pytest

from predict.machines import machine
from predict.sass import Instruction, decode
from predict.simulate import Access, simulate, step

H200 = machine("h200", Path("none"))
FREE = Access()


def instruction(text: str, stall: int = 1, write: int = 7, wait: int = 0) -> Instruction:
    return decode(0, text, (wait << 11 | 7 << 8 | write << 5 | 16 | stall) << 41)


def cycles(*program: tuple[Instruction, Access], times: int = 100, warps: int = 8, blocks: int = 1) -> float:
    steps = [step(i, H200, access) for i, access in program] * times
    return simulate(steps, H200, warps, blocks, blocks).cycles


ADD = instruction("IADD3 R1, R2, R3, RZ")
FMA = instruction("FFMA R1, R2, R3, R4")
SHARED = instruction("LDS.128 R4, [R1]")
WIDE = instruction("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0")


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ([FMA], 2 * 100),  # 8 warps on 4 sub-partitions: two a cycle share an issue slot
        ([ADD], 2 * 2 * 100),  # 16 lanes
        ([SHARED], 8 * 4 * 100),  # 512 bytes at 128 a cycle, one data path for all
        ([WIDE], 8 * 100 * (16 + 64 / 4) / 4),  # operands in shared memory; the tensor core would take half as long
        ([FMA, ADD], 2 * 2 * 100),  # both pipes at once
    ],
    ids=["fp32", "alu", "shared memory", "wgmma", "two pipes"],
)
def test_a_resource_that_is_all_used_sets_the_time(program: list[Instruction], expected: float):
    found = cycles(*((i, FREE) for i in program))
    assert found == pytest.approx(expected, rel=0.1)


def test_a_lone_warp_waits_for_its_stall_counts():
    assert cycles((instruction("FADD R1, R1, R2", stall=5), FREE), warps=1) == pytest.approx(5 * 100, rel=0.02)


def test_a_scoreboard_holds_its_reader_back():
    load = instruction("LDG.E R4, desc[UR4][R2.64]", write=0)
    use = instruction("FADD R1, R4, R2", wait=1)
    near, far = (
        cycles((load, access), (use, FREE), times=10, warps=1) for access in (Access(128, 0), Access(128, 128))
    )
    assert near == pytest.approx(10 * H200["l2_latency"], rel=0.1)
    assert far == pytest.approx(10 * H200["memory_latency"], rel=0.1)


def test_reading_and_writing_go_no_faster_than_memory():
    load, store = instruction("LDG.E.128 R4, desc[UR4][R2.64]"), instruction("STG.E.128 desc[UR4][R2.64], R4")
    access = Access(512, 512)
    found = cycles((load, access), (store, access), times=200, blocks=4)
    assert found == pytest.approx(2 * 512 * 200 * 8 * 4 / H200.memory_rate, rel=0.05)


def test_a_barrier_waits_for_the_slowest_warp():
    """Two warps of a sub-partition share its adder: 2 cycles until the second has added, then the barrier's own."""
    barrier = instruction("BAR.SYNC.DEFER_BLOCKING 0x0")
    found = cycles((ADD, FREE), (barrier, FREE))
    assert 100 * (2 + H200["barrier_latency"]) < found < 100 * (6 + H200["barrier_latency"])


def test_blocks_take_the_place_of_those_that_ended():
    steps = [step(FMA, H200, FREE)] * 400
    one, four = (simulate(steps, H200, 4, 1, blocks).cycles for blocks in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.05)


def test_copies_are_waited_for_by_group():
    copy = instruction("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]")
    group = instruction("LDGDEPBAR", write=0)
    access = Access(512, 512)
    found = {
        left: cycles((copy, access), (group, FREE), (instruction(f"DEPBAR.LE SB0, {left:#x}"), FREE), times=20, warps=1)
        for left in (0, 3)
    }
    assert found[0] == pytest.approx(20 * H200["memory_latency"], rel=0.15)
    assert found[3] < found[0] / 3
