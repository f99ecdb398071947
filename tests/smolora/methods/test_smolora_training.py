"""What trains, what a forward keeps for that, and that the adapter is live."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import smolora
from smolora import FusedSMoLoRA, SMoLoRAConfig
from smolora.engine import cpu_passes
from support.cases import plain
from support.oracle import PARAMETERS, Case, agree, build, error, run

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
    """x and T (2 r top_k + 1) floats (the 1 for an adaptive fusion alone): nothing k-sized, no mask and no copy.

    Without x where every A is frozen. Exact for what grows with the tokens; what grows with the instances is small.
    """
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
    per_token = x_bytes + (2 * case.r * case.top_k + (case.fusion == "adaptive")) * 4
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
        original = getattr(cpu_passes, name)
        monkeypatch.setattr(cpu_passes, name, lambda *a, name=name, f=original: calls.setdefault(name, f(*a)))
    layer, batch = build(plain.but(router_grad="straight_through"), torch.float32)
    for name in PARAMETERS:
        getattr(layer, name).requires_grad_(name == "if_B")
    with smolora.use_backend("torch"):
        layer(batch.x, **batch.keywords).backward(batch.cotangent)
    assert calls.keys() == {"grad_output"}
    dh, dB, dI, dslot_weights, dscores = calls["grad_output"]
    sizes = [result.numel() for result in (dh, *dB, *dI, dslot_weights, dscores)]
    assert sizes == [0, 0, layer.if_B.numel(), 0, 0, 0, 0]
    assert layer.if_B.grad.any()


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
