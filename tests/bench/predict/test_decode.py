"""The chain of waits of a decode step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from predict.decode import MODELS, STRUCTURE, Projection, chain, constant, predict_decode
from predict.machines import machine

H200 = machine("h200", Path("none"))


def test_the_constants_are_those_of_the_kernel():
    assert (constant("decode.cuh", "kLoads"), constant("params.h", "kDecodeInputs")) == (8, 512)
    with pytest.raises(ValueError, match="kUnknown"):
        constant("decode.cuh", "kUnknown")


def test_stages_of_one_sequence_counted_by_hand():
    """gate: 64 slices of 192 outputs; two experts are in use, and a thread has 3 rows of B an expert."""
    stages = chain(Projection(4096, 11008, 132), 1, 16, 4, H200, STRUCTURE)
    loads = 2 * H200["memory_latency"]  # importance, then all 6 rows together
    assert H200.seconds(loads) < stages["before the barrier"] < H200.seconds(2 * loads)
    assert stages["barrier"] == 1.3e-6


def test_more_sequences_take_longer_and_better_structure_takes_less():
    shares = [predict_decode(MODELS["llava-7b"], n, H200).of_none for n in (1, 8, 64)]
    assert shares == sorted(shares, reverse=True) and 0.5 < shares[-1] < shares[0] < 1
    for change in ({"forked": True}, {"keeps_B": True}, {"tokens_ahead": True}):
        on, off = (
            predict_decode(MODELS["llava-7b"], 64, H200, structure=replace(STRUCTURE, **{name: value})).of_none
            for (name,) in [change]
            for value in (True, False)
        )
        assert on > off
