"""The torch passes, through the engine, against sums of k-sized expert outputs that torch differentiates."""

import pytest

from mixtures import MIX_OPTIONS, MIX_SHAPES, MixCase, build_call, naive_call, run_call
from oracle import agree


@pytest.mark.parametrize("case", MIX_OPTIONS + MIX_SHAPES, ids=str)
def test_against_the_equation(case: MixCase):
    call = build_call(case)
    agree(run_call(call, "torch"), naive_call(call), 1e-11)
