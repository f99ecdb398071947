"""The layer as a module: its parameters, what it saves and copies, dtypes, autocast, dropout."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import smolora
from smolora import FusedSMoLoRA, SMoLoRAConfig
from support.cases import plain
from support.oracle import PARAMETERS, Case, agree, build, collect, complaints, reference, run

# ----------------------------------------------------------------------------------------------------------- parameters

SHAPES = {
    "vu_A": (3, 8, 40),
    "vu_B": (3, 56, 8),
    "if_A": (5, 8, 40),
    "if_B": (5, 56, 8),
    "vu_router": (3, 40),
    "if_router": (5, 24),
    "vu_importance": (56,),
    "if_importance": (56,),
}


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),  # PEFT's default: a half-precision model trains float32 adapters
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),  # nothing is rounded where a user wants float64
    ],
    ids=str,
)
def test_parameters(base: torch.dtype, adapter: torch.dtype):
    """Names and shapes are a contract, kept by checkpoints and by users' optimisers."""
    linear = nn.Linear(40, 56, dtype=base)
    config = SMoLoRAConfig(r=8, num_vu_experts=3, num_if_experts=5, instruction_dim=24)
    layer = FusedSMoLoRA(linear, config)
    own = dict(layer.named_parameters(recurse=False))
    assert {name: tuple(p.shape) for name, p in own.items()} == SHAPES
    assert {p.dtype for p in own.values()} == {adapter}
    assert layer.base_layer is linear and layer.config is config and linear.weight.dtype == base
    assert (layer.in_features, layer.out_features) == (40, 56)
    assert not list(layer.buffers())


def test_parameters_follow_the_device():
    """A layer over a model that is still on "meta" takes no memory; no parameter lies elsewhere than the base."""
    layer = FusedSMoLoRA(nn.Linear(40, 56, device="meta"), SMoLoRAConfig())
    assert {p.device.type for p in layer.parameters()} == {"meta"}


def test_initial_values():
    """A ~ N(0, 0.01²) and B = 0, as released; routers and importances as `nn.Linear` draws them."""
    torch.manual_seed(0)
    layer = FusedSMoLoRA(nn.Linear(512, 700), SMoLoRAConfig(num_vu_experts=6, num_if_experts=7))
    for A in (layer.vu_A, layer.if_A):
        assert abs(A.std().item() - 0.01) < 2e-4 and abs(A.mean().item()) < 2e-4
        assert 0.03 < A.abs().max().item() < 0.07  # a normal's tails
    assert not layer.vu_B.any() and not layer.if_B.any()
    for name, inputs in (("vu_router", 512), ("if_router", 384), ("vu_importance", 700), ("if_importance", 700)):
        values = getattr(layer, name)
        bound = inputs**-0.5
        assert 0.95 * bound < values.max().item() <= bound and -bound <= values.min().item() < -0.95 * bound
        assert abs(values.std().item() - bound / 3**0.5) < 0.1 * bound
    assert not torch.equal(layer.vu_importance, layer.if_importance)
    torch.manual_seed(0)
    again = FusedSMoLoRA(nn.Linear(512, 700), SMoLoRAConfig(num_vu_experts=6, num_if_experts=7))
    assert all(torch.equal(getattr(layer, name), getattr(again, name)) for name in PARAMETERS)


@pytest.mark.parametrize(
    "case",
    [
        plain,
        plain.but(bias=False),
        plain.but(fusion="mean", top_k=2),
        plain.but(lengths=(5, 0, 9)),
        plain.but(dropout=0.5),
    ],
    ids=str,
)
def test_starts_as_the_base(case: Case):
    """With B = 0 the adapter adds exactly nothing: a run starts from the model it adapts, bit for bit."""
    layer, batch = build(case, torch.float32)
    layer.reset_parameters()
    got = run(layer, batch, "torch")
    base = layer.base_layer
    tokens = nn.functional.linear(batch.x.reshape(-1, case.d), base.weight, base.bias)
    assert torch.equal(got["y"], tokens.view(got["y"].shape))


# -------------------------------------------------------------------------------------------------- as any other module


def test_state_dict_round_trip():
    """The keys are the parameters' names and the base's; loading is strict, exact and independent of what ran."""
    layer, batch = build(plain, torch.float32)
    layer.keep_alpha = True
    expected = run(layer, batch, "torch")
    saved = layer.state_dict()
    assert saved.keys() == {*PARAMETERS, "base_layer.weight", "base_layer.bias"}
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    other, _ = build(plain.but(seed=9), torch.float32)
    other.load_state_dict(torch.load(file, weights_only=True))
    got = run(other, batch, "torch")
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    with pytest.raises(RuntimeError, match=r"Missing key.*if_B"):
        other.load_state_dict({name: value for name, value in saved.items() if name != "if_B"})


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how: str):
    """After a forward and a backward too, a copy computes the same, and shares nothing with the original."""
    layer, batch = build(plain.but(dropout=0.2, router_grad="straight_through"), torch.float32)
    layer.keep_alpha = True
    layer(batch.x.clone().requires_grad_(), **batch.keywords).backward(batch.cotangent)
    layer.zero_grad()
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert other.config == layer.config and other.keep_alpha
    assert {name: p.requires_grad for name, p in other.named_parameters()} == {
        name: p.requires_grad for name, p in layer.named_parameters()
    }
    expected, got = run(layer, batch, "torch"), run(other, batch, "torch")
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    again = run(layer, batch, "torch")
    assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str
)
def test_to_dtype(dtype: torch.dtype, bound: float):
    """`.to(dtype)` moves base and adapter alike; the output has x's dtype and its precision."""
    layer, batch = build(plain, torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)  # so that nothing rounds
    layer.to(dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    batch.x = batch.x.to(dtype)
    batch.cotangent = batch.cotangent.to(dtype)
    got, truth = run(layer, batch, "torch"), reference(layer, batch, torch.float64)
    assert got["y"].dtype == dtype and got["dvu_B"].dtype == dtype
    agree(got, truth, bound)


def test_extra_repr():
    """`print(model)` tells a reader what the layer is."""
    layer, _ = build(plain.but(M=3, N=5, top_k=2, r=12, dropout=0.25, router_grad="straight_through"), torch.float32)
    text = repr(layer)
    words = ["FusedSMoLoRA", "in_features=40", "out_features=56", "r=12", "scaling=2", "3 VU + 5 IF", "top_k=2"]
    words += ["fusion='adaptive'", "router_grad='straight_through'", "dropout=0.25", "(base_layer): Linear"]
    assert not [word for word in words if word not in text]


# ------------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize(
    "case", [plain, plain.but(dropout=0.2, mask=True, top_k=2), plain.but(lengths=(9, 4))], ids=str
)
@pytest.mark.parametrize(
    "base", [torch.float32, torch.bfloat16], ids=str
)  # a float32 base is called, a bfloat16 one is not
def test_autocast(case: Case, base: torch.dtype):
    """Float32 parameters under bfloat16 autocast: an output in bfloat16 that is close to float32's, and the same bits
    of gradient whether backward runs inside of the autocast block or outside."""
    layer, batch = build(case, torch.float32)
    layer.base_layer.to(base)
    truth = reference(layer, batch, torch.float64)
    results = []
    for inside in (True, False):
        x = batch.x.clone().requires_grad_()
        parameters = {name: getattr(layer, name) for name in PARAMETERS}
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x, **batch.keywords)
            assert y.dtype == torch.bfloat16
            if inside:
                results.append(collect(y, x, parameters, batch.cotangent.bfloat16()))
        if not inside:
            results.append(collect(y, x, parameters, batch.cotangent.bfloat16()))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    for name, value in results[0].items():
        assert value.dtype == (torch.bfloat16 if name == "y" else torch.float32), name
    found = complaints(results[0], truth, reference(layer, batch, torch.bfloat16), torch.bfloat16)
    assert not found, found


def test_autocast_off_is_off():
    """A block that switches autocast off inside another gets float32."""
    layer, batch = build(plain, torch.float32)
    expected = run(layer, batch, "torch")
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        got = run(layer, batch, "torch")
    assert got["y"].dtype == torch.float32
    assert all(torch.equal(got[name], expected[name]) for name in expected)


# -------------------------------------------------------------------------------------------------------------- dropout


def test_dropout_in_training_only():
    """In eval the layer is that without dropout, bit for bit, and draws no random number; in training every forward
    draws a mask, the same one after the same seed."""
    layer, batch = build(plain.but(dropout=0.3), torch.float32)
    without, _ = build(plain, torch.float32)

    def forward(of: FusedSMoLoRA, seed: int | None = None) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        with smolora.use_backend("torch"):
            return of(batch.x, **batch.keywords).detach()

    layer.eval()
    state = torch.get_rng_state()
    assert torch.equal(forward(layer), forward(layer)) and torch.equal(forward(layer), forward(without))
    assert torch.equal(torch.get_rng_state(), state)
    layer.train()
    first, second = forward(layer, seed=7), forward(layer)
    assert not torch.equal(first, second) and not torch.equal(first, forward(without))
    assert torch.equal(first, forward(layer, seed=7)) and torch.equal(second, forward(layer))
    assert not torch.equal(first, forward(layer, seed=8))


def test_dropout_moves_no_route():
    """The router sees x before dropout: training routes as inference does."""
    layer, batch = build(plain.but(dropout=0.5, B=16), torch.float32)
    layer(batch.x, **batch.keywords)
    trained = layer.last_routing()
    layer.eval()(batch.x, **batch.keywords)
    for mine, theirs in zip(trained.logits, layer.last_routing().logits, strict=True):
        assert torch.equal(mine, theirs)
