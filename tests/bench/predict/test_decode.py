"""The chain of waits of a decode step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from predict.decode import MODELS, STRUCTURE, Projection, Structure, chain, constant, predict_decode
from predict.machines import machine

H200 = machine("h200", Path("none"))


def test_the_constants_are_those_of_the_kernel():
    assert [constant("decode.cuh", name) for name in ("kLoads", "kParts")] == [8, 24]
    assert constant("params.h", "kDecodeInputs") == 512
    with pytest.raises(ValueError, match="kUnknown"):
        constant("decode.cuh", "kUnknown")


def test_stages_of_one_sequence_counted_by_hand():
    """gate: 64 slices of 192 outputs; two experts are in use, and a thread has 3 rows of B an expert."""
    gate = Projection(4096, 11008, 132, 2)
    stages = chain(gate, 1, 16, 4, H200, Structure())
    loads = 2 * H200["memory_latency"]  # importance, then all 6 rows together
    assert H200.seconds(loads) < stages["before the barrier"] < H200.seconds(2 * loads)
    assert stages["barrier"] == 1.3e-6
    forked = chain(gate, 1, 16, 4, H200, STRUCTURE)
    bytes_read = 2 * 2 * 16 * (4096 + 11008) * 2  # of gate and up: two experts' A and B in 16 bits
    assert forked["weights beside the base"] == pytest.approx(bytes_read / H200["memory"])
    assert forked.keys() - stages.keys() == {"weights beside the base", "find experts"}


def test_a_row_ahead_hides_all_loads_but_the_first():
    gate = Projection(4096, 11008, 132, 2)
    waits, hides, kept = (
        chain(gate, 8, 16, 4, H200, replace(STRUCTURE, **change))["expand"]
        for change in ({"rows_ahead": False}, {"rows_ahead": True}, {"keeps_B": True})
    )
    load = H200.seconds(H200["l2_latency"])
    assert waits - kept == pytest.approx(2 * 4 * load)  # two slots of four experts
    assert 2 * load <= hides - kept < 0.5 * (waits - kept)


@pytest.mark.parametrize("name", ["forked", "keeps_B", "rows_ahead", "tokens_ahead"])
def test_more_sequences_take_longer_and_better_structure_takes_less(name: str):
    better = replace(Structure(), **{name: True})
    shares = [predict_decode(MODELS["llava-7b"], n, H200, structure=better).of_none for n in (1, 8, 64)]
    assert shares == sorted(shares, reverse=True) and 0.5 < shares[-1] < shares[0] < 1
    assert shares[-1] > predict_decode(MODELS["llava-7b"], 64, H200, structure=Structure()).of_none
