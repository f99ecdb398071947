"""The operators and the autograd function: opcheck, torch.compile, checkpointing, what is saved and what is not."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import smolora
from recorded import RecordedPasses
from support.cases import plain
from support.marks import interpreter
from support.oracle import PARAMETERS, Case, build, run

BACKENDS = [pytest.param("torch", "cpu")]
BACKENDS += [pytest.param("triton", "cpu", marks=interpreter)]
BACKENDS += [pytest.param("triton", "cuda", marks=pytest.mark.gpu)]
ROUTED = plain.but(top_k=2, mask=True, dropout=0.1)
PACKED = plain.but(lengths=(4, 9), router_grad="straight_through")
GIVEN = plain.but(given=True)
CASES = [plain, ROUTED, PACKED]


def on_backends(cases: list[Case], interpreted: list[Case]) -> list:
    """Each case on each backend; Triton's interpreter takes seconds, and all but `interpreted` are slow there."""
    return [
        pytest.param(
            *param.values,
            case,
            marks=[*param.marks, *[pytest.mark.slow] * (param.values == ("triton", "cpu") and case not in interpreted)],
            id="-".join([*param.values, str(case)]),
        )
        for param in BACKENDS
        for case in cases
    ]


@pytest.mark.parametrize(
    ("backend", "device", "case"), on_backends([*CASES, plain.but(fusion="vu"), GIVEN], [ROUTED, PACKED, GIVEN])
)
def test_opcheck(case: Case, backend: str, device: str, monkeypatch: pytest.MonkeyPatch):
    """Every operator, with the arguments that a layer calls it with: schema, fakes, and nothing mutated or aliased."""
    layer, batch = build(case, torch.float32, device)
    with RecordedPasses() as recorded:
        run(layer, batch, backend)
    assert len(recorded.arguments) == 4
    torch.utils.deterministic.fill_uninitialized_memory = False  # empty outputs are compared too
    for name, arguments in recorded.arguments.items():
        torch.library.opcheck(getattr(torch.ops.smolora, name).default, (*arguments, backend))


@pytest.mark.parametrize(("backend", "device", "case"), on_backends(CASES, [ROUTED]))
def test_compile_fullgraph(case: Case, backend: str, device: str):
    """torch.compile traces forward and backward without a break, and gives the same bits; dropout is off, since the
    compiler may draw its seed otherwise."""
    layer, batch = build(case, torch.float32, device)
    layer.eval()
    expected = run(layer, batch, backend)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled.config = layer.config
    x = batch.x.detach().requires_grad_()
    with smolora.use_backend(backend):
        y = compiled(x, **batch.keywords)
        y.backward(batch.cotangent)
    assert torch.equal(y.detach(), expected["y"])
    assert torch.equal(x.grad, expected["dx"])
    for name in PARAMETERS:
        grad = getattr(layer, name).grad
        assert (grad is None) == (f"d{name}" not in expected)
        assert grad is None or torch.equal(grad, expected[f"d{name}"])


def test_no_recompilation_over_token_counts():
    """50 token counts, forward and backward: one graph for the first, one for any."""
    from torch._dynamo.testing import CompileCounterWithBackend

    layer, _ = build(plain, torch.float32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for S in range(2, 52):
        _, batch = build(plain.but(S=S), torch.float32)
        x = batch.x.requires_grad_()
        compiled(x, **batch.keywords).sum().backward()
    assert counter.frame_count <= 2


def test_compile_trains_with_dropout():
    """With the real compiler and dropout on: finite gradients, and B moves the output."""
    layer, batch = build(plain.but(dropout=0.1), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    x = batch.x.requires_grad_()
    compiled(x, **batch.keywords).square().mean().backward()
    for name in ("vu_A", "vu_B", "if_A", "if_B", "vu_importance", "if_importance"):
        grad = getattr(layer, name).grad
        assert torch.isfinite(grad).all() and grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_checkpointing(backend: str, device: str, reentrant: bool):
    """A recomputed forward draws the same dropout seed and gives the same gradients."""
    layer, batch = build(plain.but(dropout=0.2, mask=True), torch.float32, device)
    expected = run(layer, batch, backend)
    x = batch.x.detach().requires_grad_()
    torch.manual_seed(1)
    with smolora.use_backend(backend):
        y = checkpoint(lambda x: layer(x, **batch.keywords), x, use_reentrant=reentrant)
        y.backward(batch.cotangent)
    assert torch.equal(x.grad, expected["dx"])
    for name in PARAMETERS:
        if layer.get_parameter(name).requires_grad:
            assert torch.equal(layer.get_parameter(name).grad, expected[f"d{name}"])


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_backward_twice(backend: str, device: str):
    """Nothing that was saved is written to."""
    layer, batch = build(plain.but(dropout=0.2, top_k=2), torch.float32, device)
    x = batch.x.detach().requires_grad_()
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    with smolora.use_backend(backend):
        y = layer(x, **batch.keywords)
        first = torch.autograd.grad(y, inputs, batch.cotangent, retain_graph=True)
        second = torch.autograd.grad(y, inputs, batch.cotangent)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
def test_strides(how: str, backend: str, device: str):
    """x and its gradient's cotangent in any layout: the same numbers as contiguous ones."""
    layer, batch = build(plain.but(B=4, S=6), torch.float32, device)
    layout = {
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        "expanded": lambda t: t[:1].expand_as(t),
    }[how]
    x, cotangent = layout(batch.x), layout(batch.cotangent)
    assert not (x.is_contiguous() or cotangent.is_contiguous())
    strided = type(batch)(x, cotangent, batch.keywords)
    dense = type(batch)(x.contiguous(), cotangent.contiguous(), batch.keywords)
    a, b = run(layer, strided, backend), run(layer, dense, backend)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_two_forwards_before_one_backward(backend: str, device: str):
    layer, batch = build(plain.but(dropout=0.2), torch.float32, device)
    _, other = build(plain.but(seed=5), torch.float32, device)
    expected = run(layer, batch, backend)
    x = batch.x.detach().requires_grad_()
    with smolora.use_backend(backend):
        torch.manual_seed(1)
        y = layer(x, **batch.keywords)
        layer(other.x, **other.keywords)
        y.backward(batch.cotangent)
    assert torch.equal(x.grad, expected["dx"])
