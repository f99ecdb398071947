"""Cases of one layer, run by a backend and by the float64 reference, and the bound between the two."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import smolora
from smolora.reference import smolora_forward

PARAMETERS = ("vu_A", "vu_B", "if_A", "if_B", "vu_router", "if_router", "vu_importance", "if_importance")

# what rounding alone costs where the eager reference happens to be lucky: relative errors, measured as a few units in
# the last place of the outputs; float32 sums run in another order than the reference's
FLOOR = {torch.float64: 1e-11, torch.float32: 1e-6, torch.float16: 2.5e-4, torch.bfloat16: 2e-3}
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}  # relative, between two orders of the same sums


@dataclass(frozen=True)
class Case:
    """One layer and one batch. `lengths` packs instances of these lengths; else there are B of S tokens."""

    B: int = 3
    S: int = 7
    d: int = 40
    k: int = 56
    r: int = 8
    M: int = 4
    N: int = 4
    e: int = 24
    top_k: int = 1
    fusion: str = "adaptive"
    router_grad: str = "none"
    dropout: float = 0.0
    bias: bool = True
    mask: bool = False
    shared: bool = False  # one instruction for all
    lengths: tuple[int, ...] | None = None
    given: bool = False  # routes given
    spread: bool = True  # instances differ, so that routes do
    seed: int = 0

    def but(self, **changes) -> Case:
        return replace(self, **changes)

    def __str__(self) -> str:
        default = Case()
        changed = {f: v for f, v in vars(self).items() if v != getattr(default, f)}
        return "-".join(f"{name}={value}" for name, value in changed.items()) or "plain"


@dataclass
class Batch:
    x: Tensor
    cotangent: Tensor
    keywords: dict


def build(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[smolora.FusedSMoLoRA, Batch]:
    """A layer with random nonzero parameters (rounded to `dtype`, so that every precision has the same ones)."""
    random = torch.Generator().manual_seed(case.seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    config = smolora.SMoLoRAConfig(
        r=case.r,
        lora_alpha=2 * case.r,
        lora_dropout=case.dropout,
        num_vu_experts=case.M,
        num_if_experts=case.N,
        top_k=case.top_k,
        instruction_dim=case.e,
        fusion=case.fusion,
        router_grad=case.router_grad,
    )
    linear = torch.nn.Linear(case.d, case.k, bias=case.bias, dtype=dtype)
    layer = smolora.FusedSMoLoRA(linear, config)
    with torch.no_grad():
        linear.weight.copy_(draw(case.k, case.d) * case.d**-0.5)
        if case.bias:
            linear.bias.copy_(draw(case.k))
        for name in PARAMETERS:
            parameter = getattr(layer, name)
            scale = {"A": case.d**-0.5, "B": case.r**-0.5, "router": 1.0, "importance": case.k**-0.5}[name[3:]]
            parameter.copy_((draw(*parameter.shape) * scale).to(dtype))
    lengths = case.lengths if case.lengths is not None else (case.S,) * case.B
    n, T = len(lengths), sum(lengths)
    owner = torch.repeat_interleave(torch.arange(n), torch.tensor(lengths, dtype=torch.int64))
    x = draw(T, case.d) + (2 * draw(max(n, 1), case.d)[owner] if case.spread else 0)
    keywords: dict = {"instruction": draw(case.e) if case.shared else draw(n, case.e)}
    shape: tuple[int, ...] = (case.B, case.S)
    if case.lengths is not None:
        shape = (T,)
        keywords["cu_seqlens"] = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    if case.mask:
        routed = torch.rand(T, generator=random) < 0.6
        for i, length in enumerate(lengths):
            if length:  # the middle token of each instance routes for sure
                routed[sum(lengths[:i]) + (length - 1) // 2] = True
        keywords["route_mask"] = routed.view(shape)
    if case.given:
        pick = lambda experts: torch.randint(experts, (n, case.top_k), generator=random).int()  # noqa: E731
        keywords["routes"] = (pick(case.M), pick(case.N))
        del keywords["instruction"]
    keywords = {
        name: tuple(v.to(device) for v in value) if isinstance(value, tuple) else value.to(device)
        for name, value in keywords.items()
    }
    if "instruction" in keywords:
        keywords["instruction"] = keywords["instruction"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    x = x.view(*shape, case.d).to(device, dtype)
    return layer.to(device), Batch(x, draw(*shape, case.k).to(device, dtype), keywords)


def collect(y: Tensor, x: Tensor, named: dict[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
    """y, dx and the parameters' gradients, as y gives them."""
    wanted = {name: p for name, p in {"x": x, **named}.items() if p.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), cotangent, allow_unused=True)
    zeros = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, wanted.values(), strict=True)]
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(wanted, zeros, strict=True)}}


def drawn_seed(seed: int, device: str = "cpu") -> int:
    """The dropout seed that a layer draws after `torch.manual_seed(seed)`."""
    torch.manual_seed(seed)
    return torch.randint(2**63 - 1, (1,), device=device).item()


def run(layer: smolora.FusedSMoLoRA, batch: Batch, backend: str, seed: int = 1) -> dict[str, Tensor]:
    """One forward and backward of the layer."""
    x = batch.x.detach().requires_grad_()
    torch.manual_seed(seed)
    with smolora.use_backend(backend):
        y = layer(x, **batch.keywords)
        return collect(y, x, {name: getattr(layer, name) for name in PARAMETERS}, batch.cotangent)


def reference(layer: smolora.FusedSMoLoRA, batch: Batch, dtype: torch.dtype, seed: int = 1) -> dict[str, Tensor]:
    """The same from the reference, computed in `dtype` on the CPU."""
    c = layer.config
    x = batch.x.detach().cpu().to(dtype).requires_grad_()
    named = {name: getattr(layer, name).detach().cpu().to(dtype) for name in PARAMETERS}
    for name, value in named.items():
        value.requires_grad_(getattr(layer, name).requires_grad)
    base = layer.base_layer
    keywords = {
        name: tuple(v.cpu() for v in value) if isinstance(value, tuple) else value.cpu()
        for name, value in batch.keywords.items()
    }
    instruction = keywords.pop("instruction", None)
    dropout = {"dropout": c.lora_dropout, "seed": drawn_seed(seed, batch.x.device.type)} if layer.training else {}
    y = smolora_forward(
        x,
        base.weight.detach().cpu(),
        None if base.bias is None else base.bias.detach().cpu(),
        *named.values(),
        instruction,
        scaling=c.scaling,
        top_k=c.top_k,
        fusion=c.fusion,
        router_grad=c.router_grad,
        **keywords,
        **dropout,
    )
    return collect(y, x, named, batch.cotangent.cpu().to(dtype))


def error(value: Tensor, truth: Tensor) -> float:
    """Relative error in the Frobenius norm; infinite for anything that is not finite, absolute for a truth of zero."""
    value, truth = value.detach().cpu().double(), truth.detach().cpu().double()
    assert value.shape == truth.shape, (value.shape, truth.shape)
    if not torch.isfinite(value).all():
        return float("inf")
    norm = truth.norm().item()
    return (value - truth).norm().item() / (norm or 1.0)


def agree(got: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    """The same results by name, each within the bound of `error`."""
    assert got.keys() == expected.keys()
    errors = {name: error(got[name], expected[name]) for name in expected}
    assert max(errors.values()) <= bound, errors


def along(value: Tensor, truth: Tensor) -> float:
    """The relative error along the truth, as a wrong scale gives."""
    value, truth = value.detach().cpu().double().flatten(), truth.detach().cpu().double().flatten()
    norm = truth.dot(truth).item()
    return (value - truth).dot(truth).item() / norm if norm else 0.0


def complaints(
    got: dict[str, Tensor], truth: dict[str, Tensor], eager: dict[str, Tensor], dtype: torch.dtype, slack: float = 1
) -> list[str]:
    """What breaks the promise: y within 2 times, gradients within 3 times the eager reference's error, plus FLOOR.

    `slack` multiplies the bounds.
    """
    found = []
    if got.keys() != truth.keys():
        found.append(f"results {sorted(got)} instead of {sorted(truth)}")
    errors = {name: error(eager[name], truth[name]) for name in truth}
    for name in got.keys() & truth.keys():
        # few elements may be right by luck: the worst of the case's results stands in for theirs
        usual = errors[name] if truth[name].numel() >= 64 else max(errors.values())
        bound = slack * ((2 if name == "y" else 3) * usual + FLOOR[dtype])
        size = error(got[name], truth[name])
        if not size <= bound:
            found.append(f"{name}: error {size:.2e} above {bound:.2e}")
        # rounding has no direction: over many elements, the part along the truth is far smaller
        off, usual = abs(along(got[name], truth[name])), abs(along(eager[name], truth[name]))
        bound = (
            slack * ((2 if name == "y" else 3) * usual + FLOOR[dtype]) + 4 * bound / max(truth[name].numel(), 1) ** 0.5
        )
        if not off <= bound:
            found.append(f"{name}: scale off by {off:.2e}, above {bound:.2e}")
    return found


def check(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu", slack: float = 1) -> None:
    """Hold a backend against the float64 reference on one case."""
    layer, batch = build(case, dtype, device)
    got = run(layer, batch, backend)
    truth = reference(layer, batch, torch.float64)
    eager = truth if dtype == torch.float64 else reference(layer, batch, dtype)
    found = complaints(got, truth, eager, dtype, slack)
    assert not found, f"{case} {dtype} {backend}: {'; '.join(found)}"
