"""Basic blocks, dominators and natural loops."""

from __future__ import annotations

import pytest

from predict.flow import Block, basic_blocks, dominators, natural_loops
from predict.sass import Function, Instruction


def function(code: str) -> Function:
    """A kernel from lines `label: instruction`, where `A B ->x` branches to x under guard A."""
    made = Function("kernel")
    for number, line in enumerate(code.strip().splitlines()):
        label, _, text = line.strip().rpartition(":")
        words = text.split()
        target = next((word[2:] for word in words if word.startswith("->")), None)
        guard = words[0] if words[0].startswith("P") else ""
        opcode = words[1] if guard else words[0]
        if label:
            made.labels[label] = 16 * number
        operands = f"`({target})" if target else ""
        made.instructions.append(Instruction(16 * number, guard, opcode, operands, 1, False, 7, 7, 0, target))
    return made


NESTED = """
    MOV
    outer: IADD3
    P0 BRA ->skip
    FADD
    inner: FFMA
    P1 BRA ->inner
    skip: STG
    P2 BRA ->outer
    EXIT
    pad: BRA ->pad
"""


def names(made: Function, blocks: set[Block]) -> set[str]:
    return {i.opcode for block in blocks for i in block.instructions}


def test_nested_loops():
    made = function(NESTED)
    outer, inner = natural_loops(basic_blocks(made))
    assert names(made, outer.blocks) == {"IADD3", "BRA", "FADD", "FFMA", "STG"}
    assert names(made, inner.blocks) == {"FFMA", "BRA"}
    assert inner.parent is outer and outer.parent is None


def test_what_pads_the_end_is_no_loop():
    assert len(natural_loops(basic_blocks(function(NESTED)))) == 2


def test_dominators():
    blocks = basic_blocks(function(NESTED))
    by_first = {block.instructions[0].opcode: block for block in blocks}
    dominate = dominators(blocks)
    assert by_first["IADD3"] in dominate[by_first["STG"]]
    assert by_first["FFMA"] not in dominate[by_first["STG"]]


def test_a_way_into_the_middle_makes_no_natural_loop():
    """The widest backward branch would call this one a loop."""
    made = function("""
        P0 BRA ->middle
        top: FADD
        middle: FMUL
        P1 BRA ->top
        EXIT
    """)
    assert natural_loops(basic_blocks(made)) == []


@pytest.mark.parametrize(("last", "follows"), [("EXIT", 0), ("P0 EXIT", 1), ("BRA ->end", 1), ("P0 BRA ->end", 2)])
def test_what_may_follow_a_block(last: str, follows: int):
    blocks = basic_blocks(function(f"MOV\n{last}\nIADD3\nend: STG\nEXIT"))
    assert len(blocks[0].next) == follows
