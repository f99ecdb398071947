"""The passes as torch operators, and the autograd function over them.

Each pass is one opaque operator, `torch.ops.smolora.<pass>`, with the arguments of `rank_space` and a backend's name.
Differentiation lives in a thin `autograd.Function` around them, which torch.compile traces through. Operators run with
autocast off: their inputs come in one compute dtype, whatever the state of the thread that runs a backward.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cuda, rank_space
from .rank_space import accurate_dtype, active_streams

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
    routes: Tensor | None,
    gates: Tensor | None,
    vu_A: Tensor,
    if_A: Tensor,
    *rest: Any,
) -> None:
    """What only the values can tell, checked where reading them waits for no device.

    Raises:
        ValueError: `cu_seqlens` are no boundaries of x's tokens, `instruction` is not finite, `route_mask` leaves an
            instance that has tokens without any, or `routes` name an expert that does not exist.
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
    if routes is not None:
        streams = active_streams(rest[-2])
        for slot, branch in enumerate(streams):
            name, experts = (("VU", vu_A), ("IF", if_A))[branch][0], (vu_A, if_A)[branch].shape[0]
            chosen = routes[:, slot]
            if chosen.numel() and not bool(((chosen >= 0) & (chosen < experts)).all()):
                raise ValueError(f"routes of the {name} branch must lie in 0 to {experts - 1}, got {chosen.tolist()}")


def _fake_route_shrink(
    x, instances, cu_seqlens, route_mask, instruction, routes, gates, vu_A, if_A, vu_B, if_B, vu_router, if_router,
    vu_importance, if_importance, seed, threshold, top_k, scaling, fusion, need_mean, backend,
):  # fmt: skip
    dtype = accurate_dtype(x.dtype)
    branches, experts, r = len(active_streams(fusion)), vu_A.shape[0] + if_A.shape[0], vu_A.shape[1]
    return (
        x.new_empty((x.shape[0], branches, top_k, r), dtype=dtype),
        x.new_empty((experts if fusion == "adaptive" else 0, r), dtype=dtype),
        x.new_empty((instances, branches, top_k), dtype=torch.int32),
        x.new_empty((instances, branches, top_k), dtype=dtype),
        x.new_empty((instances, experts if routes is None else 0), dtype=dtype),
        x.new_empty((instances, x.shape[1]) if need_mean else (0, 0), dtype=dtype),
    )


def _fake_fuse_expand(
    h, w, routes, gates, vu_B, if_B, instances, cu_seqlens, scaling, fusion, dtype, x, weight, bias, backend
):  # fmt: skip
    return h.new_empty((h.shape[0], vu_B.shape[1]), dtype=dtype), h.new_empty(h.shape[0])


def _fake_grad_output(
    g, h, w, routes, gates, lead, vu_B, if_B, vu_importance, if_importance, instances, cu_seqlens, scaling, fusion,
    need_dh, need_vu_B, need_if_B, need_importance, need_gates, backend,
):  # fmt: skip
    use_vu, use_if = rank_space.branches(fusion)
    need_importance = need_importance and fusion == "adaptive"
    wanted = (vu_B, need_vu_B and use_vu), (if_B, need_if_B and use_if)
    wanted += (vu_importance, need_importance), (if_importance, need_importance)
    return (
        torch.empty_like(h) if need_dh else h.new_empty(0),
        *(torch.empty_like(like) if want else like.new_empty(0) for like, want in wanted),
        h.new_empty(gates.shape if need_gates else 0),
    )


def _fake_grad_input(
    x, dh, routes, vu_A, if_A, instances, cu_seqlens, route_mask, dmean, seed, threshold, fusion, dtype, need_dx,
    need_vu_A, need_if_A, g, weight, backend,
):  # fmt: skip
    use_vu, use_if = rank_space.branches(fusion)
    return (
        dh.new_empty((dh.shape[0], vu_A.shape[2]) if need_dx else (0,), dtype=dtype),
        torch.empty_like(vu_A) if need_vu_A and use_vu else vu_A.new_empty(0),
        torch.empty_like(if_A) if need_if_A and use_if else if_A.new_empty(0),
    )


route_shrink = _define(
    "route_shrink(Tensor x, SymInt instances, Tensor? cu_seqlens, Tensor? route_mask, Tensor? instruction, "
    "Tensor? routes, Tensor? gates, Tensor vu_A, Tensor if_A, Tensor vu_B, Tensor if_B, Tensor vu_router, "
    "Tensor if_router, Tensor vu_importance, Tensor if_importance, Tensor? seed, int threshold, int top_k, "
    "float scaling, str fusion, bool need_mean, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_route_shrink,
    check_values,
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


def _fake_decode(
    x, instances, cu_seqlens, route_mask, instruction, routes, gates, vu_A, if_A, vu_B, if_B, vu_router, if_router,
    vu_importance, if_importance, weight, bias, top_k, scaling, fusion, backend,
):  # fmt: skip
    shape, dtype = (instances, len(active_streams(fusion)), top_k), accurate_dtype(x.dtype)
    return (
        x.new_empty((instances, vu_B.shape[1])),
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty(shape, dtype=dtype),
        x.new_empty((instances, vu_A.shape[0] + if_A.shape[0] if routes is None else 0), dtype=dtype),
        x.new_empty(instances, dtype=dtype),
    )


decode = _define(
    "decode(Tensor x, SymInt instances, Tensor? cu_seqlens, Tensor? route_mask, Tensor? instruction, Tensor? routes, "
    "Tensor? gates, Tensor vu_A, Tensor if_A, Tensor vu_B, Tensor if_B, Tensor vu_router, Tensor if_router, "
    "Tensor vu_importance, Tensor if_importance, Tensor? weight, Tensor? bias, int top_k, float scaling, str fusion, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_decode,
    lambda *arguments: check_values(*arguments, False),  # where route_shrink has need_mean
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
    if backend == "cuda" and cuda.decodes(
        x.shape[0], instances, cu_seqlens is not None, threshold, len(active_streams(fusion)) * top_k,
        vu_A.shape[0] + if_A.shape[0], vu_A.shape[1],
    ):  # fmt: skip
        return decode(
            x, instances, cu_seqlens, route_mask, instruction, routes, gates, vu_A, if_A, vu_B, if_B, vu_router,
            if_router, vu_importance, if_importance, weight, bias, top_k, scaling, fusion, backend,
        )  # fmt: skip
    learns = (top_k > 1 or router_grad == "straight_through") and routes is None
    keep_x = torch.is_grad_enabled() and (vu_A.requires_grad or if_A.requires_grad)
    return _SMoLoRA.apply(
        x, vu_A, vu_B, if_A, if_B, vu_router, if_router, vu_importance, if_importance, instruction, weight, bias,
        route_mask, cu_seqlens, routes, gates, seed, instances, threshold, top_k, scaling, fusion,
        router_grad if learns else None, backend, keep_x,
    )  # fmt: skip
