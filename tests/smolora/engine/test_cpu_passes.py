"""The passes compiled for a CPU, in each width of its vectors, against the equation and against the torch passes."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

import smolora
from recorded import RecordedPasses
from smolora.engine import compiled, cpu_passes, torch_passes
from smolora.engine.function import mixture_linear
from smolora.spec import Bank, Mixed, Slots, Tokens
from support.cases import OPTIONS, RANKS, SHAPES
from support.mixtures import MIX_OPTIONS, MIX_SHAPES, MixCase, build_call, naive_call, plain, run_call
from support.mixtures import smolora as fused
from support.oracle import Case, agree, check, error
from support.strategies import cases

BOUND = {torch.float64: 1e-12, torch.float32: 3e-6}  # relative, of sums of a few hundred terms in some order
DTYPES = tuple(BOUND)
WIDTHS = (64, 32, 16)

needs_compiler = pytest.mark.skipif(compiled.module is None, reason="smolora was installed without a C++ compiler")


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest):
    """Run with vectors of so many bytes."""
    if compiled.module is None:
        pytest.skip("smolora was installed without a C++ compiler")
    if request.param > compiled.module.widest():
        pytest.skip(f"this CPU has no vectors of {request.param} bytes")
    compiled.module.use_width(request.param)
    yield request.param
    compiled.module.use_width(64)


class Spy:
    """Notes which compiled functions run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.called: set[str] = set()

        def noted(name: str, dtype: torch.dtype):
            self.called.add(name)
            return compiled.function(name, dtype)

        monkeypatch.setattr(cpu_passes, "function", noted)


# ---------------------------------------------------------------------------------------------------------- the passes

LARGE = [  # more than one block of tokens and of columns, and more than one tile in each direction
    fused.but(n=3, S=150, d=300, k=290, r=16),
    fused.but(n=2, S=70, d=257, k=131, r=12, K=2, gate_grad="chosen", threshold=26),
    fused.but(lengths=(3, 0, 200, 65), d=140, k=400, r=4, threshold=64),
    fused.but(n=3, S=70, d=33, k=140, r=3, frozen=True),  # importance learns from frozen experts too
    fused.but(n=3, S=70, d=33, k=290, r=3, E=(3, 6), own=True, frozen=True),
    plain.but(n=2, S=130, d=150, k=1300, r=5, K=3, empty=True, frozen=True, threshold=26),
    plain.but(n=2, S=130, d=150, k=200, r=40, shared=True, K=3, empty=True),
    plain.but(lengths=(70, 1, 129), d=200, k=150, mix="softmax", K=0, E=(3,), threshold=64),
    plain.but(n=2, S=30, d=1, k=1, r=1),
    plain.but(n=2, S=9, d=17, k=2100, r=128, E=(2,), K=2),
]


@pytest.mark.parametrize("case", MIX_OPTIONS + MIX_SHAPES + LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_equation(case: MixCase, dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch):
    """As near to float64 as torch comes, which is not near where a router's softmax leaves one expert alone."""
    call = build_call(case)
    got, truth = run_call(call.to("cpu", dtype), "torch"), naive_call(call)
    monkeypatch.setattr(compiled, "module", None)
    usual = run_call(call.to("cpu", dtype), "torch")
    assert got.keys() == truth.keys()
    errors = {name: (error(got[name], truth[name]), error(usual[name], truth[name])) for name in truth}
    assert all(mine <= BOUND[dtype] + 3 * torchs for mine, torchs in errors.values()), errors


@pytest.mark.parametrize("case", OPTIONS + SHAPES + RANKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_compiler
def test_the_layer_against_float64(case: Case, dtype: torch.dtype):
    check(case, dtype, "torch")


@needs_compiler
@settings(max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(cases(limits=st.just(900), ranks=st.integers(1, 128)))
def test_any_case(case: Case):
    """Seeded cases over every option at once; test_torch_passes.py says why with slack, and not in float64."""
    check(case, torch.float32, "torch", slack=5)


@needs_compiler
@pytest.mark.parametrize(
    "case",
    [fused, fused.but(own=True, frozen=True), plain.but(mix="softmax", K=0, threshold=64), plain.but(shared=True, K=3)],
    ids=str,
)
def test_parity_of_each_pass(case: MixCase):
    """The same tensors through a compiled pass and the torch pass of its name."""
    with RecordedPasses() as recorded:
        run_call(build_call(case), "torch")
    assert len(recorded.arguments) == 4
    for name, arguments in recorded.arguments.items():
        names = inspect.signature(getattr(torch_passes, name)).parameters
        assert cpu_passes.takes(dict(zip(names, arguments, strict=True))), name
        got, wanted = getattr(cpu_passes, name)(*arguments), getattr(torch_passes, name)(*arguments)
        for i, (mine, torchs) in enumerate(zip(tree_leaves(got), tree_leaves(wanted), strict=True)):
            assert mine.shape == torchs.shape and mine.dtype == torchs.dtype, (name, i)
            agree({f"{name} {i}": mine}, {f"{name} {i}": torchs}, BOUND[torch.float64])


@needs_compiler
def test_what_runs_compiled(monkeypatch: pytest.MonkeyPatch):
    """All products of float32 and float64; none of bfloat16, or where parameters have another dtype than x."""
    products = {"shrink", "scores", "mix", "expand", "grad_up", "mix_backward", "grad_scores", "grad_down"}
    for dtype, expected in ((torch.float32, products), (torch.float64, products), (torch.bfloat16, set())):
        spy = Spy(monkeypatch)
        run_call(build_call(fused).to("cpu", dtype), "torch")
        assert spy.called == expected, dtype
    spy = Spy(monkeypatch)
    call = build_call(fused).to("cpu", torch.float32)
    call.x = call.x.double()
    call.given.update(weight=call.given["weight"].double(), bias=call.given["bias"].double())
    run_call(call, "torch")
    assert spy.called == set()


@needs_compiler
@pytest.mark.parametrize("name", ["ids", "cu_seqlens"])
def test_integers_of_64_bits_are_torchs(name: str, monkeypatch: pytest.MonkeyPatch):
    spy = Spy(monkeypatch)
    call = build_call(plain.but(lengths=(5, 0, 17)))
    call.given[name] = call.given[name].long()
    agree(run_call(call, "torch"), naive_call(call), BOUND[torch.float64])
    assert spy.called == set()


@needs_compiler
def test_three_banks_are_torchs(monkeypatch: pytest.MonkeyPatch):
    spy = Spy(monkeypatch)
    case = plain.but(E=(2, 3, 4), weights="one")
    call = build_call(case)
    agree(run_call(call, "torch"), naive_call(call), BOUND[torch.float64])
    assert spy.called == set()


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_threads_change_nothing(case: MixCase, width: int):
    before = torch.get_num_threads()
    call = build_call(case).to("cpu", torch.float32)
    call.given.pop("weight")  # the base's product is torch's
    call.given.pop("bias")
    call.case = case.but(base=False)
    try:
        results = []
        for threads in (1, 2, 3, 3, 3):
            torch.set_num_threads(threads)
            results.append(run_call(call, "torch"))
    finally:
        torch.set_num_threads(before)
    for again in results[1:]:
        assert all(torch.equal(results[0][name], again[name]) for name in again if name != "drouter0")


# ------------------------------------------------------------------------------------------------------------- decoding

STEP = plain.but(S=1, n=5)
STEPS = [
    STEP,
    STEP.but(weights="one"),
    STEP.but(empty=True, K=3),
    STEP.but(empty=True, weights="one"),
    STEP.but(shared=True, K=3, empty=True),
    STEP.but(E=(4, 3), base=False),
    STEP.but(E=(4, 3), bias=False, r=1, d=1, k=1),
    fused.but(S=1, n=5, routed=False),
    fused.but(S=1, n=5, routed=False, K=2, E=(3, 5), r=12, d=41, k=57),
    fused.but(S=1, n=1, routed=False, r=16, d=300, k=700),
    fused.but(S=1, n=2, routed=False, r=128, d=70, k=300, K=2),
    fused.but(S=1, n=2, routed=False, shared=True, K=2, r=24),
    fused.but(S=1, n=0, routed=False),
    fused.but(S=1, n=5, routed=False, own=True, E=(3, 5), r=12, d=41, k=57),
    fused.but(S=1, n=6, routed=False, own=True, E=(2, 1), k=300),  # runs of equal experts
    fused.but(S=1, n=0, routed=False, own=True),
]


def step(call, rows: slice = slice(None)) -> Mixed:
    """Decode some of the call's sequences, without autograd."""
    named, given, c = call.named, call.given, call.case
    banks = [Bank(named[f"A{i}"], named[f"B{i}"], i, named.get(f"I{i}")) for i in range(len(c.E))]
    weights = named.get("slot_weights")
    x = call.x[rows]
    slots = Slots(given["ids"][rows], None if weights is None else weights[rows])
    with torch.no_grad():
        return mixture_linear(
            x,
            banks,
            tokens=Tokens(len(x)),
            scaling=1.5,
            backend="torch",
            mix=c.mix,
            slots=slots,
            weight=given.get("weight"),
            bias=given.get("bias"),
        )


@pytest.mark.parametrize("case", STEPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode(case: MixCase, dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch):
    """Against the equation, and with all that is decided as torch decides it."""
    call = build_call(case)
    spy = Spy(monkeypatch)
    mixed = step(call.to("cpu", dtype))
    assert spy.called == {"decode"}
    agree({"y": mixed.y}, {"y": naive_call(call)["y"]}, BOUND[dtype])
    monkeypatch.setattr(compiled, "module", None)
    expected = step(call.to("cpu", dtype))
    assert mixed.logits is None and expected.logits is None
    for name in ("ids", "slot_weights", "scores"):
        got, wanted = getattr(mixed, name), getattr(expected, name)
        assert (got is None) == (wanted is None), name
        if got is not None:
            agree({name: got}, {name: wanted}, 10 * BOUND[dtype])


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_batching_and_threads_change_nothing_in_decoding(case: MixCase, width: int):
    case = case.but(base=False)  # the base's product is torch's
    call = build_call(case).to("cpu", torch.float32)
    call.given.pop("weight", None), call.given.pop("bias", None)
    together, before = step(call), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for i in range(case.n):
                assert torch.equal(step(call, slice(i, i + 1)).y, together.y[i : i + 1])
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_what_is_decoded_compiled(monkeypatch: pytest.MonkeyPatch):
    """Not what autograd records, has more tokens than sequences, or is in another precision than its parameters."""
    call = build_call(STEP).to("cpu", torch.float32)
    banks = [Bank(call.named["A0"], call.named["B0"])]
    slots, five = Slots(call.given["ids"], call.named["slot_weights"]), Tokens(5)

    def decodes(x=call.x, banks=banks, tokens=five, slots=slots, backend="torch") -> bool:
        return cpu_passes.decodes(backend, x, banks, tokens, slots)

    assert not decodes()  # autograd is on
    with torch.no_grad():
        assert decodes()
        assert not decodes(backend="triton")
        assert not decodes(x=call.x.double()) and not decodes(x=call.x.bfloat16())
        assert not decodes(tokens=Tokens(1)) and not decodes(tokens=Tokens(5, torch.arange(6, dtype=torch.int32)))
        assert not decodes(slots=None) and not decodes(slots=Slots(None))
        assert not decodes(slots=Slots(slots.ids.long(), slots.weights))
        assert not decodes(slots=Slots(slots.ids[:4], slots.weights))
        assert not decodes(slots=Slots(slots.ids, slots.weights.double()))
        own = banks[0]._replace(importance=torch.zeros(banks[0].B.shape[:2]))
        assert not decodes(banks=[own])  # several slots
        one = Slots(slots.ids[:, :, :1].contiguous(), slots.weights[:, :, :1].contiguous())
        assert decodes(banks=[own], slots=one)
        assert not decodes(banks=[own._replace(importance=own.importance[1:])], slots=one)
        assert not decodes(banks=banks * 2) and not decodes(banks=[Bank(banks[0].A[:, :4], banks[0].B)])
        assert not decodes(x=call.x.expand(5, -1).mT.contiguous().mT)
    monkeypatch.setattr(compiled, "module", None)
    with torch.no_grad():
        assert not decodes()


@pytest.mark.parametrize("wrong", [-2, 5, 2**31 - 1])
@pytest.mark.parametrize("case", [STEP, fused.but(S=1, n=5, routed=False, own=True, E=(5, 5))], ids=str)
def test_an_expert_that_does_not_exist(case: MixCase, wrong: int):
    call = build_call(case).to("cpu", torch.float32)
    call.given["ids"][3, 0, -1] = wrong
    with pytest.raises(ValueError, match=r"ids of bank 0 must lie in 0 to 4, got .*" + str(wrong)):
        step(call)


def test_backend_info_says_what_is_compiled(monkeypatch: pytest.MonkeyPatch):
    info = smolora.backend_info()["backends"]["torch"]["compiled"]
    if compiled.module is not None:
        assert info == f"yes, for vectors of {compiled.module.widest()} bytes"
    monkeypatch.setattr(compiled, "module", None)
    assert smolora.backend_info()["backends"]["torch"]["compiled"] == "no: slower on a CPU"
