"""Cases of the mixtures' layers: each is run by a backend and by its float64 reference."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import smolora
from smolora import reference
from support.oracle import collect, complaints, drawn_seed


@dataclass(frozen=True)
class LayerCase:
    """A method's layer and a batch. `lengths` packs sequences of these lengths; else there are B of S tokens."""

    method: str
    B: int = 3
    S: int = 9
    d: int = 40
    k: int = 56
    r: int = 8
    E: int = 5  # experts or branches
    tasks: int = 3
    dropout: float = 0.0
    bias: bool = True
    mask: bool = False
    lengths: tuple[int, ...] | None = None
    options: tuple[tuple[str, Any], ...] = ()  # of the configuration
    call: str = ""  # of what a method takes: "int" for one task of all, "weights", "empty"
    seed: int = 0

    def but(self, **changes: Any) -> LayerCase:
        return replace(self, **changes)

    def __str__(self) -> str:
        default = LayerCase(self.method)
        changed = {f: v for f, v in vars(self).items() if v != getattr(default, f)}
        return "-".join([self.method, *(f"{name}={value}" for name, value in changed.items())])


MOELORA, ROUTED, BRANCH, LILORA = (LayerCase(name) for name in ("moelora", "routedlora", "branchlora", "lilora"))

LAYERS = [
    MOELORA,
    MOELORA.but(dropout=0.25, bias=False),
    MOELORA.but(E=8, r=16, lengths=(5, 0, 17)),
    MOELORA.but(E=1),
    ROUTED,
    ROUTED.but(dropout=0.25, call="weights"),
    ROUTED.but(call="empty", lengths=(4, 9, 1)),
    BRANCH,
    BRANCH.but(dropout=0.25, mask=True),
    BRANCH.but(options=(("router_input", "mean"), ("renormalize", True)), mask=True, lengths=(6, 1, 30)),
    BRANCH.but(options=(("router_input", "last"), ("top_k", 1)), mask=True),
    BRANCH.but(options=(("top_k", 5),), call="int", lengths=(4, 9, 1)),
    LILORA,
    LILORA.but(call="int", dropout=0.25),
    LILORA.but(lengths=(4, 9, 1), dropout=0.1),
]


@dataclass
class LayerBatch:
    x: Tensor
    cotangent: Tensor
    call: dict[str, Any]


def build_layer(case: LayerCase, dtype: torch.dtype, device: str = "cpu") -> tuple[nn.Module, LayerBatch]:
    """A layer with random nonzero parameters (rounded to `dtype`, so that every precision has the same ones)."""
    random = torch.Generator().manual_seed(case.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    mixture = smolora.MIXTURES[case.method]
    sizes = {
        "moelora": {"num_experts": case.E},
        "routedlora": {"num_experts": case.E},
        "branchlora": {"num_branches": case.E, "num_tasks": case.tasks},
        "lilora": {"task_r": 4, "num_tasks": case.tasks},
    }[case.method]
    config = mixture.config(r=case.r, lora_alpha=2 * case.r, lora_dropout=case.dropout, **sizes, **dict(case.options))
    linear = nn.Linear(case.d, case.k, bias=case.bias, dtype=dtype)
    layer = mixture.layer(linear, config)
    with torch.no_grad():
        linear.weight.copy_(draw(case.k, case.d) * case.d**-0.5)
        if case.bias:
            linear.bias.copy_(draw(case.k))
        for name, parameter in own_parameters(layer).items():
            scale = 1.0 if name == "task_logit" else parameter.shape[-1] ** -0.5
            parameter.copy_((draw(*parameter.shape) * scale).to(dtype))
    lengths = case.lengths if case.lengths is not None else (case.S,) * case.B
    n, T = len(lengths), sum(lengths)
    owner = torch.repeat_interleave(torch.arange(n), torch.tensor(lengths, dtype=torch.int64))
    x = draw(T, case.d) + 2 * draw(max(n, 1), case.d)[owner]
    shape: tuple[int, ...] = (case.B, case.S)
    call: dict[str, Any] = {}
    if case.lengths is not None:
        shape = (T,)
        call["cu_seqlens"] = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    if case.mask:
        routed = torch.rand(T, generator=random) < 0.6
        for i, length in enumerate(lengths):
            if length:
                routed[sum(lengths[:i]) + (length - 1) // 2] = True
        call["route_mask"] = routed.view(shape)
    if case.method in ("branchlora", "lilora"):
        call["task"] = 1 if case.call == "int" else torch.randint(case.tasks, (n,), generator=random)
    if case.method == "routedlora":
        call["experts"] = torch.randint(case.E, (n, 3), generator=random)
        if case.call == "weights":
            call["weights"] = draw(n, 3).to(torch.float64 if dtype == torch.float64 else torch.float32)
        if case.call == "empty":
            call["experts"][0, 1:] = -1
            call["experts"][1] = -1
    call = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in call.items()}
    return layer.to(device), LayerBatch(
        x.view(*shape, case.d).to(device, dtype), draw(*shape, case.k).to(device, dtype), call
    )


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters, without the base's."""
    return dict(layer.named_parameters(recurse=False))


def run_layer(layer: nn.Module, batch: LayerBatch, backend: str, seed: int = 1) -> dict[str, Tensor]:
    """One forward and backward of the layer."""
    x = batch.x.detach().requires_grad_()
    call, extra = dict(batch.call), {}
    if "weights" in call:
        extra["weights"] = call["weights"] = call["weights"].detach().requires_grad_()
    torch.manual_seed(seed)
    with smolora.use_backend(backend):
        y = layer(x, **call)
        return collect(y, x, {**own_parameters(layer), **extra}, batch.cotangent)


def reference_layer(layer: nn.Module, batch: LayerBatch, dtype: torch.dtype, seed: int = 1) -> dict[str, Tensor]:
    """The same from the reference, computed in `dtype` on the CPU."""
    c = layer.config
    x = batch.x.detach().cpu().to(dtype).requires_grad_()
    named = {
        name: p.detach().cpu().to(dtype).requires_grad_(p.requires_grad) for name, p in own_parameters(layer).items()
    }
    call = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in batch.call.items()}
    if isinstance(call.get("task"), int):
        n = x.shape[0] if "cu_seqlens" not in call else len(call["cu_seqlens"]) - 1
        call["task"] = torch.full((n,), call["task"])
    extra = {}
    if "weights" in call:
        extra["weights"] = call["weights"] = (
            call["weights"].detach().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
        )
    if c.method == "branchlora":
        call |= {"top_k": c.top_k, "router_input": c.router_input, "renormalize": c.renormalize}
    if layer.training:
        call |= {"dropout": c.lora_dropout, "seed": drawn_seed(seed, batch.x.device.type)}
    forward: Callable = getattr(reference, f"{c.method}_forward")
    if "cu_seqlens" not in inspect.signature(forward).parameters:
        call.pop("cu_seqlens", None)
    base = layer.base_layer
    y = forward(
        x,
        base.weight.detach().cpu(),
        None if base.bias is None else base.bias.detach().cpu(),
        *named.values(),
        **call,
        scaling=c.scaling,
    )
    return collect(y, x, {**named, **extra}, batch.cotangent.cpu().to(dtype))


def check_layer(case: LayerCase, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Hold a backend against the float64 reference on one case."""
    layer, batch = build_layer(case, dtype, device)
    got = run_layer(layer, batch, backend)
    truth = reference_layer(layer, batch, torch.float64)
    eager = truth if dtype == torch.float64 else reference_layer(layer, batch, dtype)
    found = complaints(got, truth, eager, dtype)
    assert not found, f"{case} {dtype} {backend}: {'; '.join(found)}"
