"""What only a GPU can show; skipped with its reason where there is none."""

import pytest
import torch

import smolora
from smolora.reference import smolora_forward
from support.cases import plain
from support.oracle import PARAMETERS, build, error, run

pytestmark = pytest.mark.gpu
bfloat16 = torch.bfloat16


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    "case",
    [
        plain.but(dropout=0.1, mask=True, S=65),  # two tiles an instance, laid from the first routed token
        plain.but(lengths=(5, 0, 70), top_k=2, dropout=0.1, d=41, k=57),  # packed, nothing a multiple of anything
        plain.but(r=128, S=9),  # more columns than a block holds
    ],
    ids=str,
)
def test_small_and_odd(case):
    """Runs under compute-sanitizer too: the shapes at which an address would be out of bounds."""
    layer, batch = build(case, bfloat16, "cuda")
    run(layer, batch, "triton")
    torch.cuda.synchronize()


@pytest.mark.parametrize("layout", [{}, dict(lengths=(5, 0, 70))], ids=str)
def test_no_host_synchronisation(layout: dict):
    """Forward and backward never wait for the GPU, with routing, dropout and a mask."""
    layer, batch = build(plain.but(dropout=0.1, mask=True, top_k=2, **layout), bfloat16, "cuda")
    run(layer, batch, "triton")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(layer, batch, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("S", [1, 70])
def test_graph_replays_equal_eager(S: int):
    """Captured once, replayed 100 times on new inputs: forward and backward equal eager bit for bit."""
    layer, batch = build(plain.but(S=S, B=4), bfloat16, "cuda")
    x = batch.x.detach().clone().requires_grad_()
    inputs = [x, *(layer.get_parameter(n) for n in PARAMETERS if layer.get_parameter(n).requires_grad)]

    def step():
        with smolora.use_backend("triton"):
            y = layer(x, **batch.keywords)
        return (y.detach(), *torch.autograd.grad(y, inputs, batch.cotangent))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(100):
        torch.manual_seed(seed)
        with torch.no_grad():
            x.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.parametrize("side", ["x", "y"])
def test_more_than_two_to_the_31_elements(side: str):
    """x, or y, of more than 2^31 elements, forward and backward: the last instance, which lies past every 32-bit
    offset, has the reference's y and dx."""
    d, k = (32768, 64) if side == "x" else (64, 32768)
    B, S = 3, 24000
    needed = 10 * B * S * 32768  # x or y with gradient and workspace, in bytes
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    assert B * S * max(d, k) > 2**31
    layer, small = build(plain.but(B=B, S=1, d=d, k=k, r=4), bfloat16, "cuda")
    x = torch.randn(B, S, d, device="cuda", dtype=bfloat16).add_(small.x).requires_grad_()
    with smolora.use_backend("triton"):
        y = layer(x, **small.keywords)
    g = torch.randn_like(y)
    y.backward(g)
    rows = slice(S - 32, S)
    routes = tuple(r[-1:].cpu() for r in layer.last_routing().routes)
    last = x.detach()[-1:, rows].double().cpu().requires_grad_()
    base = layer.base_layer
    expected = smolora_forward(
        last,
        base.weight.double().cpu(),
        base.bias.double().cpu(),
        *(layer.get_parameter(n).detach().double().cpu() for n in PARAMETERS),
        None,
        scaling=2.0,
        routes=routes,
    )
    expected.backward(g[-1:, rows].double().cpu())
    assert error(y[-1:, rows], expected) < 1e-2
    assert error(x.grad[-1:, rows], last.grad) < 2e-2


def test_another_device_than_the_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layer, batch = build(plain.but(dropout=0.1), bfloat16, "cuda:1")
    with torch.cuda.device(0):
        got = run(layer, batch, "triton")
    with torch.cuda.device(1):
        expected = run(layer, batch, "triton")
    assert all(torch.equal(got[name], expected[name]) for name in got)
