"""The passes as torch operators, and the autograd function over them.

Each pass is one opaque operator, `torch.ops.smolora.<pass>`, with the arguments of `rank_space` and a backend's name.
Differentiation lives in a thin `autograd.Function` around them, which torch.compile traces through. Operators run with
autocast off: their inputs come in one compute dtype, whatever the state of the thread that runs a backward.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cuda, rank_space
from .common import active_streams, branches, empty_if, new_rank_space, new_routing, wanted

CHECK_ENVIRONMENT = "SMOLORA_CHECK"

_library = torch.library.Library("smolora", "DEF")


def _passes(backend: str) -> ModuleType:
    """The module with a backend's four passes."""
    if backend == "torch":
        return rank_space
    if backend == "cuda":
        return cuda
    from .kernels import passes  # not at the top: importing Triton takes time, and it may be missing

    return passes


def _without_autocast(device_type: str) -> AbstractContextManager:
    """Autocast off; nothing to enter where it is off, which is quicker."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _define(schema: str, fake: Callable[..., tuple[Tensor, ...]], check: Callable[..., None] | None = None) -> Any:
    """Define the operator of a pass for CPU and CUDA tensors; its last argument names the backend."""
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        *arguments, backend = arguments
        like = next(a for a in arguments if isinstance(a, Tensor))
        if check is not None and (like.device.type == "cpu" or os.environ.get(CHECK_ENVIRONMENT) == "1"):
            check(*arguments)
        with _without_autocast(like.device.type), torch.cuda.device_of(like):
            return getattr(_passes(backend), name)(*arguments)

    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"smolora::{name}", fake, lib=_library)
    return getattr(torch.ops.smolora, name).default


def check_values(
    x: Tensor,
    instances: int,
    cu_seqlens: Tensor | None,
    route_mask: Tensor | None,
    instruction: Tensor | None,
) -> None:
    """What only the values can tell, checked where reading them waits for no device.

    Raises:
        ValueError: `cu_seqlens` are no boundaries of x's tokens, `instruction` is not finite, or `route_mask` leaves an
            instance that has tokens without any.
    """
    if cu_seqlens is not None:
        cu = cu_seqlens.tolist()
        if cu[0] != 0 or cu[-1] != x.shape[0] or any(a > b for a, b in pairwise(cu)):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {x.shape[0]}, got {cu}")
    if instruction is not None and not bool(torch.isfinite(instruction).all()):
        bad = (~torch.isfinite(instruction).all(-1)).nonzero().flatten().tolist()
        raise ValueError(f"instruction must be finite, got NaN or infinity in rows {bad}")
    if route_mask is not None and x.shape[0]:
        total = torch.cat([route_mask.new_zeros(1, dtype=torch.int64), route_mask.cumsum(0)])
        bounds = cu_seqlens.long() if cu_seqlens is not None else torch.arange(
            0, x.shape[0] + 1, x.shape[0] // instances, device=x.device)  # fmt: skip
        empty = (total[bounds[1:]] == total[bounds[:-1]]) & (bounds[1:] > bounds[:-1])
        if bool(empty.any()):
            rows = empty.nonzero().flatten().tolist()
            raise ValueError(f"route_mask must keep a token of every instance, got none for instances {rows}")


def check_routes(routes: Tensor, vu_A: Tensor, if_A: Tensor, fusion: str) -> None:
    """The same for given routes (n, b, c).

    Raises:
        ValueError: they name an expert that does not exist.
    """
    for slot, branch in enumerate(active_streams(fusion)):
        name, experts = ("VU", "IF")[branch], (vu_A, if_A)[branch].shape[0]
        chosen = routes[:, slot]
        if chosen.numel() and not bool(((chosen >= 0) & (chosen < experts)).all()):
            raise ValueError(f"routes of the {name} branch must lie in 0 to {experts - 1}, got {chosen.tolist()}")


def _check_route_shrink(
    x, instances, cu_seqlens, route_mask, instruction, routes, gates, vu_A, if_A, vu_B, if_B, vu_router, if_router,
    vu_importance, if_importance, seed, threshold, top_k, scaling, fusion, need_mean,
):  # fmt: skip
    check_values(x, instances, cu_seqlens, route_mask, instruction)
    if routes is not None:
        check_routes(routes, vu_A, if_A, fusion)


def _fake_route_shrink(
    x, instances, cu_seqlens, route_mask, instruction, routes, gates, vu_A, if_A, vu_B, if_B, vu_router, if_router,
    vu_importance, if_importance, seed, threshold, top_k, scaling, fusion, need_mean, backend,
):  # fmt: skip
    experts = vu_A.shape[0] + if_A.shape[0]
    h, w = new_rank_space(x, experts, vu_A.shape[1], top_k, fusion)
    mean = h.new_empty((instances, x.shape[1]) if need_mean else (0, 0))
    return h, w, *new_routing(x, instances, experts, top_k, fusion, routes, gates), mean


def _fake_fuse_expand(
    h, w, routes, gates, vu_B, if_B, instances, cu_seqlens, scaling, fusion, dtype, x, weight, bias, backend
):  # fmt: skip
    return h.new_empty((h.shape[0], vu_B.shape[1]), dtype=dtype), h.new_empty(h.shape[0])


def _fake_grad_output(
    g, h, w, routes, gates, lead, vu_B, if_B, vu_importance, if_importance, instances, cu_seqlens, scaling, fusion,
    need_dh, need_vu_B, need_if_B, need_importance, need_gates, backend,
):  # fmt: skip
    need = wanted(fusion, need_dh, need_vu_B, need_if_B, need_importance, need_gates)
    pairs = (need_dh, h), (need.vu_B, vu_B), (need.if_B, if_B), (need.importance, vu_importance)
    return tuple(empty_if(*pair) for pair in (*pairs, (need.importance, if_importance), (need_gates, gates)))


def _fake_grad_input(
    x, dh, routes, vu_A, if_A, instances, cu_seqlens, route_mask, dmean, seed, threshold, fusion, dtype, need_dx,
    need_vu_A, need_if_A, g, weight, backend,
):  # fmt: skip
    use_vu, use_if = branches(fusion)
    dx = dh.new_empty((dh.shape[0], vu_A.shape[2]) if need_dx else 0, dtype=dtype)
    return dx, empty_if(need_vu_A and use_vu, vu_A), empty_if(need_if_A and use_if, if_A)


route_shrink = _define(
    "route_shrink(Tensor x, SymInt instances, Tensor? cu_seqlens, Tensor? route_mask, Tensor? instruction, "
    "Tensor? routes, Tensor? gates, Tensor vu_A, Tensor if_A, Tensor vu_B, Tensor if_B, Tensor vu_router, "
    "Tensor if_router, Tensor vu_importance, Tensor if_importance, Tensor? seed, int threshold, int top_k, "
    "float scaling, str fusion, bool need_mean, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_route_shrink,
    _check_route_shrink,
)
fuse_expand = _define(
    "fuse_expand(Tensor h, Tensor w, Tensor routes, Tensor gates, Tensor vu_B, Tensor if_B, SymInt instances, "
    "Tensor? cu_seqlens, float scaling, str fusion, ScalarType dtype, Tensor? x, Tensor? weight, Tensor? bias, "
    "str backend) -> (Tensor, Tensor)",
    _fake_fuse_expand,
)
grad_output = _define(
    "grad_output(Tensor g, Tensor h, Tensor w, Tensor routes, Tensor gates, Tensor lead, Tensor vu_B, Tensor if_B, "
    "Tensor vu_importance, Tensor if_importance, SymInt instances, Tensor? cu_seqlens, float scaling, str fusion, "
    "bool need_dh, bool need_vu_B, bool need_if_B, bool need_importance, bool need_gates, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_grad_output,
)
grad_input = _define(
    "grad_input(Tensor? x, Tensor dh, Tensor routes, Tensor vu_A, Tensor if_A, SymInt instances, Tensor? cu_seqlens, "
    "Tensor? route_mask, Tensor? dmean, Tensor? seed, int threshold, str fusion, ScalarType dtype, bool need_dx, "
    "bool need_vu_A, bool need_if_A, Tensor? g, Tensor? weight, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_grad_input,
)


def _check_decode(
    x, instances, route_mask, instruction, routes, gates, vu_A, vu_B, if_A, if_B, vu_router, if_router, vu_importance,
    if_importance, weight, bias, top_k, scaling, fusion,
):  # fmt: skip
    check_values(x, instances, None, route_mask, instruction)
    for chosen, *A in zip(routes, vu_A, if_A, strict=False):  # there may be no routes
        check_routes(chosen, *A, fusion)


def _fake_decode(
    x, instances, route_mask, instruction, routes, gates, vu_A, vu_B, if_A, if_B, vu_router, if_router, vu_importance,
    if_importance, weight, bias, top_k, scaling, fusion, backend,
):  # fmt: skip
    results = []
    for i, (A, B) in enumerate(zip(vu_A, vu_B, strict=True)):
        routing = new_routing(x, instances, 0 if routes else A.shape[0] + if_A[i].shape[0], top_k, fusion)
        results.append((x.new_empty((instances, B.shape[1])), *routing, routing[2].new_empty(instances)))
    return tuple(map(list, zip(*results, strict=True)))


decode = _define(
    "decode(Tensor x, SymInt instances, Tensor? route_mask, Tensor? instruction, Tensor[] routes, Tensor[] gates, "
    "Tensor[] vu_A, Tensor[] vu_B, Tensor[] if_A, Tensor[] if_B, Tensor[] vu_router, Tensor[] if_router, "
    "Tensor[] vu_importance, Tensor[] if_importance, Tensor?[] weight, Tensor?[] bias, int top_k, float scaling, "
    "str fusion, str backend) -> (Tensor[], Tensor[], Tensor[], Tensor[], Tensor[])",
    _fake_decode,
    _check_decode,
)


class _SMoLoRA(torch.autograd.Function):
    """Forward and backward over the four passes; the routes, gates, logits and lead it returns are not differentiable.

    Saved for backward, besides parameters: x if an A trains (else nothing of x's size), h, lead, and what is per
    instance. Nothing saved is written to.
    """

    @staticmethod
    def forward(
        ctx, x, vu_A, vu_B, if_A, if_B, vu_router, if_router, vu_importance, if_importance, instruction, weight, bias,
        route_mask, cu_seqlens, routes, gates, seed, instances, threshold, top_k, scaling, fusion, router_grad, backend,
        keep_x,
    ):  # fmt: skip
        router_grad = router_grad if routes is None else None
        h, w, routes, gates, logits, mean = route_shrink(
            x, instances, cu_seqlens, route_mask, instruction, routes, gates, vu_A, if_A, vu_B, if_B, vu_router,
            if_router, vu_importance, if_importance, seed, threshold, top_k, scaling, fusion, router_grad is not None,
            backend,
        )  # fmt: skip
        y, lead = fuse_expand(
            h, w, routes, gates, vu_B, if_B, instances, cu_seqlens, scaling, fusion, x.dtype,
            None if weight is None else x, weight, bias, backend,
        )  # fmt: skip
        ctx.save_for_backward(
            x if keep_x else None, h, w, routes, gates, lead, logits, mean, vu_A, vu_B, if_A, if_B, vu_router,
            if_router, vu_importance, if_importance, instruction, weight, route_mask, cu_seqlens, seed,
        )  # fmt: skip
        ctx.options = instances, threshold, scaling, fusion, router_grad, backend, x.dtype
        ctx.mark_non_differentiable(routes, gates, logits, lead)
        return y, routes, gates, logits, lead

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        (
            x, h, w, routes, gates, lead, logits, mean, vu_A, vu_B, if_A, if_B, vu_router, if_router, vu_importance,
            if_importance, instruction, weight, route_mask, cu_seqlens, seed,
        ) = ctx.saved_tensors  # fmt: skip
        instances, threshold, scaling, fusion, router_grad, backend, dtype = ctx.options
        names = ("x", "vu_A", "vu_B", "if_A", "if_B", "vu_router", "if_router", "vu_importance", "if_importance",
                 "instruction")  # fmt: skip
        need = dict(zip(names, ctx.needs_input_grad, strict=False))
        dy = dy.contiguous()
        learn = router_grad is not None and any(need[n] for n in ("x", "vu_router", "if_router", "instruction"))
        dh, dvu_B, dif_B, dvu_importance, dif_importance, dgates = grad_output(
            dy, h, w, routes, gates, lead, vu_B, if_B, vu_importance, if_importance, instances, cu_seqlens, scaling,
            fusion, need["x"] or need["vu_A"] or need["if_A"], need["vu_B"], need["if_B"],
            need["vu_importance"] or need["if_importance"], learn, backend,
        )  # fmt: skip
        grads: dict[str, Tensor | None] = {
            "vu_B": dvu_B, "if_B": dif_B, "vu_importance": dvu_importance, "if_importance": dif_importance,
        }  # fmt: skip
        dmean = None
        if learn:
            with _without_autocast(dy.device.type):
                M = vu_router.shape[0]
                dlogits = rank_space.route_backward(
                    dgates, gates, routes, logits, M, fusion, router_grad == "straight_through"
                )
                dz_vu, dz_if = dlogits[:, :M], dlogits[:, M:]
                if fusion != "if":
                    grads["vu_router"] = (dz_vu.mT @ mean).to(vu_router.dtype)
                    count = rank_space.routed_tokens(route_mask, h.shape[0], instances, cu_seqlens, mean)
                    dmean = dz_vu @ vu_router.to(dz_vu.dtype) / count
                if fusion != "vu":
                    grads["if_router"] = (dz_if.mT @ instruction.to(dz_if.dtype)).to(if_router.dtype)
                    grads["instruction"] = (dz_if @ if_router.to(dz_if.dtype)).to(instruction.dtype)
        if need["x"] or need["vu_A"] or need["if_A"]:
            grads["x"], grads["vu_A"], grads["if_A"] = grad_input(
                x, dh, routes, vu_A, if_A, instances, cu_seqlens, route_mask, dmean if need["x"] else None, seed,
                threshold, fusion, dtype, need["x"], need["vu_A"], need["if_A"],
                None if weight is None else dy, weight, backend,
            )  # fmt: skip
        used = {"vu": fusion != "if", "if": fusion != "vu"}
        out = []
        for name in names:
            in_use = used.get(name.split("_")[0], True) and (fusion == "adaptive" or "importance" not in name)
            out.append(grads.get(name) if need[name] and in_use else None)
        return (*out, *(None,) * 15)


def smolora_linear(
    x: Tensor,
    vu_A: Tensor,
    vu_B: Tensor,
    if_A: Tensor,
    if_B: Tensor,
    vu_router: Tensor,
    if_router: Tensor,
    vu_importance: Tensor,
    if_importance: Tensor,
    instruction: Tensor | None,
    *,
    instances: int,
    threshold: int,
    top_k: int,
    scaling: float,
    fusion: str,
    router_grad: str,
    backend: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    route_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    routes: Tensor | None = None,
    gates: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """SMoLoRA over tokens, with or without the linear layer under it.

    Args:
        x: (T, d), contiguous, in the compute dtype; a `weight` (k, d) and `bias` (k,) are frozen and have it too.
        vu_A, ..., if_importance: parameters as in `FusedSMoLoRA`, of any floating dtype.
        instruction: (n, e), contiguous, or None.
        instances: n.
        threshold: of dropout in 1/256, 0 for none; `seed` int64 (1,) when positive.
        top_k, scaling, fusion, router_grad: as in `SMoLoRAConfig`.
        backend: "torch", "triton" or "cuda".
        route_mask: bool (T,), contiguous. cu_seqlens: int32 (n + 1,). routes: int32 (n, b, c), gates (n, b, c).

    Returns:
        y (T, k), routes (n, b, c), gates (n, b, c), logits (n, M + N) or (n, 0), lead (T,). Without `weight`, y is
        the adapter's output alone.
    """
    if backend == "cuda" and cuda.decodes(x, instances, cu_seqlens, threshold, top_k, fusion, vu_A, if_A):
        parameters = vu_A, vu_B, if_A, if_B, vu_router, if_router, vu_importance, if_importance
        (result,) = decode_linears(
            x, instruction, [parameters], [(weight, bias)], instances=instances, top_k=top_k, scaling=scaling,
            fusion=fusion, backend=backend, route_mask=route_mask, routes=[] if routes is None else [routes],
            gates=[] if routes is None else [gates],
        )  # fmt: skip
        return result
    learns = (top_k > 1 or router_grad == "straight_through") and routes is None
    keep_x = torch.is_grad_enabled() and (vu_A.requires_grad or if_A.requires_grad)
    return _SMoLoRA.apply(
        x, vu_A, vu_B, if_A, if_B, vu_router, if_router, vu_importance, if_importance, instruction, weight, bias,
        route_mask, cu_seqlens, routes, gates, seed, instances, threshold, top_k, scaling, fusion,
        router_grad if learns else None, backend, keep_x,
    )  # fmt: skip


def decode_linears(
    x: Tensor,
    instruction: Tensor | None,
    parameters: Sequence[Sequence[Tensor]],
    bases: Sequence[tuple[Tensor | None, Tensor | None]],
    *,
    instances: int,
    top_k: int,
    scaling: float,
    fusion: str,
    backend: str,
    route_mask: Tensor | None = None,
    routes: Sequence[Tensor] = (),
    gates: Sequence[Tensor] = (),
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """`smolora_linear` of one token an instance for layers that share x, in one launch; see `cuda.decodes`.

    Args:
        parameters: of each layer, vu_A to if_importance in the order of `smolora_linear`.
        bases: (weight, bias) of each layer.
        routes, gates: of each layer, or none.

    Returns:
        what `smolora_linear` gives for each layer.
    """
    results = decode(
        x, instances, route_mask, instruction, list(routes), list(gates), *map(list, zip(*parameters, strict=True)),
        *map(list, zip(*bases, strict=True)), top_k, scaling, fusion, backend,
    )  # fmt: skip
    return list(zip(*results, strict=True))
