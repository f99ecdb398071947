"""Decoding in CUDA C++: one token a sequence, in one launch, emulated and on a GPU."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import smolora
from smolora.engine import cuda_passes
from smolora.methods.base import decode_layers
from smolora.methods.smolora import SMoLoRAExperts
from smolora.spec import Mixed
from support.cases import plain
from support.oracle import PARAMETERS, Batch, Case, build, check, complaints, error, reference

float32, float16, bfloat16 = torch.float32, torch.float16, torch.bfloat16

DECODING = [
    plain,
    plain.but(B=64, top_k=2),
    plain.but(B=1, M=1, N=1),
    plain.but(B=5, given=True, d=41, k=57, r=12),
    plain.but(B=2, d=1100, k=1100, r=128, top_k=3),  # several slices of d and k, sequences mixed one after another
    plain.but(fusion="vu", r=1),
    plain.but(fusion="if", r=128),
    plain.but(fusion="mean", r=24),
    plain.but(B=7, mask=True, bias=False, shared=True),
    plain.but(B=33, given=True, M=9, N=7, r=48),
    plain.but(B=9, given=True, fusion="mean"),
    plain.but(B=9, given=True, top_k=2, M=5),  # a warp's second sequence
    plain.but(B=5, k=4100),
    plain.but(B=3, k=8200),
    plain.but(B=2, k=33000, d=64),  # longer slices of k
]


@pytest.mark.sanitizer
@pytest.mark.parametrize("case", DECODING, ids=str)
@pytest.mark.parametrize("dtype", [float32, float16, bfloat16], ids=str)
def test_decode(case: Case, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch):
    """One token a sequence and no gradient: one launch, with the reference's y and the torch backend's routing."""
    layer, batch = build(case.but(S=1), dtype, device)
    layer.keep_alpha = case.fusion == "adaptive"
    for name in ("route_shrink", "fuse_expand"):
        monkeypatch.setattr(cuda_passes, name, lambda *_: pytest.fail("decoding went through the passes"))
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
    if layer.keep_alpha:
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


def together(x: torch.Tensor, layers: list[smolora.FusedSMoLoRA], batch: Batch) -> list[Mixed]:
    """Layers that share x, in one launch; where routes are given, those of each layer's last forward."""
    calls = []
    for layer in layers:
        layer.config = layers[0].config  # as the layers of a model have one
        call = {"routes": layer.last_chosen()} if "routes" in batch.keywords else batch.keywords
        calls.append((layer, layer.base_layer, call))
    with smolora.use_backend("cuda"):
        return decode_layers(x, calls)


@pytest.mark.sanitizer
@pytest.mark.parametrize("case", SEVERAL, ids=str)
@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
def test_decode_together(case: Case, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch):
    """Layers that share x, of very different sizes, in one launch: right, and the bits of a launch each."""
    built = [build(case.but(S=1, k=k, seed=seed), dtype, device) for seed, k in enumerate((56, 1100, 3, 600))]
    layers, x = [layer for layer, _ in built], built[0][1].x
    batches = []
    for _, batch in built:
        if not case.given:  # routes are each layer's, all else is shared
            batch.keywords = built[0][1].keywords
        batches.append(Batch(x, batch.cotangent, batch.keywords))
    run_pass, launches = cuda_passes.run_pass, []
    monkeypatch.setattr(cuda_passes, "run_pass", lambda name, *rest: (launches.append(name), run_pass(name, *rest)))
    with torch.no_grad(), smolora.use_backend("cuda"):
        alone = [layer(x, **batch.keywords) for layer, batch in zip(layers, batches, strict=True)]
        for count in range(1, 5):
            launches.clear()
            results = together(x, layers[:count], batches[0])
            assert launches == ["decode"] and len(results) == count
            for layer, result, y in zip(layers, results, alone, strict=False):
                assert torch.equal(result.y, y[:, 0])
                assert all(map(torch.equal, result[1:3], layer.last_chosen()))
                logits = [z for z in layer.last_routing().logits if z is not None]
                assert torch.equal(result.logits, torch.cat(logits, 1)) if logits else result.logits is None
    for layer, batch, y in zip(layers, batches, alone, strict=True):
        truth, eager = ({"y": reference(layer, batch, each)["y"]} for each in (torch.float64, dtype))
        assert not complaints({"y": y}, truth, eager, dtype)


@pytest.mark.sanitizer
@pytest.mark.parametrize("case", SEVERAL, ids=str)
@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
def test_decode_as_a_graph_has_it(case: Case, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch):
    """A launch before the base's products and one after them, which y alone goes into: the bits of a single launch."""
    built = [build(case.but(S=1, k=k, seed=seed), dtype, device) for seed, k in enumerate((1100, 56))]
    layers, batch = [layer for layer, _ in built], built[0][1]
    run_pass, linear, order = cuda_passes.run_pass, torch.nn.functional.linear, []

    def launch(name: str, like: torch.Tensor, *parts: dict) -> None:
        order.append((name, {fields["half"] for fields in parts}, {"y" in fields for fields in parts}))
        run_pass(name, like, *parts)

    with torch.no_grad(), smolora.use_backend("cuda"):
        for layer in layers:
            layer(batch.x, **batch.keywords)  # of which `together` takes the routes, where they are given
        whole = together(batch.x, layers, batch)
        monkeypatch.setattr(cuda_passes, "in_capture", lambda x: True)
        if device == "cpu":
            monkeypatch.setattr(cuda_passes, "beside", lambda x: nullcontext())
        monkeypatch.setattr(cuda_passes, "run_pass", launch)
        monkeypatch.setattr(torch.nn.functional, "linear", lambda *rest: (order.append("linear"), linear(*rest))[1])
        halves = together(batch.x, layers, batch)
    assert order == [("decode", {1}, {False}), "linear", "linear", ("decode", {2}, {True})]
    for one, other in zip(whole, halves, strict=True):
        for left, right in zip(one, other, strict=True):
            assert (left is None and right is None) or torch.equal(left, right)


def test_more_projections_than_a_launch_takes(device: str):
    layer, batch = build(plain.but(S=1), float32, device)
    with torch.no_grad(), pytest.raises(ValueError, match="1 to 4 projections, got 5"):
        together(batch.x, [layer] * 5, batch)


def test_a_forward_with_gradients_is_left_to_the_passes(device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_passes, "decode", lambda *_: pytest.fail("decode ran"))
    check(plain.but(S=1), float32, "cuda", device)


@pytest.mark.parametrize(
    "case",
    [
        plain.but(S=1, dropout=0.1),
        plain.but(S=2),
        plain.but(S=1, B=65),  # more sequences than a launch takes
        plain.but(lengths=(1, 1)),
        plain.but(S=1, M=200, r=64),  # more numbers of w than a block has room for
    ],
    ids=str,
)
def test_what_decode_leaves_to_the_passes(case: Case, device: str, monkeypatch: pytest.MonkeyPatch):
    """Without a gradient, too; y is the reference's, by the same dropout masks."""
    monkeypatch.setattr(cuda_passes, "decode", lambda *_: pytest.fail("decode ran"))
    layer, batch = build(case, float32, device)
    truth, eager = ({"y": reference(layer, batch, dtype)["y"]} for dtype in (torch.float64, float32))
    torch.manual_seed(1)  # of the reference's masks
    with torch.no_grad(), smolora.use_backend("cuda"):
        got = layer(batch.x, **batch.keywords)
    assert not complaints({"y": got}, truth, eager, float32)


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
    decode, inside = cuda_passes.decode, Operators()

    def recorded(*arguments):
        with inside:
            return decode(*arguments)

    with torch.no_grad(), smolora.use_backend("cuda"):
        layer(batch.x, **batch.keywords)
        chosen = layer.last_chosen()
        monkeypatch.setattr(cuda_passes, "decode", recorded)
        with Operators() as outside:
            layer(batch.x, **({"routes": chosen} if given else batch.keywords))
    assert outside.names == ["decode"] and inside.names in (["linear"], ["addmm"])


@pytest.mark.gpu
@pytest.mark.parametrize("given", [True, False])
def test_decode_is_one_kernel(given: bool):
    """The same, as the driver counts it, for the adapter by itself."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # the fills would be kernels, too
    layer, batch = build(plain.but(S=1, given=given), bfloat16, "cuda")
    forward = SMoLoRAExperts.forward
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
    x, layers = batch.x.clone(), [one, two]
    with torch.no_grad(), smolora.use_backend("cuda"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            together(x, layers, batch)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = together(x, layers, batch)
        for _ in range(100):
            x.normal_()
            graph.replay()
            for layer, result in zip(layers, captured, strict=True):
                assert torch.equal(result.y, layer(x, **batch.keywords)[:, 0])


def test_decode_onto_a_base_that_is_called(device: str):
    """A base with a hook is no plain product: decode gives the adapter's output alone."""
    layer, batch = build(plain.but(S=1), float32, device)
    layer.base_layer.register_forward_hook(lambda module, inputs, output: output + 1)
    with torch.no_grad(), smolora.use_backend("cuda"):
        got = layer(batch.x, **batch.keywords)
    assert error(got - 1, reference(layer, batch, torch.float64)["y"]) < 1e-6


@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
def test_decode_is_repeatable(dtype: torch.dtype, device: str, request: pytest.FixtureRequest):
    layer, batch = build(plain.but(S=1, B=5, d=600, k=600, top_k=2), dtype, device)
    with torch.no_grad(), smolora.use_backend("cuda"):
        first = layer(batch.x, **batch.keywords)
        for _ in range(250 if device == "cuda" else 1):
            if device == "cpu":
                request.getfixturevalue("emulated").set_order(True)
            assert torch.equal(layer(batch.x, **batch.keywords), first)


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
