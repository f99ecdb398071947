"""The layer as a module: its parameters, what is frozen, what it keeps, the base it wraps, and routing."""

import copy
import io
import os
import pickle
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import smolora
from cases import plain
from oracle import PARAMETERS, Case, build, collect, complaints, error, reference, run
from smolora import FusedSMoLoRA, SMoLoRAConfig, rank_space

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off: kernels run on the GPU here")
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}  # relative, between two orders of the same sums


def agree(got: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert got.keys() == expected.keys()
    errors = {name: error(got[name], expected[name]) for name in expected}
    assert max(errors.values()) <= bound, errors


# ----------------------------------------------------------------------------------------------------------- parameters

SHAPES = {
    "vu_A": (3, 8, 40), "vu_B": (3, 56, 8), "if_A": (5, 8, 40), "if_B": (5, 56, 8), "vu_router": (3, 40),
    "if_router": (5, 24), "vu_importance": (56,), "if_importance": (56,),
}  # fmt: skip


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


# ---------------------------------------------------------------------------------------------------------- what trains

ROUTERS, IMPORTANCES = {"vu_router", "if_router"}, {"vu_importance", "if_importance"}
FROZEN = [
    (plain, ROUTERS),  # the paper: a router's gate is the constant 1
    (plain.but(top_k=2), set()),
    (plain.but(router_grad="straight_through"), set()),
    (plain.but(fusion="mean"), ROUTERS | IMPORTANCES),  # the shares are fixed
    (plain.but(fusion="mean", top_k=2), IMPORTANCES),
    (plain.but(fusion="vu"), ROUTERS | IMPORTANCES | {"if_A", "if_B"}),  # one branch alone
    (plain.but(fusion="vu", top_k=2), IMPORTANCES | {"if_A", "if_B", "if_router"}),
    (plain.but(fusion="if"), ROUTERS | IMPORTANCES | {"vu_A", "vu_B"}),
    (plain.but(fusion="if", router_grad="straight_through"), IMPORTANCES | {"vu_A", "vu_B", "vu_router"}),
]


@pytest.mark.parametrize(("case", "frozen"), FROZEN, ids=[str(case) for case, _ in FROZEN])
def test_frozen(case: Case, frozen: set[str]):
    """What can get no gradient is frozen, so that optimisers and DDP never wait for one; all else gets one."""
    layer, batch = build(case, torch.float32)
    assert {name for name in PARAMETERS if not getattr(layer, name).requires_grad} == frozen
    assert not layer.base_layer.weight.requires_grad and not layer.base_layer.bias.requires_grad
    layer(batch.x, **batch.keywords).backward(batch.cotangent)
    for name in PARAMETERS:
        gradient = getattr(layer, name).grad
        assert (gradient is None) == (name in frozen), name
        assert gradient is None or gradient.any(), name
    assert layer.base_layer.weight.grad is None
    layer.requires_grad_(True)  # as PEFT's set_adapter does
    layer.freeze()
    assert {name for name in PARAMETERS if not getattr(layer, name).requires_grad} == frozen
    assert not any(p.requires_grad for p in layer.base_layer.parameters())


GROUPS = [("x",), *((name,) for name in PARAMETERS), ("vu_A", "if_A"), ("vu_B", "if_B"), tuple(sorted(IMPORTANCES))]
GROUPS += [PARAMETERS[:-1], ("x", *PARAMETERS[1:])]  # all but one


@pytest.mark.parametrize("group", GROUPS, ids="+".join)
@pytest.mark.parametrize(
    "case",
    [plain.but(router_grad="straight_through", dropout=0.2, mask=True), plain.but(top_k=2, lengths=(4, 0, 9))],
    ids=str,
)
def test_freezing_changes_no_other_gradient(case: Case, group: tuple[str, ...]):
    """A person may freeze anything: it gets no gradient, and the others' stay what they were, bit for bit."""
    layer, batch = build(case, torch.float32)
    full = run(layer, batch, "torch")
    for name in set(group) - {"x"}:
        getattr(layer, name).requires_grad_(False)
    x = batch.x.clone().requires_grad_("x" not in group)
    torch.manual_seed(1)
    y = layer(x, **batch.keywords)
    y.backward(batch.cotangent)
    assert torch.equal(y, full["y"])
    for name, tensor in {"x": x, **{name: getattr(layer, name) for name in PARAMETERS}}.items():
        if name in group:
            assert tensor.grad is None, name
        else:
            assert torch.equal(tensor.grad, full[f"d{name}"]), name


# ------------------------------------------------------------------------------------------------------ work and memory


def kept(layer: FusedSMoLoRA, x: Tensor, **keywords) -> int:
    """Bytes that a forward keeps for its backward, besides parameters; storages count once, and whole."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x, **keywords)  # alive until all is counted: no address is used twice
    assert y.requires_grad == bool(storages)
    return sum(storages.values())


MEMORY = [
    plain,
    plain.but(dropout=0.2),  # masks are drawn again, not kept
    plain.but(top_k=3),  # h of every chosen expert
    plain.but(router_grad="straight_through"),  # the mean, an instance's
    plain.but(fusion="mean"),
]


@pytest.mark.parametrize("train", ["all", "B", "if_B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MEMORY, ids=str)
def test_memory_kept_for_backward(case: Case, dtype: torch.dtype, train: str):
    """x and T (2 r top_k + 1) floats, nothing k-sized, no mask and no copy; without x where every A is frozen. Exact
    for what grows with the tokens, and what grows with the instances is small."""
    case = case.but(r=4, d=96, k=160, B=2)
    layer, _ = build(case, dtype)
    for name in PARAMETERS:
        getattr(layer, name).requires_grad_(getattr(layer, name).requires_grad and (train == "all" or train in name))
    x_bytes = case.d * dtype.itemsize if train == "all" else 0
    instruction = torch.randn(case.B, case.e)
    short, long = (
        kept(layer, torch.randn(case.B, S, case.d, dtype=dtype, requires_grad=True), instruction=instruction)
        for S in (64, 192)
    )
    per_token = x_bytes + (2 * case.r * case.top_k + 1) * 4
    assert long - short == case.B * 128 * per_token
    instances = case.e + case.d + case.M + case.N + 4 * case.top_k  # embedding, mean, logits, routes and gates
    assert short - case.B * 64 * per_token <= 4 * (case.B * instances + (case.M + case.N) * case.r) + 8


def test_memory_with_a_mask():
    """A route_mask is the caller's own tensor: kept only where the mean's gradient needs it, and never as floats."""
    layer, batch = build(plain.but(mask=True, B=2, S=64), torch.float32)
    without = {name: value for name, value in batch.keywords.items() if name != "route_mask"}
    x = batch.x.clone().requires_grad_()
    assert kept(layer, x, **batch.keywords) - kept(layer, x, **without) <= batch.x[..., 0].numel()


def test_nothing_kept_when_nothing_trains():
    """Inference under `requires_grad_(False)` or `no_grad` keeps nothing at all."""
    layer, batch = build(plain, torch.float32)
    with torch.no_grad():
        assert kept(layer, batch.x, **batch.keywords) == 0
    layer.requires_grad_(False)
    assert kept(layer, batch.x, **batch.keywords) == 0


def test_no_work_for_what_is_frozen(monkeypatch):
    """With if_B alone training: no pass over x in backward, no other gradient computed and then thrown away."""
    calls = {}
    for name in ("grad_output", "grad_input"):
        original = getattr(rank_space, name)
        monkeypatch.setattr(rank_space, name, lambda *a, name=name, f=original: calls.setdefault(name, f(*a)))
    layer, batch = build(plain.but(router_grad="straight_through"), torch.float32)
    for name in PARAMETERS:
        getattr(layer, name).requires_grad_(name == "if_B")
    with smolora.use_backend("torch"):
        layer(batch.x, **batch.keywords).backward(batch.cotangent)
    assert calls.keys() == {"grad_output"}
    sizes = [result.numel() for result in calls["grad_output"]]  # dh, dvu_B, dif_B, dvu_importance, dif_importance, dq
    assert sizes == [0, 0, layer.if_B.numel(), 0, 0, 0]
    assert layer.if_B.grad.any()


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


# ------------------------------------------------------------------------------------------------------------- the base


class Doubled(nn.Linear):
    """A linear layer that is more than its weight, as quantised ones and other adapters are."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Scaled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 3 * weight


def hooked(linear: nn.Linear, kind: str, calls: list) -> nn.Linear:
    """Make `linear` more than x W^T + b without changing what it computes, noting its calls."""
    if kind == "forward hook":
        linear.register_forward_hook(lambda *_: calls.append(kind))
    elif kind == "forward hook with keywords":
        linear.register_forward_hook(lambda *_: calls.append(kind), with_kwargs=True)
    elif kind == "pre-hook":
        linear.register_forward_pre_hook(lambda *_: calls.append(kind))
    elif kind == "backward hook":
        linear.register_full_backward_hook(lambda *_: calls.append(kind))
    elif kind == "backward pre-hook":
        linear.register_full_backward_pre_hook(lambda *_: calls.append(kind))
    elif kind == "replaced forward":  # as accelerate does to move weights in and out
        forward = linear.forward
        linear.forward = lambda x: (calls.append(kind), forward(x))[1]
    return linear


KINDS = [
    "forward hook", "forward hook with keywords", "pre-hook", "backward hook", "backward pre-hook", "replaced forward",
]  # fmt: skip


@pytest.mark.parametrize("case", [plain, plain.but(dropout=0.2, lengths=(4, 9)), plain.but(bias=False)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_base_is_called_when_it_is_more(kind: str, case: Case):
    """A base with a hook is called, once a forward, and everything comes out as on the path that takes its product
    over."""
    expected = run(*build(case, torch.float64), "torch")
    layer, batch = build(case, torch.float64)
    calls: list[str] = []
    hooked(layer.base_layer, kind, calls)
    got = run(layer, batch, "torch")
    assert calls == [kind]
    agree(got, expected, ROUNDING[torch.float64])


def test_hook_may_change_the_output():
    """What a hook or a subclass makes of the base's output is what the adapter is added to."""
    layer, batch = build(plain, torch.float64)
    expected = run(layer, batch, "torch")["y"] + layer.base_layer(batch.x)
    layer.base_layer.register_forward_hook(lambda module, args, output: 2 * output)
    assert error(run(layer, batch, "torch")["y"], expected) < 1e-12
    assert error(run(layer, batch, "torch")["y"], reference(layer, batch, torch.float64)["y"]) > 0.1


def test_subclass_and_parametrisation():
    """Subclasses are called, and so are parametrised layers, whose class changes when they are registered."""
    plain_layer, batch = build(plain, torch.float64)
    adapter = run(plain_layer, batch, "torch")["y"] - plain_layer.base_layer(batch.x)
    linear = Doubled(40, 56, dtype=torch.float64)
    linear.load_state_dict(plain_layer.base_layer.state_dict())
    layer = FusedSMoLoRA(linear, plain_layer.config)
    layer.load_state_dict(plain_layer.state_dict())
    assert error(run(layer, batch, "torch")["y"], adapter + linear(batch.x)) < 1e-12
    nn.utils.parametrize.register_parametrization(plain_layer.base_layer, "weight", Scaled())
    expected = adapter + plain_layer.base_layer(batch.x)
    assert error(run(plain_layer, batch, "torch")["y"], expected) < 1e-12


@pytest.mark.parametrize("trained", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
@pytest.mark.parametrize("case", [plain, plain.but(dropout=0.2, lengths=(4, 9))], ids=str)
def test_trainable_base(case: Case, trained: tuple[str, ...]):
    """Unfrozen, the base gets its own gradient (as modules_to_save would have it), and nothing else changes."""
    layer, batch = build(case, torch.float64)
    expected = run(layer, batch, "torch")
    for name in trained:
        getattr(layer.base_layer, name).requires_grad_()
    got = run(layer, batch, "torch")
    agree(got, expected, ROUNDING[torch.float64])
    torch.manual_seed(1)
    layer(batch.x, **batch.keywords).backward(batch.cotangent)
    g = batch.cotangent.reshape(-1, case.k)
    truth = {"weight": g.mT @ batch.x.reshape(-1, case.d), "bias": g.sum(0)}
    for name in ("weight", "bias"):
        gradient = getattr(layer.base_layer, name).grad
        assert (gradient is None) == (name not in trained)
        assert gradient is None or error(gradient, truth[name]) < 1e-12


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


# -------------------------------------------------------------------------------------------------------------- routing


@pytest.mark.parametrize("top_k", [1, 3])
def test_last_routing(top_k: int):
    """Routes, logits and gates of the last forward; alpha where it was asked for; all plain data without a graph."""
    case = plain.but(M=3, N=5, top_k=top_k, B=4)
    layer, batch = build(case, torch.float32)
    with pytest.raises(RuntimeError, match="needs a forward first"):
        layer.last_routing()
    run(layer, batch, "torch")
    routing = layer.last_routing()
    assert isinstance(routing, smolora.Routing) and routing.alpha is None  # keeping it costs memory
    embedding = batch.keywords["instruction"].double()
    truth = batch.x.double().mean(1) @ layer.vu_router.double().mT, embedding @ layer.if_router.double().mT
    for branch, experts in ((0, 3), (1, 5)):
        logits, routes, gates = routing.logits[branch], routing.routes[branch], routing.gates[branch]
        assert tuple(logits.shape) == (4, experts) and error(logits, truth[branch]) < 1e-5
        assert routes.dtype == torch.int32 and tuple(routes.shape) == ((4,) if top_k == 1 else (4, 3))
        values, chosen = logits.topk(top_k)
        assert torch.equal(routes.view(4, -1).long(), chosen)
        assert tuple(gates.shape) == (4, top_k) and error(gates, torch.softmax(values, -1)) < 1e-6
        assert not any(t.requires_grad for t in (logits, routes, gates))
    layer.keep_alpha = True
    run(layer, batch, "torch")
    alpha = layer.last_routing().alpha
    assert tuple(alpha.shape) == (28,) and not alpha.requires_grad and ((alpha >= 0) & (alpha <= 1)).all()
    assert alpha.unique().numel() > 4  # it is token by token
    layer.keep_alpha = False
    run(layer, batch, "torch")
    assert layer.last_routing().alpha is None


def test_alpha_is_the_papers():
    """Eq. 8 from k-sized vectors, as the reference has it."""
    layer, batch = build(plain.but(top_k=2), torch.float64)
    layer.keep_alpha = True
    run(layer, batch, "torch")
    base = layer.base_layer
    _, truth = smolora.reference.smolora_forward(
        batch.x, base.weight, base.bias, *(getattr(layer, name) for name in PARAMETERS),
        batch.keywords["instruction"], scaling=layer.config.scaling, top_k=2, return_routing=True,
    )  # fmt: skip
    routing = layer.last_routing()
    assert error(routing.alpha, truth.alpha) < 1e-12
    for branch in (0, 1):
        assert torch.equal(routing.routes[branch].long(), truth.routes[branch])
        assert error(routing.gates[branch], truth.gates[branch]) < 1e-12
        assert error(routing.logits[branch], truth.logits[branch]) < 1e-12


@pytest.mark.parametrize(("fusion", "branch", "alpha"), [("vu", 0, 1.0), ("if", 1, 0.0)])
def test_last_routing_of_one_branch(fusion: str, branch: int, alpha: float):
    """A branch that is not in use has None, at its place; the other has all the share."""
    layer, batch = build(plain.but(fusion=fusion), torch.float32)
    layer.keep_alpha = True
    run(layer, batch, "torch")
    routing = layer.last_routing()
    for pair in (routing.routes, routing.logits, routing.gates):
        assert pair[branch] is not None and pair[1 - branch] is None
    assert (routing.alpha == alpha).all()
    if fusion == "vu":
        layer(batch.x)  # it needs no instruction


FED_BACK = [
    (plain, "torch"),
    (plain.but(mask=True, dropout=0.2, lengths=(5, 0, 9)), "torch"),
    (plain.but(fusion="vu"), "torch"),
    (plain.but(fusion="if", shared=True), "torch"),
    (plain.but(top_k=2, M=3, N=5), "torch"),  # the gates have to be given too
    pytest.param(plain.but(top_k=2, M=3, N=5, mask=True, dropout=0.2), "triton", marks=interpreter),
]


@pytest.mark.parametrize(("case", "backend"), FED_BACK, ids=str)
def test_routes_fed_back(case: Case, backend: str):
    """The routes of a forward, given to the next one, reproduce it bit for bit: that is how decoding keeps the
    prompt's routes, and how a recomputed forward keeps its own."""
    layer, batch = build(case, torch.float32)
    expected = run(layer, batch, backend)
    routing = layer.last_routing()
    del batch.keywords["instruction"]
    batch.keywords.update(routes=routing.routes)
    if case.top_k > 1:
        batch.keywords.update(gates=routing.gates)
    again = run(layer, batch, backend)
    assert layer.last_routing().logits == (None, None)
    for mine, theirs in zip(layer.last_routing().routes, routing.routes, strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)
    for name in expected:
        if not (
            case.top_k > 1 and (name in {f"d{n}" for n in ROUTERS} or name == "dx")
        ):  # given routes teach no router
            assert torch.equal(again[name], expected[name]), name


def test_one_instruction_for_all():
    """(e,) is (B, e) with equal rows, bit for bit."""
    layer, batch = build(plain.but(shared=True, router_grad="straight_through"), torch.float32)
    shared = run(layer, batch, "torch")
    embedding = batch.keywords["instruction"]
    batch.keywords["instruction"] = embedding[None].expand(3, -1)
    expanded = run(layer, batch, "torch")
    batch.keywords["instruction"] = embedding[None].repeat(3, 1)
    repeated = run(layer, batch, "torch")
    for name in shared:
        assert torch.equal(shared[name], expanded[name]) and torch.equal(shared[name], repeated[name]), name


def test_gradient_of_the_instruction():
    """Where the routers learn, so can what makes the embedding, for one shared embedding as for one a sample."""
    layer, batch = build(plain.but(top_k=2, shared=True), torch.float64)
    embedding = batch.keywords["instruction"]
    rows = embedding.repeat(3, 1).requires_grad_()
    one = embedding.clone().requires_grad_()
    for instruction in (rows, one):
        layer(batch.x, instruction=instruction).backward(batch.cotangent)
    assert rows.grad.any() and error(one.grad, rows.grad.sum(0)) < 1e-12


PACKED = [
    plain,
    plain.but(mask=True),
    plain.but(top_k=2, M=3, mask=True),  # the routers' gradients through the mean
    plain.but(fusion="if"),
]


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_equals_padded(case: Case):
    """The same instances, packed (in both shapes) and padded on the right under a route_mask."""
    lengths = (5, 1, 17, 8)
    layer, packed = build(case.but(lengths=lengths), torch.float32)
    S = max(lengths)
    place = torch.cat([b * S + torch.arange(length) for b, length in enumerate(lengths)])
    x = torch.full((4 * S, case.d), 1e2)  # what is in the padding does not matter
    x[place] = packed.x
    mask = torch.zeros(4 * S, dtype=torch.bool)
    mask[place] = packed.keywords.get("route_mask", torch.ones(sum(lengths), dtype=torch.bool))
    cotangent = torch.zeros(4 * S, case.k)
    cotangent[place] = packed.cotangent
    padded = type(packed)(
        x.view(4, S, -1),
        cotangent.view(4, S, -1),
        {"instruction": packed.keywords["instruction"], "route_mask": mask.view(4, S)},
    )
    expected, got = run(layer, padded, "torch"), run(layer, packed, "torch")
    for name in ("y", "dx"):
        expected[name] = expected[name].flatten(0, 1)[place]
    agree(got, expected, ROUNDING[torch.float32])
    packed.x, packed.cotangent = packed.x[None], packed.cotangent[None]
    if "route_mask" in packed.keywords:
        packed.keywords["route_mask"] = packed.keywords["route_mask"][None]
    batched = run(layer, packed, "torch")
    assert batched["y"].shape[0] == 1
    for name in got:
        assert torch.equal(batched[name].view(got[name].shape), got[name]), name


# how 240 samples come to the layer: name, (order of the samples, batch size, how they are laid out, what pads them)
ARRANGEMENTS = {
    "one by one": (False, 1, "right", 0.0),  # what all others are compared with
    "batch": (False, 16, "right", 0.0),
    "one batch": (False, 240, "right", 0.0),
    "shuffled": (True, 16, "right", 0.0),  # other neighbours, other positions
    "left": (True, 16, "left", 0.0),
    "large padding": (True, 16, "right", 1e4),  # what the padding holds does not matter
    "large left padding": (False, 7, "left", -1e4),
    "NaN padding": (False, 16, "right", float("nan")),  # as attention over fully masked rows leaves it
    "NaN left padding": (False, 16, "left", float("nan")),
    "packed": (False, 16, "packed", 0.0),
    "packed, shuffled": (True, 48, "packed", 0.0),
}


def routed(layer: FusedSMoLoRA, samples: list[Tensor], embeddings: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The VU and IF logits of every sample, as an arrangement has them, in the samples' own order."""
    shuffled, size, layout, filler = ARRANGEMENTS[name]
    count = len(samples)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(4)) if shuffled else torch.arange(count)
    logits: list[list[Tensor]] = [[], []]
    for chosen in order.split(size):
        mine = [samples[i] for i in chosen.tolist()]
        instruction = embeddings[chosen]
        if layout == "packed":
            cu = torch.tensor([0, *torch.tensor([len(x) for x in mine]).cumsum(0).tolist()], dtype=torch.int32)
            layer(torch.cat(mine), instruction=instruction, cu_seqlens=cu)
        else:
            S = max(map(len, mine))
            x = torch.full((len(mine), S, mine[0].shape[1]), filler)
            mask = torch.zeros(x.shape[:2], dtype=torch.bool)
            for row, sample in enumerate(mine):
                places = slice(0, len(sample)) if layout == "right" else slice(S - len(sample), S)
                x[row, places], mask[row, places] = sample, True
            layer(x, instruction=instruction, route_mask=mask)
        for branch, z in enumerate(layer.last_routing().logits):
            logits[branch].append(z)
    back = torch.argsort(order)
    return tuple(torch.cat(parts)[back] for parts in logits)


@pytest.fixture(scope="module")
def samples() -> tuple[FusedSMoLoRA, list[Tensor], Tensor, tuple[Tensor, Tensor]]:
    """A layer, 240 samples of 1 to 40 tokens, their embeddings, and their logits one by one."""
    layer, _ = build(plain.but(d=64, k=8, M=5, N=3), torch.float32)
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 41, (240,), generator=random).tolist()
    rows = [torch.randn(length, 64, generator=random) for length in lengths]
    embeddings = torch.randn(240, 24, generator=random)
    layer.requires_grad_(False)
    return layer, rows, embeddings, routed(layer, rows, embeddings, "one by one")


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_routes_depend_on_the_sample_alone(name: str, samples):
    """Neither batch, nor padding, nor a sample's position changes its route, ties within rounding apart."""
    layer, rows, embeddings, alone = samples
    for branch, (mine, theirs) in enumerate(zip(alone, routed(layer, rows, embeddings, name), strict=True)):
        top = mine.topk(2).values
        clear = top[:, 0] - top[:, 1] >= 1e-5
        assert clear.sum() >= 230 and len(mine.argmax(-1).unique()) == mine.shape[1], branch  # a test worth its name
        assert torch.equal(mine.argmax(-1)[clear], theirs.argmax(-1)[clear]), branch
        assert error(theirs, mine) < 1e-5, branch


@pytest.mark.parametrize("filler", [1e4, float("nan")])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreter)])
def test_padding_changes_no_result(filler: float, backend: str):
    """Whatever stands in the padding on either side, the tokens between come out as they do alone."""
    layer, batch = build(plain, torch.float32)
    layer.requires_grad_(False)
    padded = nn.functional.pad(batch.x, (0, 0, 3, 2), value=filler)
    mask = nn.functional.pad(torch.ones(batch.x.shape[:2], dtype=torch.bool), (3, 2))
    with smolora.use_backend(backend):
        expected = layer(batch.x, **batch.keywords)
        routes = layer.last_routing().routes
        got = layer(padded, **batch.keywords, route_mask=mask)
    for mine, theirs in zip(routes, layer.last_routing().routes, strict=True):
        assert torch.equal(mine, theirs)
    assert error(got[:, 3:-2], expected) < 1e-6


BROKEN = [(float("inf"), "torch"), (float("nan"), "torch"), pytest.param(float("nan"), "triton", marks=interpreter)]


@pytest.mark.parametrize(("value", "backend"), BROKEN)
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_broken_sample_breaks_no_other(value: float, packed: bool, backend: str):
    """An overflow in one sample stays in that sample's route and output."""
    layer, batch = build(plain.but(lengths=(7, 7, 7)) if packed else plain, torch.float32)
    layer.requires_grad_(False)
    with smolora.use_backend(backend):
        expected = layer(batch.x, **batch.keywords).view(3, 7, -1)
        routes = layer.last_routing().routes
        x = batch.x.clone()
        x.view(3, 7, -1)[1, 2, 3] = value
        got = layer(x, **batch.keywords).view(3, 7, -1)
    for mine, theirs in zip(routes, layer.last_routing().routes, strict=True):
        assert torch.equal(mine[::2], theirs[::2])
    assert torch.equal(got[::2], expected[::2])


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("case", [plain, plain.but(top_k=2, M=5, router_grad="straight_through")], ids=str)
def test_gradient_accumulation(case: Case):
    """Micro-batches of uneven token counts add up to the gradient of one packed batch."""
    lengths = (3, 11, 1, 30, 7, 16)
    layer, batch = build(case.but(lengths=lengths, spread=True), torch.float32)
    expected = run(layer, batch, "torch")
    trained = [name for name in PARAMETERS if getattr(layer, name).requires_grad]
    bounds = batch.keywords["cu_seqlens"].tolist()
    with smolora.use_backend("torch"):
        for first, last in ((0, 1), (1, 4), (4, 6)):
            tokens = slice(bounds[first], bounds[last])
            y = layer(
                batch.x[tokens],
                instruction=batch.keywords["instruction"][first:last],
                cu_seqlens=batch.keywords["cu_seqlens"][first : last + 1] - bounds[first],
            )
            y.backward(batch.cotangent[tokens])
    agree({name: getattr(layer, name).grad for name in trained}, {n: expected[f"d{n}"] for n in trained}, 1e-5)


class Stack(nn.Module):
    """A few adapted layers of one network."""

    def __init__(self, sizes: tuple[int, ...], config: SMoLoRAConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusedSMoLoRA(nn.Linear(d, k), config) for d, k in pairwise(sizes))

    def forward(self, x: Tensor, **keywords) -> Tensor:
        for layer in self.layers:
            x = nn.functional.gelu(layer(x, **keywords))
        return x


def used_experts(layer: FusedSMoLoRA) -> list[set[int]]:
    """The VU and IF experts of the last forward."""
    return [set(routes.flatten().tolist()) for routes in layer.last_routing().routes]


@pytest.mark.parametrize("arguments", [{}, dict(top_k=2), dict(router_grad="straight_through")], ids=str)
def test_the_adapter_is_live(arguments: dict):
    """The worst bug an adapter can have is to do nothing. In every layer: B's gradient is nonzero at once, A's and I's
    are exactly zero while B = 0; after two steps everything routed learns, unused experts get zeros, and the output
    has changed. Nothing frozen has moved."""
    torch.manual_seed(3)
    config = SMoLoRAConfig(r=4, num_vu_experts=5, num_if_experts=6, instruction_dim=12, lora_dropout=0.05, **arguments)
    stack = Stack((24, 40, 16, 24), config)
    x, target, emb = torch.randn(3, 9, 24) + torch.randn(3, 1, 24), torch.randn(3, 9, 24), torch.randn(3, 12)
    optimizer = torch.optim.AdamW([p for p in stack.parameters() if p.requires_grad], lr=1e-2)
    frozen = {name: p.clone() for name, p in stack.named_parameters() if not p.requires_grad}
    before = stack.eval()(x, instruction=emb).detach()
    stack.train()

    def backward() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(stack(x, instruction=emb), target).backward()

    backward()
    at_first = [used_experts(layer) for layer in stack.layers]
    for layer, used in zip(stack.layers, at_first, strict=True):
        for B, experts in zip((layer.vu_B, layer.if_B), used, strict=True):
            assert {e for e in range(len(B)) if B.grad[e].any()} == experts
        for name in ("vu_A", "if_A", *IMPORTANCES, *ROUTERS):
            gradient = getattr(layer, name).grad
            assert gradient is None or not gradient.any(), name
    for _ in range(2):
        optimizer.step()
        backward()
    for layer, first in zip(stack.layers, at_first, strict=True):
        for prefix, used, known in zip(("vu", "if"), used_experts(layer), first, strict=True):
            assert used & known
            for letter in "AB":
                gradient = getattr(layer, f"{prefix}_{letter}").grad
                assert gradient.isfinite().all()
                live = {e for e in range(len(gradient)) if gradient[e].any()}
                assert used & known <= live <= used, letter  # an expert that is new has a B of zero still
            for kind in ("importance", "router"):
                parameter = getattr(layer, f"{prefix}_{kind}")
                assert (parameter.grad is not None) == parameter.requires_grad
                assert parameter.grad is None or (parameter.grad.isfinite().all() and parameter.grad.any()), kind
    after = stack.eval()(x, instruction=emb).detach()
    assert after.isfinite().all() and error(after, before) > 1e-3
    now = dict(stack.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in frozen.items())
