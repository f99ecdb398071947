"""The Triton passes, through the layer, against the float64 reference: on a GPU, or under the interpreter."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import smolora
from cases import OPTIONS, RANKS, SHAPES, plain
from oracle import Case, build, check, run

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(not INTERPRETED, reason="the interpreter is off: kernels run on the GPU here")
# the interpreter's products of bfloat16 are wrong, so it is for a GPU to test
ON_CPU = [pytest.param("cpu", dtype, marks=interpreter) for dtype in (torch.float32, torch.float16)]
ON_GPU = [
    pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.float32, torch.float16, torch.bfloat16)
]

DEVICES = [pytest.param("cpu", marks=interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("case", OPTIONS + SHAPES + RANKS, ids=str)
@pytest.mark.parametrize(("device", "dtype"), [*ON_CPU[:1], *ON_GPU])
def test_against_float64(case: Case, device: str, dtype: torch.dtype):
    check(case, dtype, "triton", device)


@pytest.mark.parametrize("case", [*OPTIONS[:6], *RANKS[2:6:3]], ids=str)
@pytest.mark.parametrize(("device", "dtype"), ON_CPU[1:])
def test_half_precision(case: Case, device: str, dtype: torch.dtype):
    """float16 takes other tiles, and rounds parameters and what B is multiplied with."""
    check(case, dtype, "triton", device)


@st.composite
def cases(draw) -> Case:
    """Any layer and batch; in nine of ten cases at most 65 tokens, since the interpreter takes time."""
    experts = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    limit = draw(st.sampled_from([65] * 9 + [150]))
    lengths = None
    B, S = draw(st.integers(1, 5)), 0
    S = draw(st.integers(0, limit // B))
    if draw(st.booleans()):
        lengths = tuple(draw(st.lists(st.integers(0, limit // 3), min_size=1, max_size=4)))
        if sum(lengths) > limit:
            lengths = lengths[:2]
    return Case(
        B=B, S=S, lengths=lengths, d=draw(st.integers(1, 80)), k=draw(st.integers(1, 90)),
        r=draw(st.sampled_from([1, 2, 3, 4, 7, 8, 12, 16, 16, 24, 32, 33, 64])), M=experts[0], N=experts[1],
        e=draw(st.integers(1, 40)), top_k=draw(st.integers(1, min(*experts, 3))),
        fusion=draw(st.sampled_from(["adaptive"] * 3 + ["mean", "vu", "if"])),
        router_grad=draw(st.sampled_from(["none", "straight_through"])),
        dropout=draw(st.sampled_from([0.0, 0.05, 0.5])),
        bias=draw(st.booleans()), mask=draw(st.booleans()), shared=draw(st.booleans()),
        given=draw(st.sampled_from([False, False, True])), spread=draw(st.booleans()), seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip


@pytest.mark.slow  # some minutes a part under the interpreter
@interpreter
@pytest.mark.parametrize("part", range(10))
def test_any_case(part: int):
    """500 seeded cases in ten parts, so that workers can share them."""

    @settings(max_examples=50, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases(), st.sampled_from([torch.float32, torch.float16]), st.just(part))
    def holds(case: Case, dtype: torch.dtype, part: int):
        check(case.but(seed=case.seed * 10 + part), dtype, "triton", slack=5)

    holds()


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_repeatable(device: str):
    """Forward and backward with dropout, bit for bit: 250 times on a GPU, where blocks run in any order."""
    layer, batch = build(plain.but(dropout=0.1, B=4, S=70, top_k=2, mask=True), torch.float32, device)
    first = run(layer, batch, "triton")
    for _ in range(250 if device == "cuda" else 2):
        again = run(layer, batch, "triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("case", [plain.but(S=70, M=4), plain.but(S=70, M=4, r=64)], ids=["one pass", "two passes"])
def test_route_logits_do_not_move(case: Case, device: str):
    """An instance's logits are the same bits alone, in a batch, packed, and padded on either side: all of the sums run
    in an order of the instance's own, so a tie cannot fall differently."""
    layer, batch = build(case, torch.float32, device)
    x, emb = batch.x, batch.keywords["instruction"]

    def logits(x, **keywords):
        with smolora.use_backend("triton"):
            layer(x, **keywords)
        return layer.last_routing().logits[0]

    together = logits(x, instruction=emb)
    for i in range(case.B):
        alone = logits(x[i : i + 1], instruction=emb[i : i + 1])
        assert torch.equal(alone[0], together[i])
    cu = torch.arange(0, case.B * case.S + 1, case.S, dtype=torch.int32, device=device)
    assert torch.equal(logits(x.flatten(0, 1), instruction=emb, cu_seqlens=cu), together)
    for left, right in ((3, 0), (0, 9), (61, 7)):
        padded = torch.nn.functional.pad(x, (0, 0, left, right), value=1e3)
        mask = torch.zeros(padded.shape[:2], dtype=torch.bool, device=device)
        mask[:, left : left + case.S] = True
        assert torch.equal(logits(padded, instruction=emb, route_mask=mask), together)
