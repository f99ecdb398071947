"""The four passes and `decode` with their products compiled for a CPU, in the optional module `smolora._cpu`.

Each pass has the name and arguments of its torch pass, which runs in its place where compiled code cannot take the
tensors: it takes float32 or float64, all of one dtype, contiguous and on the CPU, and at most two banks. Compiled
products sum in an order that depends on shapes and on the CPU's vectors alone, so the number of threads changes no bit.

csrc/cpu/products.cpp sums over tokens: dB in `grad_up`, dA in `grad_down`.

In rank space these products have the columns (b, K, r) of `torch_passes`, and K is 1 where the slots share an A.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..spec import Bank, Mixed, Slots, Tokens, empty_like_if, grad_needs, has_own_importance
from . import compiled, torch_passes
from .checks import check_ids
from .compiled import TYPES, address, function, is_plain
from .mixes import MIX
from .torch_passes import is_common
from .varlen import cut, laid

MAX_BANKS = 2
EMPTY, OUT_OF_RANGE = 1, 2  # what `decode` finds among given slots


# ---------------------------------------------------------------------------------------- what compiled code can take


def takes(arguments: Mapping[str, Any]) -> bool:
    """Whether compiled code takes a pass with these arguments."""
    if compiled.module is None:
        return False
    dtypes = set()
    for name, argument in arguments.items():
        if isinstance(argument, torch.dtype):
            dtypes.add(argument)
        tensors = argument if isinstance(argument, list) else [argument]
        if not tensors or not isinstance(tensors[0], Tensor):
            continue
        if len(tensors) > MAX_BANKS or not all(map(is_plain, tensors)):
            return False
        if name in ("ids", "cu_seqlens") and argument.dtype != torch.int32:
            return False
        dtypes.update(t.dtype for t in tensors if t.is_floating_point())
    return len(dtypes) == 1 and dtypes <= TYPES.keys()


def _else_torch(run: Callable) -> Callable:
    """Run the torch pass of the same name where compiled code cannot take the arguments."""
    name, parameters = run.__name__, list(inspect.signature(run).parameters)

    @wraps(getattr(torch_passes, name))
    def chosen(*arguments: Any) -> Any:
        taken = takes(dict(zip(parameters, arguments, strict=True)))
        return (run if taken else getattr(torch_passes, name))(*arguments)

    return chosen


def _layout(
    tokens: int, num_seqs: int, cu_seqlens: Tensor | None, ids: Tensor | None, experts: list[Tensor], rank: int
) -> Any:
    """Describe the slots (n, b, K) that tokens use of each bank's A or B; None: every expert, in order."""
    return compiled.module.Layout(
        tokens=tokens,
        seqs=num_seqs,
        slots=experts[0].shape[0] if ids is None else ids.shape[2],
        rank=rank,
        experts=[each.shape[0] for each in experts],
        cu_seqlens=address(cu_seqlens),
        ids=address(ids),
        threads=torch.get_num_threads(),
    )


def _key(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed) % 2**64


# --------------------------------------------------------------------------------------------------------- the passes


@_else_torch
def route_shrink(
    x: Tensor,
    num_seqs: int,
    cu_seqlens: Tensor | None,
    route_mask: Tensor | None,
    instruction: Tensor | None,
    ids: Tensor | None,
    A: list[Tensor],
    B: list[Tensor],
    importance: list[Tensor],
    routers: list[Tensor],
    router_reads_x: list[bool],
    router_rows: Tensor | None,
    token_router: Tensor | None,
    seed: Tensor | None,
    streams: list[int],
    threshold: int,
    top_k: int,
    gate: str,
    scaling: float,
    mix: str,
    need_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (tokens, d), r = x.shape, A[0].shape[1]
    routed_ids, slot_weights = x.new_empty(0, dtype=torch.int32), x.new_empty(0)
    logits, mean = x.new_empty((num_seqs, 0)), x.new_empty((0, 0))
    if routers:
        blocks = cut(tokens, num_seqs, cu_seqlens)
        ids, slot_weights, logits, mean = torch_passes.route(
            blocks.split(x),
            blocks,
            tokens,
            num_seqs,
            route_mask,
            instruction,
            routers,
            router_reads_x,
            router_rows,
            top_k,
            gate,
        )
        routed_ids = ids
    layout = _layout(tokens, num_seqs, cu_seqlens, None if is_common(A, ids) else ids, A, r)
    h = x.new_empty((tokens, len(A), layout.slots, r))
    function("shrink", x.dtype)(
        layout,
        A=[address(a) for a in A],
        d=d,
        threshold=threshold,
        seed=_key(seed),
        streams=streams,
        x=address(x),
        h=address(h),
    )
    w = x.new_empty((0, r))
    if mix == "smolora":
        w = x.new_empty((sum(b.shape[0] for b in B), r))
        for b, i, own in _by_importance(B, importance, w):
            function("scores", x.dtype)(
                shape=tuple(b.shape),
                scaling=scaling,
                B=address(b),
                importance=address(i),
                w=address(own),
                threads=torch.get_num_threads(),
            )
    token_logits = x.new_empty((tokens, 0)) if token_router is None else x @ token_router.mT
    mean = mean if need_mean else x.new_empty((0, 0))
    return h, w, routed_ids, slot_weights, logits, mean, token_logits, x.new_empty(0, dtype=torch.int32)


def _by_importance(
    B: list[Tensor], importance: list[Tensor], w: Tensor, *more: Sequence[Tensor | None]
) -> Iterator[tuple[Tensor | None, ...]]:
    """Yield B, I and w of the experts that share an I, and their parts of what else there is a bank: each bank's, or
    those of one expert, (1, k, r), (k,) and (1, r)."""
    for b, i, own, *rest in zip(B, importance, w.split([b.shape[0] for b in B]), *more, strict=True):
        if i.dim() == 1:
            yield b, i, own, *rest
            continue
        for e in range(b.shape[0]):
            # what nobody needs is empty
            yield (
                b[e : e + 1],
                i[e],
                own[e : e + 1],
                *(t[e : e + 1] if t is not None and t.numel() else t for t in rest),
            )


def _mixed(
    h: Tensor,
    w: Tensor,
    ids: Tensor | None,
    slot_weights: Tensor | None,
    scores: Tensor | None,
    B: list[Tensor],
    num_seqs: int,
    cu_seqlens: Tensor | None,
    scaling: float,
    mix: str,
) -> tuple[Tensor, Tensor]:
    """Return u = c h (T, b K r), and the scores (T,) that mix "smolora" makes of h unless they are given."""
    (tokens, _, down_slots, r), make_logits = h.shape, scores is None
    if mix != "smolora":
        blocks = laid(tokens, num_seqs, cu_seqlens, ids is None and slot_weights is None)
        ids, slot_weights = blocks.spread(ids), blocks.spread(slot_weights)
        u, fused = torch_passes.mixed(h, w, ids, slot_weights, scores, B, blocks, scaling, mix)
        return blocks.join(u).contiguous(), fused
    scores = h.new_empty(tokens) if make_logits else scores
    layout = _layout(tokens, num_seqs, cu_seqlens, ids, B, r)
    u = h.new_empty((tokens, len(B) * layout.slots * r))
    function("mix", h.dtype)(
        layout,
        shared=down_slots < layout.slots,
        h=address(h),
        w=address(w),
        slot_weights=address(slot_weights),
        fusion_logits=address(scores),
        make_logits=make_logits,
        scaling=scaling,
        u=address(u),
    )
    return u, scores


@_else_torch
def fuse_expand(
    h: Tensor,
    w: Tensor,
    ids: Tensor | None,
    slot_weights: Tensor | None,
    scores: Tensor | None,
    B: list[Tensor],
    num_seqs: int,
    cu_seqlens: Tensor | None,
    scaling: float,
    mix: str,
    dtype: torch.dtype,
    x: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (tokens, *_, r), k = h.shape, B[0].shape[1]
    u, fused = _mixed(h, w, ids, slot_weights, scores, B, num_seqs, cu_seqlens, scaling, mix)
    y = h.new_empty((tokens, k))
    layout = _layout(tokens, num_seqs, cu_seqlens, ids, B, r)
    function("expand", dtype)(
        layout, B=[address(b) for b in B], k=k, u=address(u), bias=address(base_bias), y=address(y)
    )
    return y if base_weight is None else y.addmm_(x, base_weight.mT), fused


@_else_torch
def grad_output(
    g: Tensor,
    h: Tensor,
    w: Tensor,
    ids: Tensor | None,
    slot_weights: Tensor | None,
    scores: Tensor | None,
    B: list[Tensor],
    importance: list[Tensor],
    trained: list[Tensor],
    num_seqs: int,
    cu_seqlens: Tensor | None,
    scaling: float,
    mix: str,
    need_dh: bool,
    need_B: list[bool],
    need_importance: bool,
    need_slot_weights: bool,
    need_scores: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    (tokens, k), r = g.shape, h.shape[3]
    need = grad_needs(mix, need_dh, any(need_B), need_importance, need_slot_weights, need_scores)
    dh, dw, dslot_weights, dscores, u, p = (g.new_empty(0) for _ in range(6))
    dB = [empty_like_if(needed, b) for needed, b in zip(need_B, B, strict=True)]
    dI = [empty_like_if(need_importance, i) for i in importance]
    layout = _layout(tokens, num_seqs, cu_seqlens, ids, B, r)
    if any(need_B):
        u, _ = _mixed(h, w, ids, slot_weights, scores, B, num_seqs, cu_seqlens, scaling, mix)
    if need.p:
        p = g.new_empty((tokens, len(B) * layout.slots * r))
    function("grad_up", g.dtype)(
        layout,
        B=[address(b) for b in B],
        trained=[address(t) for t in trained],
        k=k,
        scaling=scaling,
        g=address(g),
        u=address(u),
        p=address(p),
        dB=[address(grad) for grad in dB],
    )
    if need.p and mix != "smolora":
        blocks = laid(tokens, num_seqs, cu_seqlens, ids is None and slot_weights is None)
        grads = MIX[mix].backward(
            blocks.split(p.view(tokens, len(B), layout.slots, r)),
            blocks.split(h),
            None,
            blocks.spread(slot_weights),
            None if scores is None else blocks.split(scores),
            need_slot_weights,
        )
        dh = blocks.join(grads.dh).contiguous() if need_dh else dh
        dslot_weights = blocks.gather(grads.slot_weights) if need_slot_weights else dslot_weights
        dscores = blocks.join(grads.scores) if need_scores else dscores
    elif need.p:
        dh, dw = torch.empty_like(h), torch.empty_like(w)
        dslot_weights = empty_like_if(need_slot_weights, slot_weights)
        function("mix_backward", g.dtype)(
            layout,
            shared=h.shape[2] < layout.slots,
            h=address(h),
            w=address(w),
            slot_weights=address(slot_weights),
            fusion_logits=address(scores),
            p=address(p),
            dh=address(dh),
            dw=address(dw),
            dslot_weights=address(dslot_weights),
        )
        if need.dw:
            learns = trained or [None] * len(B)
            for b, i, own, t, grad_b, grad_i in _by_importance(B, importance, dw, learns, dB, dI):
                function("grad_scores", g.dtype)(
                    shape=tuple(b.shape),
                    scaling=scaling,
                    B=address(b),
                    importance=address(i),
                    dw=address(own),
                    trained=address(t),
                    dB=address(grad_b),
                    dimportance=address(grad_i),
                    threads=torch.get_num_threads(),
                )
            if trained and need_importance and has_own_importance(importance):
                for grad_i, t in zip(dI, trained, strict=True):
                    grad_i.masked_fill_(~t[:, None], 0)
    return dh if need_dh else g.new_empty(0), dB, dI, dslot_weights, dscores


@_else_torch
def grad_input(
    x: Tensor | None,
    dh: Tensor,
    ids: Tensor | None,
    A: list[Tensor],
    trained: list[Tensor],
    token_router: Tensor | None,
    dtoken_logits: Tensor | None,
    num_seqs: int,
    cu_seqlens: Tensor | None,
    route_mask: Tensor | None,
    dmean: Tensor | None,
    seed: Tensor | None,
    streams: list[int],
    threshold: int,
    masks: Tensor | None,
    dtype: torch.dtype,
    need_dx: bool,
    need_A: list[bool],
    need_token_router: bool,
    g: Tensor | None,
    base_weight: Tensor | None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    tokens, (_, r, d) = dh.shape[0], A[0].shape
    dh = dh * (256 / (256 - threshold)) if threshold else dh
    dx = dh.new_empty((tokens, d) if need_dx else 0)
    dA = [empty_like_if(needed, a) for needed, a in zip(need_A, A, strict=True)]
    if need_dx or any(need_A):
        function("grad_down", dtype)(
            _layout(tokens, num_seqs, cu_seqlens, None if is_common(A, ids) else ids, A, r),
            A=[address(a) for a in A],
            d=d,
            threshold=threshold,
            seed=_key(seed),
            streams=streams,
            x=address(x),
            dh=address(dh),
            dx=address(dx),
            trained=[address(t) for t in trained],
            dA=[address(grad) for grad in dA],
        )
    if need_dx and dtoken_logits is not None:
        dx.addmm_(dtoken_logits, token_router)
    if need_dx and base_weight is not None:
        dx.addmm_(g, base_weight)
    if need_dx and dmean is not None:
        dx += torch_passes.mean_backward(dmean, tokens, num_seqs, cu_seqlens, route_mask)
    drouter = dh.new_empty(0)
    if need_token_router:
        drouter = dtoken_logits.mT @ x
    return dx, dA, drouter


# ------------------------------------------------------------------------------------------------------------ decoding


def _has_shape(t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    return t.shape == shape and t.dtype == dtype and is_plain(t)


def decodes(backend: str, x: Tensor, banks: Sequence[Bank], tokens: Tokens, slots: Slots | None) -> bool:
    """Whether `decode` takes a call of `mixture_linear` without dropout, token weights or token router."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or compiled.module is None or backend != "torch":
        return False
    if (
        slots is None
        or slots.ids is None
        or tokens.cu_seqlens is not None
        or x.shape[0] != tokens.num_seqs
        or len(banks) > 2
    ):
        return False
    if type(x) is not Tensor or x.dtype not in TYPES or not _has_shape(x, x.dtype, x.shape):
        return False
    n, b, _ = shape = slots.ids.shape
    if not _has_shape(slots.ids, torch.int32, shape) or (n, b) != (tokens.num_seqs, len(banks)):
        return False
    if slots.weights is not None and not _has_shape(slots.weights, x.dtype, shape):
        return False
    d, (_, k, r), common = x.shape[1], banks[0].B.shape, banks[0].A.shape[0] == 1
    return all(
        _has_shape(bank.A, x.dtype, (1 if common else bank.B.shape[0], r, d))
        and _has_shape(bank.B, x.dtype, (bank.B.shape[0], k, r))
        and (
            bank.importance is None
            or _has_shape(bank.importance, x.dtype, (k,))
            or (slots.ids.shape[2] == 1 and _has_shape(bank.importance, x.dtype, (bank.B.shape[0], k)))
        )
        for bank in banks
    )


def decode(
    x: Tensor, banks: Sequence[Bank], slots: Slots, scaling: float, mix: str, weight: Tensor | None, bias: Tensor | None
) -> Mixed:
    """Apply a mixture to one token of each sequence, whose experts are given; see `mixture_linear`.

    Each output is summed up in an order of its own: neither the batch nor the threads change a bit of it.

    Raises:
        ValueError: the slots name an expert that does not exist.
    """
    n, d = x.shape
    _, k, r = banks[0].B.shape
    if weight is None:
        y = x.new_zeros((n, k))
    elif torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            y = torch.nn.functional.linear(x, weight, bias)
    else:
        y = torch.nn.functional.linear(x, weight, bias)
    ids, slot_weights = slots
    scores = x.new_empty(n) if mix == "smolora" else None
    found = function("decode", x.dtype)(
        x.data_ptr(),
        y.data_ptr(),
        ids.data_ptr(),
        address(slot_weights),
        [
            (A.data_ptr(), B.data_ptr(), address(I), I is not None and I.dim() == 2, B.shape[0])
            for A, B, I in ((bank.A, bank.B, bank.importance) for bank in banks)
        ],
        address(scores),
        (n, d, k, r, ids.shape[2]),
        banks[0].A.shape[0] == 1,
        scaling,
        torch.get_num_threads(),
    )
    if found == OUT_OF_RANGE:
        check_ids(ids, [bank.B for bank in banks])
    if found == EMPTY and slot_weights is not None and mix == "weighted":
        slot_weights = slot_weights.masked_fill(ids < 0, 0)
    return Mixed(y, ids, slot_weights, None, scores)
