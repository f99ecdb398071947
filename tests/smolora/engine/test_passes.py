"""The torch passes, through the engine, against sums of k-sized expert outputs that torch differentiates."""

import pytest
import torch

from recorded import RecordedPasses
from support.mixtures import (
    MIX_OPTIONS,
    MIX_SHAPES,
    STRIDED,
    MixCase,
    build_call,
    naive_call,
    plain,
    run_call,
    strided,
)
from support.oracle import agree

pytestmark = pytest.mark.usefixtures("without_compiled_code")


@pytest.mark.parametrize("case", MIX_OPTIONS + MIX_SHAPES, ids=str)
def test_against_the_equation(case: MixCase):
    call = build_call(case)
    agree(run_call(call, "torch"), naive_call(call), 1e-11)


@pytest.mark.parametrize("case", STRIDED, ids=str)
def test_strides_of_parameters(case: MixCase):
    call = build_call(case)
    agree(run_call(strided(call), "torch"), run_call(call, "torch"), 1e-14)


OPCHECKED = [
    plain.but(mix="softmax", K=0, threshold=64),
    plain.but(shared=True, routed=True, tasks=3, gate="all", gate_grad="all", mask=True),
    plain.but(weights="token", K=0, lengths=(4, 9)),
    plain.but(frozen=True, empty=True),
]


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck(case: MixCase, monkeypatch: pytest.MonkeyPatch):
    """Every operator with the arguments of a call: schema, fakes, and nothing mutated or aliased."""
    with RecordedPasses() as recorded:
        run_call(build_call(case).to("cpu", torch.float32), "torch")
    assert len(recorded.arguments) == 4
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # empty outputs are compared
    for name, arguments in recorded.arguments.items():
        torch.library.opcheck(getattr(torch.ops.smolora, name).default, (*arguments, "torch"))
