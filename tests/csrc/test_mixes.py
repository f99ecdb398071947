"""The CUDA C++ kernels through the engine, on banks, slots and mixes of every kind: emulated, and on a GPU."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from recorded import RecordedPasses
from smolora.engine import cuda_passes, torch_passes
from support.mixtures import (
    MIX_OPTIONS,
    MIX_SHAPES,
    STRIDED,
    Call,
    MixCase,
    build_call,
    forward_call,
    naive_call,
    plain,
    run_call,
    smolora,
    strided,
)
from support.oracle import complaints, error

float32, bfloat16 = torch.float32, torch.bfloat16
PASSES = ("route_shrink", "fuse_expand", "grad_output", "grad_input")

TAKEN = [case for case in MIX_OPTIONS + MIX_SHAPES if case.mix != "softmax" and case.weights != "token"]
DTYPES = [pytest.param(float32, id="float32"), pytest.param(bfloat16, id="bfloat16")]


@pytest.mark.parametrize("case", TAKEN, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_equation(case: MixCase, dtype: torch.dtype, device: str):
    """As near to float64 as the torch passes in the same dtype."""
    call = build_call(case)
    moved = call.to(device, dtype)
    got, eager = run_call(moved, "cuda"), run_call(moved, "torch")
    assert not complaints(got, naive_call(call), eager, dtype)


@pytest.mark.parametrize("case", [plain.but(shared=True, frozen=True), plain.but(E=(4, 3), K=1), smolora], ids=str)
def test_only_what_is_needed(case: MixCase, device: str):
    """Each gradient alone has the bits that it has among all of them."""
    call = build_call(case).to(device, float32)
    names = [*call.named, "x"]
    full = run_call(call, "cuda")
    for name in names:
        got = run_call(call, "cuda", without=tuple(other for other in names if other != name))
        assert got.keys() == {"y", f"d{name}"}
        assert torch.equal(got[f"d{name}"], full[f"d{name}"])


def record_calls(call: Call) -> dict[str, tuple]:
    """The arguments of each pass in a forward and backward of the torch backend, by name."""
    with RecordedPasses() as recorded:
        run_call(call, "torch")
    return recorded.arguments


@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_each_pass_is_the_torch_pass(case: MixCase, device: str):
    """The same results from the same tensors, one by one and by name, empty ones where nothing is needed."""
    calls = record_calls(build_call(case).to(device, float32))
    for name in PASSES:
        with torch.no_grad():
            got, expected = (getattr(module, name)(*calls[name]) for module in (cuda_passes, torch_passes))
        for i, (mine, theirs) in enumerate(zip(tree_leaves(got), tree_leaves(expected), strict=True)):
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, (name, i)
            assert torch.equal(mine, theirs) if mine.dtype == torch.int32 else error(mine, theirs) < 1e-5, (name, i)


@pytest.mark.parametrize("case", [case for case in STRIDED if case in TAKEN or case.routed], ids=str)
def test_strides_of_parameters(case: MixCase, device: str):
    call = build_call(case).to(device, float32)
    got, expected = run_call(strided(call), "cuda"), run_call(call, "cuda")
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_parity_can_fail(device: str):
    """A pass that leaves a bank's dropout out, or trains a frozen expert, has other results."""
    case = plain.but(frozen=True, threshold=64)
    calls = record_calls(build_call(case).to(device, float32))
    h, *_ = cuda_passes.route_shrink(*calls["route_shrink"][:15], 0, *calls["route_shrink"][16:])
    assert error(h, torch_passes.route_shrink(*calls["route_shrink"])[0]) > 0.1
    _, (dB,), *_ = cuda_passes.grad_output(*calls["grad_output"][:8], [], *calls["grad_output"][9:])
    assert error(dB, torch_passes.grad_output(*calls["grad_output"])[1][0]) > 0.1


# ---------------------------------------------------------------------------------------------------------- decoding

DECODED = [
    plain,
    plain.but(n=64, E=(9,), K=3),  # as many sequences as a launch takes
    plain.but(empty=True, n=9),  # -1: no expert, whose h nobody computes
    plain.but(weights="one"),
    plain.but(weights="one", K=0),  # every expert, in order
    plain.but(K=0, E=(3,), n=1),
    plain.but(shared=True, K=3, r=24),
    plain.but(shared=True, weights="one", K=0, d=600, k=1100),  # several slices of d and k
    plain.but(shared=True, routed=True, gate="all", mask=True),
    plain.but(shared=True, E=(4, 3), empty=True),
    plain.but(routed=True, reads_x=False, gate="all"),
    plain.but(routed=True, E=(4, 3), n=9, d=600),
    plain.but(base=False, r=128, K=1),
    smolora,
    smolora.but(E=(3, 5), K=2, mask=True, n=9),
    smolora.but(shared=True, K=2, gate="all"),
    smolora.but(routed=False, K=2),
    smolora.but(own=True, E=(3, 5), K=2, n=9),  # an importance vector for each expert
    smolora.but(own=True, routed=False, d=600, k=1100),
]


@pytest.mark.sanitizer
@pytest.mark.parametrize("case", DECODED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(case: MixCase, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch):
    """One token a sequence in one launch: y by the equation, and what was decided as the torch passes decide it."""
    call = build_call(case.but(S=1))
    truth, moved = naive_call(call), call.to(device, dtype)
    eager = forward_call(moved, "torch", moved.x, moved.named)
    monkeypatch.setattr(cuda_passes, "route_shrink", lambda *_: pytest.fail("decoding went through the passes"))
    with torch.no_grad():
        got = forward_call(moved, "cuda", moved.x, moved.named)
    assert not complaints({"y": got.y}, {"y": truth["y"]}, {"y": eager.y}, dtype)
    for mine, theirs in zip(got[1:], eager[1:], strict=True):
        assert (mine is None) == (theirs is None)
        if mine is None or case.empty:  # empty slots keep the weights they were given
            continue
        assert torch.equal(mine, theirs) if mine.dtype == torch.int32 else error(mine, theirs) < 2e-2


@pytest.mark.parametrize(
    "case",
    [
        plain.but(shared=True, routed=True, tasks=3),  # a router a task
        plain.but(n=65),
        plain.but(K=0, weights="one", E=(40,), r=1),  # more pairs of a slot and an expert than a block has room for
        plain.but(threshold=26),
        plain.but(lengths=(1, 1, 1)),
    ],
    ids=str,
)
def test_what_decode_leaves_to_the_passes(case: MixCase, device: str, monkeypatch: pytest.MonkeyPatch):
    call = build_call(case.but(S=1))
    moved = call.to(device, float32)
    monkeypatch.setattr(cuda_passes, "decode", lambda *_: pytest.fail("decode ran"))
    with torch.no_grad():
        got = forward_call(moved, "cuda", moved.x, moved.named)
    assert error(got.y, naive_call(call)["y"]) < 2e-6


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (plain.but(mix="softmax", K=0), "the mixes 'weighted' and 'smolora', not 'softmax'"),
        (plain.but(weights="token"), r"not one for each token \(token_weights\)"),
        (plain.but(E=(2, 2, 2)), "up to 2 banks, not 3"),
        (plain.but(r=129, K=1), "ranks up to 128, not 129"),
        (plain.but(r=128, K=17, weights="one"), "up to 2048 numbers of a token .*, not 2176"),
    ],
)
def test_what_it_lacks(case: MixCase, reason: str, device: str, monkeypatch: pytest.MonkeyPatch):
    """Named, before anything runs; nothing falls back."""
    call = build_call(case).to(device, float32)
    monkeypatch.setattr(cuda_passes, "run_pass", lambda *_: pytest.fail("a kernel ran"))
    with pytest.raises(RuntimeError, match=f"backend 'cuda' cannot run: .*{reason}"):
        forward_call(call, "cuda", call.x, call.named)
