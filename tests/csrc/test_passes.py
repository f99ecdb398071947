"""The CUDA C++ kernels, through the layer, against the float64 reference: emulated, and on a GPU."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import smolora
from recorded import RecordedPasses
from smolora.engine import cuda_passes
from smolora.engine.philox import keep_masks
from smolora.reference import philox_bytes
from support.cases import OPTIONS, RANKS, SHAPES, plain
from support.oracle import PARAMETERS, Case, build, check, complaints, error, reference, run

float32, float16, bfloat16 = torch.float32, torch.float16, torch.bfloat16
GOLDEN = Path(__file__).parents[1] / "golden"

LARGER = [
    plain.but(B=2, S=70, d=300, k=270, dropout=0.1, mask=True),  # several tiles, stages and blocks of d and k
    plain.but(B=1, S=200, d=72, k=520),  # several chunks of tokens, two blocks of k in one read of g
    plain.but(r=32, d=136, k=264, S=40, dropout=0.05),  # all columns of one read of g
    plain.but(M=9, r=16, d=520, k=40),  # more VU columns than one pass over x takes
]


@pytest.mark.parametrize("case", OPTIONS + SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
def test_against_float64(case: Case, dtype: torch.dtype, device: str):
    check(case, dtype, "cuda", device)


@pytest.mark.parametrize("case", RANKS + LARGER, ids=str)
@pytest.mark.parametrize("dtype", [float32, float16, bfloat16], ids=str)
def test_ranks_and_sizes(case: Case, dtype: torch.dtype, device: str):
    check(case, dtype, "cuda", device)


@pytest.mark.parametrize("parameters", [bfloat16, float16, torch.float64], ids=str)
def test_parameters_of_another_dtype(parameters: torch.dtype, device: str):
    """A parameter that already has the compute dtype is read where it lies; all others are rounded."""
    layer, batch = build(plain.but(r=16, d=48, k=64, dropout=0.1), bfloat16, device)
    for name in PARAMETERS:
        parameter = layer.get_parameter(name)
        parameter.data = parameter.data.to(parameters)
    got = run(layer, batch, "cuda")
    truth, eager = reference(layer, batch, torch.float64), reference(layer, batch, bfloat16)
    assert got["dvu_A"].dtype == parameters
    assert not complaints(got, truth, eager, bfloat16)


def test_strided_boundaries(device: str):
    """`cu_seqlens` may be a column of a table."""
    layer, batch = build(plain.but(lengths=(5, 0, 17, 1)), float32, device)
    table = torch.stack([batch.keywords["cu_seqlens"], torch.full_like(batch.keywords["cu_seqlens"], 9)], 1)
    with smolora.use_backend("cuda"):
        expected = layer(batch.x, **batch.keywords)
        assert torch.equal(layer(batch.x, **{**batch.keywords, "cu_seqlens": table[:, 0]}), expected)


# ---------------------------------------------------------------------------------------------------- what must equal


@pytest.mark.parametrize("seed", [0, 5, 2**62 + 12345])
def test_masks_are_those_of_every_backend(seed: int, device: str):
    """Bit for bit: a dx of ones wherever the mask keeps, scaled, for every stream."""
    T, d, threshold = 20, 70, 77
    ones = torch.ones(1, 1, d, device=device)
    dh = torch.ones(T, 1, 1, 1, device=device)
    ids = torch.zeros(1, 1, 1, dtype=torch.int32, device=device)
    for stream in (0, 1, 5):
        dx, *_ = cuda_passes.grad_input(
            x=None,
            dh=dh,
            ids=ids,
            A=[ones],
            trained=[],
            token_router=None,
            dtoken_logits=None,
            num_seqs=1,
            cu_seqlens=None,
            route_mask=None,
            dmean=None,
            seed=torch.tensor([seed], device=device),
            streams=[stream],
            threshold=threshold,
            masks=None,
            dtype=float32,
            need_dx=True,
            need_A=[False],
            need_token_router=False,
            g=None,
            base_weight=None,
        )
        kept = philox_bytes(seed, T, d, stream) >= threshold
        assert torch.equal(dx.cpu() != 0, torch.from_numpy(kept))
        (expected,) = keep_masks(torch.tensor([seed]), T, d, threshold, (stream,), float32)
        assert torch.equal(dx.cpu(), expected * (256 / (256 - threshold)))


@pytest.mark.parametrize("dtype", [float16, bfloat16], ids=str)
def test_rounding(dtype: torch.dtype, device: str):
    """To nearest, ties to even, for numbers of every size: y is h where B is 1."""
    random = torch.Generator().manual_seed(0)
    h = torch.randn(2048, generator=random) * 2.0 ** torch.randint(-30, 16, (2048,), generator=random)
    ties = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 2**-25, 3 * 2**-25, 65519, 0.0, -0.0])
    h = torch.cat([h, ties, -ties]).view(-1, 1, 1, 1).to(device)
    n, one = len(h), torch.ones(1, 1, 1, device=device)
    y, _ = cuda_passes.fuse_expand(
        h=h,
        w=torch.empty(0, 1, device=device),
        ids=None,
        slot_weights=None,
        scores=None,
        B=[one],
        num_seqs=1,
        cu_seqlens=None,
        scaling=1.0,
        mix="weighted",
        dtype=dtype,
        x=None,
        base_weight=None,
        base_bias=None,
    )
    assert torch.equal(y.view(n), h.view(n).to(dtype))


def test_golden(device: str, monkeypatch: pytest.MonkeyPatch):
    """y and every gradient of the released code's own autograd; y from decoding its tokens, too."""
    with safe_open(GOLDEN / "layer_fp32_e8.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.offset_keys()}
        m = {key: int(float(value)) for key, value in file.metadata().items()}
    r, half = m["lora_r_total"] // m["expert_num"], m["expert_num"] // 2
    config = smolora.SMoLoRAConfig.official(
        r=r,
        lora_alpha=r * m["lora_alpha"] / m["lora_r_total"],
        lora_dropout=0.0,
        num_vu_experts=half,
        num_if_experts=half,
    )
    bias = "param.bias" in tensors
    layer = smolora.FusedSMoLoRA(torch.nn.Linear(m["in_features"], m["out_features"], bias), config)
    layer.load_official_state_dict({k.removeprefix("param."): t for k, t in tensors.items() if k.startswith("param.")})
    layer.to(device)
    x = tensors["x"].to(device).requires_grad_()
    with smolora.use_backend("cuda"):
        y = layer(x, instruction=tensors["ins_emb"][m["ins_type"]].to(device))
        y.backward(tensors["dy"].to(device))
    got = {"y": y, "dx": x.grad, "vu_importance": layer.vu_importance.grad, "if_importance": layer.if_importance.grad}
    expected = {"y": tensors["y"], "dx": tensors["dx"]}
    expected |= {
        name: tensors[f"grad.{key}.default.weight"][0]
        for name, key in (("vu_importance", "lora_fc_A"), ("if_importance", "lora_fc_B"))
    }
    for letter in "AB":
        grads = [tensors[f"grad.lora_{letter}.default.lora{letter}.{e}.weight"] for e in range(2 * half)]
        for branch, part in (("vu", grads[:half]), ("if", grads[half:])):
            got[f"{branch}_{letter}"] = layer.get_parameter(f"{branch}_{letter}").grad
            expected[f"{branch}_{letter}"] = torch.stack(part)
    assert all(value.norm() > 0 for value in expected.values())
    errors = {name: error(got[name], expected[name]) for name in expected}
    assert max(errors.values()) < 1e-5, errors
    routes = [branch.repeat_interleave(x.shape[1]) for branch in layer.last_routing().routes]  # a token by itself
    tokens = x.detach().flatten(0, 1)[:, None]
    monkeypatch.setattr(cuda_passes, "route_shrink", lambda *_: pytest.fail("decoding went through the passes"))
    with torch.no_grad(), smolora.use_backend("cuda"):
        for start in range(0, len(tokens), cuda_passes.MAX_DECODE_SEQS):
            part = slice(start, start + cuda_passes.MAX_DECODE_SEQS)
            decoded = layer(tokens[part], routes=(routes[0][part], routes[1][part]))
            assert error(decoded[:, 0].cpu(), tensors["y"].flatten(0, 1)[part]) < 1e-6


@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
@pytest.mark.parametrize("case", [plain.but(S=70, M=4), plain.but(S=70, M=4, r=64)], ids=["one pass", "two passes"])
def test_route_logits_do_not_move(case: Case, dtype: torch.dtype, device: str):
    """An instance's logits are the same bits alone, in a batch, packed, and padded on either side."""
    layer, batch = build(case, dtype, device)
    x, emb = batch.x, batch.keywords["instruction"]

    def logits(x: torch.Tensor, **keywords) -> torch.Tensor:
        with smolora.use_backend("cuda"):
            layer(x, **keywords)
        return layer.last_routing().logits[0]

    together = logits(x, instruction=emb)
    for i in range(case.B):
        assert torch.equal(logits(x[i : i + 1], instruction=emb[i : i + 1])[0], together[i])
    cu = torch.arange(0, case.B * case.S + 1, case.S, dtype=torch.int32, device=device)
    assert torch.equal(logits(x.flatten(0, 1), instruction=emb, cu_seqlens=cu), together)
    for left, right in ((3, 0), (61, 7)):
        padded = torch.nn.functional.pad(x, (0, 0, left, right), value=1e3)
        mask = torch.zeros(padded.shape[:2], dtype=torch.bool, device=device)
        mask[:, left : left + case.S] = True
        assert torch.equal(logits(padded, instruction=emb, route_mask=mask), together)


SMALL = [
    plain.but(dropout=0.1, mask=True, S=65, B=2, d=130, k=270),  # two tiles an instance, and blocks of d and k
    plain.but(lengths=(5, 0, 70), top_k=2, dropout=0.1, d=41, k=57),  # packed, nothing a multiple of anything
    plain.but(r=64, S=9, router_grad="straight_through"),  # two passes over x, two reads of g
    plain.but(r=128, top_k=2, S=5),
]


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
def test_small_and_odd(case: Case, dtype: torch.dtype):
    """For compute-sanitizer: the shapes at which an address would be out of bounds."""
    layer, batch = build(case, dtype, "cuda")
    run(layer, batch, "cuda")
    torch.cuda.synchronize()


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
def test_repeatable(case: Case, dtype: torch.dtype, device: str, request: pytest.FixtureRequest):
    """Bit for bit the same: 250 times on a GPU; emulated, with threads and blocks run in the opposite order, which
    changes a result that hangs on the order, as one behind a missing barrier does."""
    layer, batch = build(case, dtype, device)
    first = run(layer, batch, "cuda")
    for _ in range(250 if device == "cuda" else 1):
        if device == "cpu":
            request.getfixturevalue("emulated").set_order(True)
        again = run(layer, batch, "cuda")
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_nothing_trains_nothing_runs(device: str):
    """What is frozen costs no kernel and gets no gradient: only B's first, then only dx."""
    layer, batch = build(plain.but(dropout=0.1), float32, device)
    full = run(layer, batch, "cuda")
    for trained in ("vu_B", "if_A", "if_importance"):
        for name in PARAMETERS:
            layer.get_parameter(name).requires_grad_(name == trained)
        torch.manual_seed(1)
        with smolora.use_backend("cuda"):
            layer(batch.x, **batch.keywords).backward(batch.cotangent)
        assert torch.equal(layer.get_parameter(trained).grad, full[f"d{trained}"])
        layer.zero_grad()


@pytest.mark.parametrize("case", [plain.but(top_k=2, mask=True, dropout=0.1), plain.but(S=1)], ids=str)
def test_opcheck(case: Case, device: str, monkeypatch: pytest.MonkeyPatch):
    """Every operator with the arguments that a layer calls it with: schema, fakes, and nothing mutated or aliased."""
    layer, batch = build(case, float32, device)
    with RecordedPasses() as recorded:
        if case.S == 1:
            with torch.no_grad(), smolora.use_backend("cuda"):
                layer(batch.x, **batch.keywords)
        else:
            run(layer, batch, "cuda")
    assert len(recorded.arguments) == (1 if case.S == 1 else 4)
    torch.utils.deterministic.fill_uninitialized_memory = False  # empty outputs are compared too
    for name, arguments in recorded.arguments.items():
        with torch.no_grad():
            torch.library.opcheck(getattr(torch.ops.smolora, name).default, (*arguments, "cuda"))


# ------------------------------------------------------------------------------------------------ what a GPU must show


@pytest.mark.gpu
@pytest.mark.parametrize("S", [1, 70])
def test_graph_replays_equal_eager(S: int):
    """Captured once, replayed 100 times on new inputs: a decode step, and forward and backward, bit for bit."""
    layer, batch = build(plain.but(S=S, B=4), bfloat16, "cuda")
    x = batch.x.detach().clone().requires_grad_(S > 1)
    inputs = [x, *(layer.get_parameter(n) for n in PARAMETERS if layer.get_parameter(n).requires_grad)]

    def step() -> tuple[torch.Tensor, ...]:
        with smolora.use_backend("cuda"), torch.set_grad_enabled(S > 1):
            y = layer(x, **batch.keywords)
        return (y.detach(), *(torch.autograd.grad(y, inputs, batch.cotangent) if S > 1 else ()))

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


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [dict(S=1), dict(S=70), dict(lengths=(5, 0, 70))], ids=str)
def test_no_host_synchronisation(layout: dict):
    layer, batch = build(plain.but(dropout=0.1, mask=True, top_k=2, **layout), bfloat16, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(layer, batch, "cuda")
        with torch.no_grad(), smolora.use_backend("cuda"):
            layer.eval()(batch.x, **batch.keywords)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("side", ["x", "y"])
def test_more_than_two_to_the_31_elements(side: str):
    """x, or y, past every 32-bit offset, forward and backward: the last instance has the triton backend's results."""
    d, k = (32768, 64) if side == "x" else (64, 32768)
    B, S = 3, 24000
    needed = 12 * B * S * 32768  # x or y with gradient, twice, and workspace, in bytes
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    layer, small = build(plain.but(B=B, S=1, d=d, k=k, r=4), bfloat16, "cuda")
    x = torch.randn(B, S, d, device="cuda", dtype=bfloat16).add_(small.x).requires_grad_()
    last = []
    for backend in ("cuda", "triton"):
        x.grad = None
        with smolora.use_backend(backend):
            y = layer(x, **small.keywords)
        y.backward(torch.ones_like(y))
        last.append((y.detach()[-1, -32:].clone(), x.grad[-1, -32:].clone()))
        del y
    for mine, theirs in zip(*last, strict=True):
        assert error(mine, theirs) < 1e-2


# ------------------------------------------------------------------------------------------------------------ refusals


def test_refuses_what_it_has_no_room_for(device: str):
    """Asked for by name it says so, before anything runs; nothing falls back."""
    layer, batch = build(plain.but(r=128, top_k=9, M=9, N=9), float32, device)
    with smolora.use_backend("cuda"), pytest.raises(RuntimeError, match=r"'cuda' cannot run: .* 2048 .* not 2304"):
        layer(batch.x, **batch.keywords)


def test_float64_is_refused(device: str):
    layer, batch = build(plain, torch.float64, device)
    with smolora.use_backend("cuda"), pytest.raises(RuntimeError, match=r"float16 and bfloat16, not torch\.float64"):
        layer(batch.x, **batch.keywords)


def test_check_can_fail(emulated, monkeypatch: pytest.MonkeyPatch):
    """A wrong scale, and a pass of another layer's weights, are found by the check that the other tests use."""
    wrong = cuda_passes.fuse_expand
    monkeypatch.setattr(cuda_passes, "fuse_expand", lambda h, *rest: wrong(1.01 * h, *rest))
    with pytest.raises(AssertionError, match="y: error"):
        check(plain, float32, "cuda")
