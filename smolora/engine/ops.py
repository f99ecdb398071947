"""The four passes and `decode` as torch operators.

Each is one opaque operator, `torch.ops.smolora.<pass>`, with the arguments of the torch pass of that name and the name
of a backend. Operators run with autocast off: their inputs come in one compute dtype, whatever the state of the thread
that runs a backward.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..spec import empty_like_if, new_masks, new_rank_space, new_routing, num_slots
from . import cpu_passes, cuda_passes, torch_passes
from .checks import check_ids, check_values

CHECK_ENVIRONMENT = "SMOLORA_CHECK"


def _triton() -> ModuleType:
    from ..kernels import passes  # the top-level folder kernels/; not at the top: importing Triton takes time

    return passes


# The module with each backend's four passes. "torch" means cpu_passes, which falls back to torch_passes.
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
    """Define the operator of a pass for CPU and CUDA tensors; its last argument names the backend.

    `fake` gets one object that has the arguments by name.
    """
    name = signature.__name__
    names = [*inspect.signature(signature).parameters, "backend"]
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

    def run_fake(*arguments: Any, **named: Any) -> Any:
        return fake(SimpleNamespace(**dict(zip(names, arguments, strict=False)), **named))

    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    _library.impl(name, run_fake, "Meta")  # register_fake asks where it is called from, 20 ms each at import
    return getattr(torch.ops.smolora, name).default


# --------------------------------------------------------------------------------------------------------- the passes


def _check_route_shrink(x, num_seqs, cu_seqlens, route_mask, instruction, ids, A, B, *_) -> None:
    check_values(x, num_seqs, cu_seqlens, route_mask, instruction)
    if ids is not None:
        check_ids(ids, B)


def _fake_route_shrink(a: Any) -> Any:
    h, w, token_logits = new_rank_space(a.x, a.A, a.B, num_slots(a.ids, a.B, a.top_k), a.mix, a.token_router)
    mean = h.new_empty((a.num_seqs, a.x.shape[1]) if a.need_mean else (0, 0))
    masks = a.x.new_empty(0, dtype=torch.int32)
    if a.threshold and a.backend == "triton":
        masks = new_masks(a.x, a.streams, a.x.shape[1])
    return h, w, *new_routing(a.x, a.num_seqs, a.B, a.top_k, bool(a.routers)), mean, token_logits, masks


def _fake_fuse_expand(a: Any) -> Any:
    y = a.h.new_empty((a.h.shape[0], a.B[0].shape[1]), dtype=a.dtype)
    return y, a.h.new_empty(a.h.shape[0] if a.mix == "smolora" else 0)


def _fake_grad_output(a: Any) -> Any:
    dB = [empty_like_if(need, b) for need, b in zip(a.need_B, a.B, strict=True)]
    dI = [empty_like_if(a.need_importance, i) for i in a.importance]
    dslot_weights = torch.empty_like(a.slot_weights) if a.need_slot_weights else a.h.new_empty(0)
    dscores = torch.empty_like(a.scores) if a.need_scores else a.h.new_empty(0)
    dh = a.h.new_empty(a.h.shape if a.need_dh else 0, dtype=a.g.dtype if a.backend == "triton" else None)
    return dh, dB, dI, dslot_weights, dscores


def _fake_grad_input(a: Any) -> Any:
    dx = a.dh.new_empty((a.dh.shape[0], a.A[0].shape[2]) if a.need_dx else 0, dtype=a.dtype)
    dA = [empty_like_if(need, each) for need, each in zip(a.need_A, a.A, strict=True)]
    return dx, dA, empty_like_if(a.need_token_router, a.dh if a.token_router is None else a.token_router)


def _check_decode(x, num_seqs, route_mask, instruction, ids, slot_weights, A, B, *_) -> None:
    check_values(x, num_seqs, None, route_mask, instruction)
    banks = len(B) // max(len(ids), 1)
    for i, chosen in enumerate(ids):
        check_ids(chosen, B[i * banks : i * banks + banks])


def _fake_decode(a: Any) -> Any:
    banks = len(a.A) // len(a.base_weight)
    results = []
    for first in range(0, len(a.B), banks):
        routing = new_routing(a.x, a.num_seqs, a.B[first : first + banks], a.top_k, bool(a.routers))
        scores = routing[2].new_empty(a.num_seqs if a.mix == "smolora" else 0)
        results.append((a.x.new_empty((a.num_seqs, a.B[first].shape[1])), *routing, scores))
    return tuple(map(list, zip(*results, strict=True)))


# An operator calls BACKENDS[backend]().<its name>; the torch pass here gives the schema.
route_shrink = _define(torch_passes.route_shrink, _fake_route_shrink, _check_route_shrink)
fuse_expand = _define(torch_passes.fuse_expand, _fake_fuse_expand)
grad_output = _define(torch_passes.grad_output, _fake_grad_output)
grad_input = _define(torch_passes.grad_input, _fake_grad_input)
decode = _define(cuda_passes.decode, _fake_decode, _check_decode)
