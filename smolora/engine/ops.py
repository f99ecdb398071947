"""The four passes and `decode` as torch operators.

Each is one opaque operator, `torch.ops.smolora.<pass>`, with the arguments of the torch pass of that name and the name
of a backend. Operators run with autocast off: their inputs come in one compute dtype, whatever the state of the thread
that runs a backward.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..spec import empty_like_if, new_rank_space, new_routing, num_slots
from . import cpu_passes, cuda_passes, torch_passes
from .checks import check_ids, check_values

CHECK_ENVIRONMENT = "SMOLORA_CHECK"


def _triton() -> ModuleType:
    from ..kernels import passes  # not at the top: importing Triton takes time, and it may be missing

    return passes


# Where each backend's route_shrink, fuse_expand, grad_output and grad_input are. Torch's own run where those compiled
# for a CPU cannot.
BACKENDS: dict[str, Callable[[], ModuleType]] = {
    "torch": lambda: cpu_passes,
    "triton": _triton,
    "cuda": lambda: cuda_passes,
}

_library = torch.library.Library("smolora", "DEF")


def without_autocast(device_type: str) -> AbstractContextManager:
    """Autocast off; nothing to enter where it is off, which is quicker."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _define(signature: Callable, fake: Callable, check: Callable[..., None] | None = None) -> Any:
    """Define the operator of a pass for CPU and CUDA tensors; its last argument names the backend."""
    name = signature.__name__
    schema = torch.library.infer_schema(signature, mutates_args=(), op_name=name)
    schema = schema.replace(") -> ", ", str backend) -> ", 1)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))

    def run(*arguments: Any) -> Any:
        *arguments, backend = arguments
        like = next(a for a in arguments if isinstance(a, Tensor))
        if check is not None and (like.device.type == "cpu" or os.environ.get(CHECK_ENVIRONMENT) == "1"):
            check(*arguments)
        with without_autocast(like.device.type), torch.cuda.device_of(like):
            return getattr(BACKENDS[backend](), name)(*arguments)

    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"smolora::{name}", fake, lib=_library)
    return getattr(torch.ops.smolora, name).default


# --------------------------------------------------------------------------------------------------------- the passes


def _check_route_shrink(x, num_seqs, cu_seqlens, route_mask, instruction, ids, A, B, *_) -> None:
    check_values(x, num_seqs, cu_seqlens, route_mask, instruction)
    if ids is not None:
        check_ids(ids, B)


def _fake_route_shrink(
    x, num_seqs, cu_seqlens, route_mask, instruction, ids, A, B, importance, routers, router_reads_x, router_rows,
    token_router, seed, streams, threshold, top_k, gate, scaling, mix, need_mean, backend,
):  # fmt: skip
    h, w, token_logits = new_rank_space(x, A, B, num_slots(ids, B, top_k), mix, token_router)
    mean = h.new_empty((num_seqs, x.shape[1]) if need_mean else (0, 0))
    return h, w, *new_routing(x, num_seqs, B, top_k, bool(routers)), mean, token_logits


def _fake_fuse_expand(
    h, w, ids, slot_weights, scores, B, num_seqs, cu_seqlens, scaling, mix, dtype, x, base_weight, base_bias, backend
):
    return h.new_empty((h.shape[0], B[0].shape[1]), dtype=dtype), h.new_empty(h.shape[0] if mix == "smolora" else 0)


def _fake_grad_output(
    g, h, w, ids, slot_weights, scores, B, importance, trained, num_seqs, cu_seqlens, scaling, mix, need_dh, need_B,
    need_importance, need_slot_weights, need_scores, backend,
):  # fmt: skip
    dB = [empty_like_if(need, b) for need, b in zip(need_B, B, strict=True)]
    dI = [empty_like_if(need_importance, i) for i in importance]
    dslot_weights = torch.empty_like(slot_weights) if need_slot_weights else h.new_empty(0)
    dscores = torch.empty_like(scores) if need_scores else h.new_empty(0)
    return empty_like_if(need_dh, h), dB, dI, dslot_weights, dscores


def _fake_grad_input(
    x, dh, ids, A, token_router, dtoken_logits, num_seqs, cu_seqlens, route_mask, dmean, seed, streams, threshold,
    dtype, need_dx, need_A, need_token_router, g, base_weight, backend,
):  # fmt: skip
    dx = dh.new_empty((dh.shape[0], A[0].shape[2]) if need_dx else 0, dtype=dtype)
    dA = [empty_like_if(need, a) for need, a in zip(need_A, A, strict=True)]
    return dx, dA, empty_like_if(need_token_router, dh if token_router is None else token_router)


def _check_decode(x, num_seqs, route_mask, instruction, ids, slot_weights, A, B, *_) -> None:
    check_values(x, num_seqs, None, route_mask, instruction)
    banks = len(B) // max(len(ids), 1)
    for i, chosen in enumerate(ids):
        check_ids(chosen, B[i * banks : i * banks + banks])


def _fake_decode(
    x, num_seqs, route_mask, instruction, ids, slot_weights, A, B, importance, routers, router_reads_x, base_weight,
    base_bias, top_k, gate, scaling, mix, backend,
):  # fmt: skip
    banks = len(A) // len(base_weight)
    results = []
    for first in range(0, len(B), banks):
        routing = new_routing(x, num_seqs, B[first : first + banks], top_k, bool(routers))
        scores = routing[2].new_empty(num_seqs if mix == "smolora" else 0)
        results.append((x.new_empty((num_seqs, B[first].shape[1])), *routing, scores))
    return tuple(map(list, zip(*results, strict=True)))


route_shrink = _define(torch_passes.route_shrink, _fake_route_shrink, _check_route_shrink)
fuse_expand = _define(torch_passes.fuse_expand, _fake_fuse_expand)
grad_output = _define(torch_passes.grad_output, _fake_grad_output)
grad_input = _define(torch_passes.grad_input, _fake_grad_input)
decode = _define(cuda_passes.decode, _fake_decode, _check_decode)
