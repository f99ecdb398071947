"""The microkernels of bench/calibrate.py, as far as they show themselves without a card."""

from __future__ import annotations

import pytest
import torch

import calibrate
from cuda_report import find_nvcc
from predict.flow import basic_blocks, natural_loops
from predict.sass import disassemble

# what a round of each kernel must hold, or it measures something else: (text of the opcode, how many)
ROUNDS = {
    "imad_wide": ("IMAD.WIDE", calibrate.UNROLL),
    "load_matrix": ("LDSM.16.M88.4", calibrate.UNROLL),
    "store_shared": ("STS.128", calibrate.UNROLL),
    "barrier": ("BAR.SYNC", 1),
    "chase": ("LDG.E", 1),
    "read_l2": ("LDG.E.128", 1),
    "wgmma_8_shared": ("HGMMA.64x8x16", calibrate.UNROLL),
    "wgmma_8_registers": ("HGMMA.64x8x16", calibrate.UNROLL),
    "wgmma_64_shared": ("HGMMA.64x64x16", calibrate.UNROLL),
    "wgmma_64_registers": ("HGMMA.64x64x16", calibrate.UNROLL),
}


@pytest.mark.slow
@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc, and there is none")
@pytest.mark.parametrize("arch", [80, 90])
def test_the_compiler_keeps_what_is_measured(arch: int):
    functions = disassemble(calibrate.compile_cubin(find_nvcc(), arch))
    expected = {name: what for name, what in ROUNDS.items() if arch >= 90 or not name.startswith("wgmma")}
    assert functions.keys() == {*expected, "nothing"}
    for name, (opcode, count) in expected.items():
        loops = [loop.instructions for loop in natural_loops(basic_blocks(functions[name]))]
        found = [sum(i.opcode.startswith(opcode) for i in loop) for loop in loops]
        assert max(found) >= count, name
        if name.startswith("wgmma"):  # A where the name says, and no product waits for the one before
            products = [i for loop in loops for i in loop if i.mnemonic == "HGMMA"]
            assert all(("gdesc" in i.operands.split(",")[1]) == name.endswith("shared") for i in products)
            assert sum("gsb0" in i.operands for i in products) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_card_it_says_so(capsys):
    assert calibrate.main([]) == 1
    assert "needs a CUDA GPU" in capsys.readouterr().err
