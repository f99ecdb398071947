"""The CUDA C++ kernels, through the layer, against the float64 reference: emulated, and on a GPU."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

import smolora
from cases import OPTIONS, RANKS, SHAPES, plain
from oracle import PARAMETERS, Batch, Case, build, check, complaints, error, reference, run
from smolora import cuda, ops, rank_space
from smolora.layer import decode_together
from smolora.reference import philox_bytes

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


# ---------------------------------------------------------------------------------------------------------- decoding

DECODING = [
    plain,
    plain.but(B=64, top_k=2),
    plain.but(B=1, M=1, N=1),
    plain.but(B=5, given=True, d=41, k=57, r=12),
    plain.but(B=2, d=1100, k=1100, r=128, top_k=3),  # several slices of d and k, instances mixed one after another
    plain.but(fusion="vu", r=1), plain.but(fusion="if", r=128), plain.but(fusion="mean", r=24),
    plain.but(B=7, mask=True, bias=False, shared=True),
    plain.but(B=33, given=True, M=9, N=7, r=48),
    plain.but(B=9, given=True, fusion="mean"), plain.but(B=9, given=True, top_k=2, M=5),  # a warp's second instance
    plain.but(B=5, k=4100), plain.but(B=3, k=8200), plain.but(B=2, k=33000, d=64),  # longer slices of k
]  # fmt: skip


@pytest.mark.sanitizer
@pytest.mark.parametrize("case", DECODING, ids=str)
@pytest.mark.parametrize("dtype", [float32, float16, bfloat16], ids=str)
def test_decode(case: Case, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch):
    """One token an instance and no gradient: one launch, with the reference's y and the torch backend's routing."""
    layer, batch = build(case.but(S=1), dtype, device)
    layer.keep_alpha = True
    for name in ("route_shrink", "fuse_expand"):
        monkeypatch.setattr(cuda, name, lambda *_: pytest.fail("decoding went through the passes"))
    with torch.no_grad(), smolora.use_backend("cuda"):
        got = layer(batch.x, **batch.keywords)
        routing = layer.last_routing()
    truth, eager = ({"y": reference(layer, batch, d)["y"]} for d in (torch.float64, dtype))
    assert not complaints({"y": got}, truth, eager, dtype)
    with torch.no_grad(), smolora.use_backend("torch"):
        layer(batch.x, **batch.keywords)
    expected = layer.last_routing()
    for mine, theirs in zip(routing.routes, expected.routes, strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    for mine, theirs in zip(routing.logits + routing.gates, expected.logits + expected.gates, strict=True):
        assert (mine is None and theirs is None) or error(mine, theirs) < 1e-5
    assert error(routing.alpha, expected.alpha) < (1e-5 if dtype == float32 else 2e-2)


@pytest.mark.parametrize("dtype", [float32, float16, bfloat16], ids=str)
def test_decode_with_all_the_experts_it_takes(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch):
    """As much as a block has room for, and work for every block that fits: more than a sanitizer leaves room for."""
    test_decode(plain.but(B=3, M=128, N=128, r=32, top_k=4, d=64, given=True), dtype, device, monkeypatch)


@pytest.mark.parametrize("parameters", [bfloat16, float16, torch.float64, "mixed", "unaligned"], ids=str)
def test_decode_parameters(parameters: torch.dtype | str, device: str):
    """Of any dtype, of several, or lying where no vector can be loaded."""
    layer, batch = build(plain.but(S=1, B=5, r=12, d=600, k=300), bfloat16, device)
    for i, name in enumerate(PARAMETERS):
        parameter = layer.get_parameter(name)
        if parameters == "unaligned":
            room = torch.empty(parameter.numel() + 1, device=device)
            parameter.data = room[1:].view(parameter.shape).copy_(parameter)
        else:
            parameter.data = parameter.data.to(
                (bfloat16, torch.float64)[i % 2] if parameters == "mixed" else parameters
            )
    with torch.no_grad(), smolora.use_backend("cuda"):
        got = layer(batch.x, **batch.keywords)
    truth, eager = ({"y": reference(layer, batch, dtype)["y"]} for dtype in (torch.float64, bfloat16))
    assert not complaints({"y": got}, truth, eager, bfloat16)


SEVERAL = [
    plain.but(B=5, mask=True),
    plain.but(B=2, d=600, r=24, top_k=2, bias=False),  # several slices of d
    plain.but(B=9, given=True),  # each layer has its own routes
    plain.but(B=1, fusion="vu", d=41),
]


@pytest.mark.sanitizer
@pytest.mark.parametrize("case", SEVERAL, ids=str)
@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
def test_decode_together(case: Case, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch):
    """Layers that share x, of very different sizes, in one launch: right, and the bits of a launch each."""
    built = [build(case.but(S=1, k=k, seed=seed), dtype, device) for seed, k in enumerate((56, 1100, 3, 600))]
    layers, x = [layer for layer, _ in built], built[0][1].x
    batches = []
    for layer, batch in built:
        layer.config = layers[0].config
        if not case.given:  # routes are each layer's, all else is shared
            batch.keywords = built[0][1].keywords
        batches.append(Batch(x, batch.cotangent, batch.keywords))
    run_pass, launches = cuda._run, []
    monkeypatch.setattr(cuda, "_run", lambda name, *rest: (launches.append(name), run_pass(name, *rest)))
    parts = [(layer, layer.base_layer, batch.keywords) for layer, batch in zip(layers, batches, strict=True)]
    with torch.no_grad(), smolora.use_backend("cuda"):
        alone = [layer(x, **batch.keywords) for layer, batch in zip(layers, batches, strict=True)]
        decided = [layer.last_routing() for layer in layers]
        for count in range(1, 5):
            launches.clear()
            results = decode_together(x, parts[:count])
            assert launches == ["decode"] and len(results) == count
            for layer, result, y, routing in zip(layers, results, alone, decided, strict=False):
                layer.forget_routing()
                assert torch.equal(layer.finish(x, result), y)
                for mine, theirs in zip(layer.last_routing()[:3], routing[:3], strict=True):
                    for a, b in zip(mine, theirs, strict=True):
                        assert (a is None and b is None) or torch.equal(a, b)
    for layer, batch, y in zip(layers, batches, alone, strict=True):
        truth, eager = ({"y": reference(layer, batch, each)["y"]} for each in (torch.float64, dtype))
        assert not complaints({"y": y}, truth, eager, dtype)


def test_decode_together_is_limited(device: str):
    """More projections than a launch takes are refused; what no launch is for comes back as None."""
    layer, batch = build(plain.but(S=1), float32, device)
    part = (layer, layer.base_layer, batch.keywords)
    with torch.no_grad(), smolora.use_backend("cuda"), pytest.raises(ValueError, match="1 to 4 projections, got 5"):
        decode_together(batch.x, [part] * 5)
    with torch.no_grad(), smolora.use_backend("torch"):
        assert decode_together(batch.x, [part]) is None
    with smolora.use_backend("cuda"):
        assert decode_together(batch.x, [part]) is None  # a gradient may be asked for
        other, _ = build(plain.but(S=1, top_k=2), float32, device)
        with torch.no_grad():
            assert decode_together(batch.x, [part, (other, other.base_layer, batch.keywords)]) is None


def test_decode_is_for_inference_of_one_token(device: str, monkeypatch: pytest.MonkeyPatch):
    """With a gradient, dropout, more tokens, instances or experts, the four passes run."""
    monkeypatch.setattr(cuda, "decode", lambda *_: pytest.fail("decode ran"))
    check(plain.but(S=1), float32, "cuda", device)
    larger = plain.but(S=1, M=200, r=64)  # more than a block has room for
    for case in (plain.but(S=1, dropout=0.1), plain.but(S=2), plain.but(S=1, B=65), plain.but(lengths=(1, 1)), larger):
        layer, batch = build(case, float32, device)
        with torch.no_grad(), smolora.use_backend("cuda"):
            assert torch.isfinite(layer(batch.x, **batch.keywords)).all()


class Operators(TorchDispatchMode):
    """Names of the operators that run, but for those that launch nothing: views, fresh memory, casts to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **kwargs or {}), func.overloadpacket.__name__
        tensors = isinstance(out, torch.Tensor) and isinstance(args[0], torch.Tensor)
        same = tensors and out.data_ptr() == args[0].data_ptr() and not name.endswith("_")
        if not same and name not in ("empty", "new_empty"):
            self.names.append(name)
        return out


@pytest.mark.parametrize("given", [True, False])
def test_decode_is_one_launch(given: bool, device: str, monkeypatch: pytest.MonkeyPatch):
    """Beside the base's product, which cuBLAS computes: no copy, no cast and no fill before it or after."""
    layer, batch = build(plain.but(S=1, given=given, mask=not given), bfloat16, device)
    decode, inside = cuda.decode, Operators()

    def recorded(*arguments):
        with inside:
            return decode(*arguments)

    with torch.no_grad(), smolora.use_backend("cuda"):
        layer(batch.x, **batch.keywords)
        chosen = layer.last_chosen()
        monkeypatch.setattr(cuda, "decode", recorded)
        with Operators() as outside:
            layer(batch.x, **({"routes": chosen} if given else batch.keywords))
    assert outside.names == ["decode"] and inside.names in (["linear"], ["addmm"])


@pytest.mark.gpu
@pytest.mark.parametrize("given", [True, False])
def test_decode_is_one_kernel(given: bool):
    """The same, as the driver counts it, for the adapter by itself."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # the fills would be kernels, too
    layer, batch = build(plain.but(S=1, given=given), bfloat16, "cuda")
    forward = smolora.layer.SMoLoRAExperts.forward
    with torch.no_grad(), smolora.use_backend("cuda"):
        forward(layer, batch.x, **batch.keywords)
        keywords = {"routes": layer.last_chosen()} if given else batch.keywords
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            forward(layer, batch.x, **keywords)
            torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in on_device if not name.startswith("Activity Buffer")]  # the profiler's own
    assert len(kernels) == 1 and "decode_kernel" in kernels[0]


@pytest.mark.gpu
def test_captured_together():
    """Two layers that share x, in a graph: 100 replays on new inputs, bit for bit those of a launch each."""
    (one, batch), (two, _) = (build(plain.but(S=1, B=4, k=k, seed=k), bfloat16, "cuda") for k in (56, 200))
    two.config = one.config
    x, parts = batch.x.clone(), [(layer, layer.base_layer, batch.keywords) for layer in (one, two)]
    with torch.no_grad(), smolora.use_backend("cuda"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            decode_together(x, parts)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = decode_together(x, parts)
        for _ in range(100):
            x.normal_()
            graph.replay()
            for layer, result in zip((one, two), captured, strict=True):
                assert torch.equal(layer.finish(x, result), layer(x, **batch.keywords))


def test_decode_onto_a_base_that_is_called(device: str):
    """A base with a hook is no plain product: decode gives the adapter's output alone."""
    layer, batch = build(plain.but(S=1), float32, device)
    layer.base_layer.register_forward_hook(lambda module, inputs, output: output + 1)
    with torch.no_grad(), smolora.use_backend("cuda"):
        got = layer(batch.x, **batch.keywords)
    assert error(got - 1, reference(layer, batch, torch.float64)["y"]) < 1e-6


# ---------------------------------------------------------------------------------------------------- what must equal


@pytest.mark.parametrize("seed", [0, 5, 2**62 + 12345])
def test_masks_are_those_of_every_backend(seed: int, device: str):
    """Bit for bit: a dx of ones wherever the mask keeps, scaled, for each branch's stream."""
    T, d, threshold = 20, 70, 77
    ones = torch.ones(1, 1, d, device=device)
    dh = torch.ones(T, 1, 1, 1, device=device)
    routes = torch.zeros(1, 1, 1, dtype=torch.int32, device=device)
    for stream, fusion in enumerate(("vu", "if")):
        dx, *_ = cuda.grad_input(
            None, dh, routes, ones, ones, 1, None, None, None, torch.tensor([seed], device=device), threshold, fusion,
            float32, True, False, False, None, None,
        )  # fmt: skip
        kept = philox_bytes(seed, T, d, stream) >= threshold
        assert torch.equal(dx.cpu() != 0, torch.from_numpy(kept))
        (expected,) = rank_space.keep_masks(torch.tensor([seed]), T, d, threshold, (stream,), float32)
        assert torch.equal(dx.cpu(), expected * (256 / (256 - threshold)))


@pytest.mark.parametrize("dtype", [float16, bfloat16], ids=str)
def test_rounding(dtype: torch.dtype, device: str):
    """To nearest, ties to even, for numbers of every size: y is h where B is 1 and the VU branch has all the share."""
    random = torch.Generator().manual_seed(0)
    h = torch.randn(2048, generator=random) * 2.0 ** torch.randint(-30, 16, (2048,), generator=random)
    ties = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 2**-25, 3 * 2**-25, 65519, 0.0, -0.0])
    h = torch.cat([h, ties, -ties]).view(-1, 1, 1, 1).to(device)
    n, one = len(h), torch.ones(1, 1, 1, device=device)
    y, _ = cuda.fuse_expand(
        h, torch.empty(0, 1, device=device), torch.zeros(1, 1, 1, dtype=torch.int32, device=device),
        torch.ones(1, 1, 1, device=device), one, one, 1, None, 1.0, "vu", dtype, None, None, None,
    )  # fmt: skip
    assert torch.equal(y.view(n), h.view(n).to(dtype))


def test_golden(device: str, monkeypatch: pytest.MonkeyPatch):
    """y and every gradient of the released code's own autograd; y from decoding its tokens, too."""
    with safe_open(GOLDEN / "layer_fp32_e8.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.offset_keys()}
        m = {key: int(float(value)) for key, value in file.metadata().items()}
    r, half = m["lora_r_total"] // m["expert_num"], m["expert_num"] // 2
    config = smolora.SMoLoRAConfig.official(
        r=r, lora_alpha=r * m["lora_alpha"] / m["lora_r_total"], lora_dropout=0.0, num_vu_experts=half,
        num_if_experts=half,
    )  # fmt: skip
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
    monkeypatch.setattr(cuda, "route_shrink", lambda *_: pytest.fail("decoding went through the passes"))
    with torch.no_grad(), smolora.use_backend("cuda"):
        for start in range(0, len(tokens), cuda.MAX_DECODE_INSTANCES):
            part = slice(start, start + cuda.MAX_DECODE_INSTANCES)
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


@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
def test_decode_is_repeatable(dtype: torch.dtype, device: str, request: pytest.FixtureRequest):
    layer, batch = build(plain.but(S=1, B=5, d=600, k=600, top_k=2), dtype, device)
    with torch.no_grad(), smolora.use_backend("cuda"):
        first = layer(batch.x, **batch.keywords)
        for _ in range(250 if device == "cuda" else 1):
            if device == "cpu":
                request.getfixturevalue("emulated").set_order(True)
            assert torch.equal(layer(batch.x, **batch.keywords), first)


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
    calls = {}
    for name in ("route_shrink", "fuse_expand", "grad_output", "grad_input", "decode"):
        operator = getattr(ops, name)

        def record(*arguments, name=name, operator=operator):
            calls[name] = (operator, arguments)
            return operator(*arguments)

        monkeypatch.setattr(ops, name, record)
    layer, batch = build(case, float32, device)
    if case.S == 1:
        with torch.no_grad(), smolora.use_backend("cuda"):
            layer(batch.x, **batch.keywords)
    else:
        run(layer, batch, "cuda")
    assert len(calls) == (1 if case.S == 1 else 4)
    torch.utils.deterministic.fill_uninitialized_memory = False  # empty outputs are compared too
    for operator, arguments in calls.values():
        detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        with torch.no_grad():
            torch.library.opcheck(operator, tuple(detached))


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
def test_streams_share_nothing():
    """Decoding on two streams at a time: each launch has a barrier of its own."""
    layer, batch = build(plain.but(S=1, B=4, d=512, k=512), bfloat16, "cuda")
    streams = [torch.cuda.Stream() for _ in range(2)]
    with torch.no_grad(), smolora.use_backend("cuda"):
        expected = layer(batch.x, **batch.keywords)
        torch.cuda.synchronize()
        results = []
        for i in range(200):
            with torch.cuda.stream(streams[i % 2]):
                results.append(layer(batch.x, **batch.keywords))
        torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


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
    with smolora.use_backend("cuda"), pytest.raises(ValueError, match=r"up to 2048 numbers .* got 2304"):
        layer(batch.x, **batch.keywords)


def test_float64_is_refused(device: str):
    layer, batch = build(plain, torch.float64, device)
    with smolora.use_backend("cuda"), pytest.raises(RuntimeError, match=r"float16 and bfloat16, not torch\.float64"):
        layer(batch.x, **batch.keywords)


def test_check_can_fail(emulated, monkeypatch: pytest.MonkeyPatch):
    """A wrong scale, and a pass of another layer's weights, are found by the check that the other tests use."""
    wrong = cuda.fuse_expand
    monkeypatch.setattr(cuda, "fuse_expand", lambda h, *rest: wrong(1.01 * h, *rest))
    with pytest.raises(AssertionError, match="y: error"):
        check(plain, float32, "cuda")
