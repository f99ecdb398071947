"""The Triton passes, through the layer and the engine, against float64: on a GPU, or under the interpreter."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import smolora
from recorded import RecordedPasses, named_results
from smolora import launch
from smolora.engine import torch_passes
from support import mixtures
from support.cases import OPTIONS, RANKS, SHAPES, plain
from support.marks import interpreter
from support.mixtures import MIX_OPTIONS, MIX_SHAPES, STRIDED, MixCase, build_call, check_call, run_call, strided
from support.oracle import Case, build, check, error, run
from support.strategies import cases

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


@pytest.mark.parametrize("case", MIX_OPTIONS + MIX_SHAPES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), [*ON_CPU[:1], *ON_GPU])
def test_mixtures_against_the_equation(case: MixCase, device: str, dtype: torch.dtype):
    check_call(case, dtype, "triton", device)


@pytest.mark.parametrize("case", [*MIX_OPTIONS[:1], *MIX_OPTIONS[9:11], MIX_OPTIONS[16], MIX_OPTIONS[24]], ids=str)
@pytest.mark.parametrize(("device", "dtype"), ON_CPU[1:])
def test_mixtures_in_half_precision(case: MixCase, device: str, dtype: torch.dtype):
    check_call(case, dtype, "triton", device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("case", "without"),
    [
        (MIX_OPTIONS[0], ("x",)),
        (MIX_OPTIONS[0], ("A0", "slot_weights")),
        (MIX_OPTIONS[2], ("x", "A0")),  # scores alone, and B
        (mixtures.plain.but(frozen=True), ("x", "A0", "slot_weights")),  # programs with nothing to sum
        (mixtures.plain.but(frozen=True, threshold=64), ("x", "B0", "slot_weights")),  # the same of dA alone
        (mixtures.plain.but(E=(4, 3), K=2, threshold=26), ("A1", "B0")),  # a bank of which A trains, one with B
        (mixtures.plain.but(E=(4, 4), reads_x=False, routed=True, K=2, r=32), ("A0", "A1")),
        (MIX_OPTIONS[16], ("token_router", "B0")),
        (MIX_OPTIONS[16], ("x", "A0", "B0")),  # the token router alone
        (MIX_SHAPES[8], ("A0",)),
        (MIX_OPTIONS[2], ()),  # every gradient: token weights,
        (MIX_OPTIONS[16], ()),  # softmax,
        (MIX_OPTIONS[21], ()),  # and smolora
        (MIX_OPTIONS[24], ("x", "A0", "A1", "I0", "I1")),
        (mixtures.smolora.but(own=True, frozen=True, E=(3, 5), K=2), ()),  # importance vectors of experts
        (mixtures.smolora.but(own=True, frozen=True, E=(3, 5), K=2), ("x", "A0", "A1", "B0", "B1")),  # these alone
        (MIX_SHAPES[1], ()),
    ],
    ids=str,
)
def test_each_pass_is_the_torch_pass(case: MixCase, without: tuple[str, ...], device: str):
    """On the same tensors every pass returns the same, by name, also where some gradients are not asked for."""
    from smolora.kernels import passes

    with RecordedPasses() as recorded:
        run_call(build_call(case).to(device, torch.float32), "torch", without)
    assert recorded.arguments.keys() >= {"route_shrink", "fuse_expand", "grad_output"}
    for name, arguments in recorded.arguments.items():
        got = named_results(name, getattr(passes, name)(*arguments))
        expected = named_results(name, getattr(torch_passes, name)(*arguments))
        assert got.keys() == expected.keys()
        got.pop("masks", None), expected.pop("masks", None)  # kept by one backend, drawn again by the other
        for label, value in expected.items():
            assert (got[label].shape, got[label].dtype) == (value.shape, value.dtype), (name, label)
            assert error(got[label], value) <= (2e-6 if value.is_floating_point() else 0), (name, label)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "case",
    [
        mixtures.plain.but(E=(4, 3), K=2, lengths=(5, 40, 0, 70, 3)),
        mixtures.plain.but(frozen=True, threshold=64),
        MIX_OPTIONS[16].but(S=50),  # a token router
        MIX_OPTIONS[21],  # importance vectors
        mixtures.smolora.but(own=True, frozen=True, E=(3, 5), K=2),  # of each expert
    ],
    ids=str,
)
def test_parts_in_rounds(case: MixCase, device: str, monkeypatch: pytest.MonkeyPatch):
    """Where the parts of all chunks would take more memory than they may, they take turns in it: against float64."""
    from smolora.kernels import grad_input, grad_output

    rounds = []

    def part_rounds(chunks: int, numbers: int) -> list[range]:
        rounds.append(launch.part_rounds(chunks, numbers))
        return rounds[-1]

    monkeypatch.setattr(launch, "PART_BYTES", 1)
    for module in (grad_output, grad_input):
        monkeypatch.setattr(module, "part_rounds", part_rounds)
    check_call(case, torch.float32, "triton", device)
    assert len(rounds) == 2 and all(len(each) > 1 for each in rounds)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", STRIDED, ids=str)
def test_strides_of_parameters(case: MixCase, device: str):
    """Kernels read parameters by address, so those that are not contiguous are copied first."""
    call = build_call(case).to(device, torch.float32)
    got, expected = run_call(strided(call), "triton"), run_call(call, "triton")
    assert all(torch.equal(got[name], value) for name, value in expected.items())


# in nine of ten cases at most 65 tokens, since the interpreter takes time
ANY_CASE = cases(
    limits=st.sampled_from([65] * 9 + [150]),
    ranks=st.sampled_from([1, 2, 3, 4, 7, 8, 12, 16, 16, 24, 32, 33, 64]),
    experts=6,
    top_k=3,
)


@pytest.mark.slow  # some minutes a part under the interpreter
@interpreter
@pytest.mark.parametrize("part", range(10))
def test_any_case(part: int):
    """500 seeded cases in ten parts, so that workers can share them."""

    @settings(max_examples=50, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(ANY_CASE, st.sampled_from([torch.float32, torch.float16]), st.just(part))
    def holds(case: Case, dtype: torch.dtype, part: int):
        check(case.but(seed=case.seed * 10 + part), dtype, "triton", slack=5)

    holds()


@st.composite
def mix_cases(draw) -> MixCase:
    """Any call of the engine, of few tokens."""
    mix = draw(st.sampled_from(["weighted", "weighted", "softmax", "smolora"]))
    banks = {"softmax": 1, "smolora": 2}.get(mix) or draw(st.integers(1, 2))
    routed = mix == "smolora" or (mix == "weighted" and draw(st.booleans()))
    dense = mix == "softmax" or (not routed and draw(st.booleans()))
    E = tuple(draw(st.integers(1, 6)) for _ in range(banks))
    weights = "one" if mix == "softmax" else draw(st.sampled_from(["one", "seq", "token"][: 3 if banks == 1 else 2]))
    gate = draw(st.sampled_from(["chosen", "all"]))
    lengths = tuple(draw(st.lists(st.integers(0, 30), min_size=1, max_size=4))) if draw(st.booleans()) else None
    return MixCase(
        n=draw(st.integers(1, 3)),
        S=draw(st.integers(0, 25)),
        lengths=lengths,
        d=draw(st.integers(1, 80)),
        k=draw(st.integers(1, 90)),
        r=draw(st.sampled_from([1, 3, 8, 12, 16, 16, 24, 32, 64])),
        E=(E[0],) * banks if dense else E,
        K=0 if dense else draw(st.integers(1, min((*E, 3)))),
        mix=mix,
        shared=draw(st.booleans()),
        weights=weights,
        routed=routed,
        reads_x=draw(st.booleans()),
        tasks=draw(st.sampled_from([0, 0, 2])) if routed else 0,
        gate=gate,
        gate_grad=draw(st.sampled_from([None, gate, "all"])),
        empty=mix == "weighted" and weights == "seq" and draw(st.booleans()),
        frozen=draw(st.booleans()),
        threshold=draw(st.sampled_from([0, 0, 13, 128])),
        mask=draw(st.booleans()),
        bias=draw(st.booleans()),
        base=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@pytest.mark.slow
@interpreter
@pytest.mark.parametrize("part", range(4))
def test_any_mixture(part: int):
    """200 seeded calls of the engine in four parts."""

    @settings(max_examples=50, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(mix_cases(), st.sampled_from([torch.float32, torch.float16]), st.just(part))
    def holds(case: MixCase, dtype: torch.dtype, part: int):
        check_call(case.but(seed=case.seed * 4 + part), dtype, "triton", slack=5)

    holds()


@pytest.mark.parametrize("device", DEVICES)
def test_repeatable(device: str):
    """Forward and backward with dropout, bit for bit: 250 times on a GPU, where blocks run in any order."""
    layer, batch = build(plain.but(dropout=0.1, B=4, S=70, top_k=2, mask=True), torch.float32, device)
    first = run(layer, batch, "triton")
    for _ in range(250 if device == "cuda" else 2):
        again = run(layer, batch, "triton")
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("device", DEVICES)
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
