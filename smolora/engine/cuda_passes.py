"""The four passes in CUDA C++ (`csrc/`), with the names, arguments and results of `torch_passes`, and `decode`.

Tensors are contiguous CUDA tensors; x, g and the base in float32, float16 or bfloat16, parameters in any floating
dtype. The compiled module takes addresses and sizes alone. In tests it is the emulation of the same sources on the CPU,
and the tensors are CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

from ..launch import card_of, cdiv, chunk_tokens, split_k, tile_count
from ..spec import (
    Bank,
    Router,
    down_slots,
    empty_like_if,
    grad_needs,
    new_rank_space,
    new_routing,
    num_slots,
)
from . import cuda_build
from .cuda_launch import BOTH_HALVES, FIRST_HALF, MIXES, SECOND_HALF, layout, run_pass

COLUMNS = (32, 80, 128)  # of rank space that a block of the shrink may have; in float32 the last would spill
MAX_BANKS = 2
RESIDENT = 2  # blocks that a processor runs at once
MAX_RANK = 128
MAX_MIX_NUMBERS = 2048  # of a token in rank space, b K r, that a warp holds in mix's gradient
MAX_FUSED_ROUTING_COLUMNS = 128  # of all experts that x routes: up to here one pass over x computes them
MAX_DECODE_SEQS = 64
MAX_DECODE_EXPERTS = 256
MAX_DECODE_OUTPUTS = 512  # of a block of decode


def padded_rank16(r: int) -> int:
    """Return the columns that an expert takes in rank space: its rank, rounded up to a multiple of 16."""
    return cdiv(r, 16) * 16


def _up_to_8(size: int) -> int:
    return cdiv(size, 8) * 8


def shrink_columns(total: int, dtype: torch.dtype) -> int:
    """Return the columns of rank space that a block of the shrink has, of `total`: all of them if it can."""
    choices = COLUMNS[:-1] if dtype == torch.float32 else COLUMNS
    return next((columns for columns in choices if total <= columns), choices[-1])


def fused_p_and_dB(columns: int, dtype: torch.dtype) -> bool:
    """Tell whether one read of g gives p and the parts of dB: where they and the weights fit into a block."""
    return columns <= (32 if dtype == torch.float32 else 64)


def _padded(weight: Tensor, shape: tuple[int, ...], dtype: torch.dtype, transposed: bool = False) -> Tensor | None:
    """Allocate a padded weight in the compute dtype; None if the kernels can read the weight as it is."""
    as_it_is = weight.dtype == dtype and tuple(weight.shape) == shape and weight.data_ptr() % 16 == 0
    return None if as_it_is and not transposed else torch.empty(shape, dtype=dtype, device=weight.device)


def decode_outputs(k: int) -> int:
    """Return the outputs of a slice of k in decode: at most 64 slices where they are not too long, a part of w each."""
    return min(MAX_DECODE_OUTPUTS, 64 * cdiv(k, 64 * 64))


# ------------------------------------------------------------------------------------------------------ what it takes


def unsupported_reason(mix: str, banks: int, slots: int, r: int, token_scores: bool) -> str | None:
    """Tell why the kernels cannot take a mixture, by what they lack; None if they can.

    Args:
        slots: of each bank. token_scores: whether coefficients are given a token, (T, K).
    """
    if mix not in MIXES:
        return f"its kernels have the mixes {' and '.join(map(repr, MIXES))}, not {mix!r}"
    if token_scores:
        return "its kernels take a weight for a slot and a sequence, not one for each token (token_weights)"
    if banks > MAX_BANKS:
        return f"its kernels take up to {MAX_BANKS} banks, not {banks}"
    if r > MAX_RANK:
        return f"its kernels take ranks up to {MAX_RANK}, not {r}"
    if banks * slots * r > MAX_MIX_NUMBERS:
        return (
            f"its kernels take up to {MAX_MIX_NUMBERS} numbers of a token in rank space (banks * slots * r), "
            f"not {banks * slots * r}"
        )
    return None


def refuse_unsupported(mix: str, banks: int, slots: int, r: int, token_scores: bool) -> None:
    """Raise for a mixture that the kernels cannot take.

    Raises:
        RuntimeError: see `unsupported_reason`.
    """
    reason = unsupported_reason(mix, banks, slots, r, token_scores)
    if reason is not None:
        raise RuntimeError(f"backend 'cuda' cannot run: {reason}; 'triton' takes any")


# ---------------------------------------------------------------------------------------------------------- the passes


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
    """Choose each sequence's slots and bring its tokens into rank space."""
    (T, d), n, k, r = x.shape, num_seqs, B[0].shape[1], A[0].shape[1]
    E, slots, shared, routes = [b.shape[0] for b in B], num_slots(ids, B, top_k), down_slots(A, 0) == 1, bool(routers)
    refuse_unsupported(mix, len(B), slots, r, token_router is not None)
    h, w, token_logits = new_rank_space(x, A, B, slots, mix, None)
    routed_ids, routed_weights, logits = new_routing(x, n, B, top_k, routes)
    routes_by_x, RP, dtype = any(router_reads_x), padded_rank16(r), x.dtype
    of_x = RP * sum(e for e, reads_x in zip(E, router_reads_x, strict=False) if reads_x)
    fused_routing = routes_by_x and (shared or of_x <= MAX_FUSED_ROUTING_COLUMNS)
    columns = len(B) * RP * (1 if shared else slots)
    if fused_routing and not shared:
        columns += of_x - RP * slots * sum(router_reads_x)
    block = shrink_columns(columns, dtype)
    limits, packed, programs = cuda_build.extension, cu_seqlens is not None, RESIDENT * card_of(x.device).processors
    width = limits.ROW // x.element_size()
    extra = 1 if route_mask is None else 2
    tiles = tile_count(T, n, limits.TILE, packed, extra if fused_routing else 1)
    sum_tiles = tile_count(T, n, limits.TILE, packed, extra)
    splits = split_k(tiles * cdiv(columns, block), d, 4 * width, programs)
    float32 = dict(dtype=torch.float32, device=x.device)
    mean = torch.empty((n, d) if routes_by_x else (0, 0), **float32)
    banks = [
        dict(
            E=E[i],
            dropout_stream=streams[i],
            A=A[i],
            B=B[i],
            importance=importance[i] if importance else None,
            router=routers[i] if routes else None,
            router_reads_x=routes and router_reads_x[i],
            padded=_padded(A[i], (A[i].shape[0], RP, _up_to_8(d)), dtype),
        )
        for i in range(len(B))
    ]
    fields = layout(
        dtype,
        T,
        n,
        banks,
        slots,
        r,
        shared,
        ids=ids,
        mix=mix,
        scaling=scaling,
        cu_seqlens=cu_seqlens,
        seed=seed,
        threshold=threshold,
    )
    fields |= dict(
        routes=routes,
        gate_all=gate == "all",
        d=d,
        k=k,
        e=0 if instruction is None else instruction.shape[1],
        x=x,
        route_mask=route_mask if routes_by_x else None,
        instruction=instruction,
        routed_ids=routed_ids,
        routed_weights=routed_weights,
        logits=logits,
        router_rows=router_rows,
        fused_routing=fused_routing,
        columns=block,
        split_k=splits,
        sum_split_k=split_k(sum_tiles, d, 4 * width, programs),
        routed=torch.empty((n, 2), dtype=torch.int64, device=x.device),
        arrived=torch.empty(n, dtype=torch.int32, device=x.device),
        sums=torch.empty((sum_tiles, d), **float32) if routes_by_x else None,
        mean=mean,
        z_part=torch.empty((n, cdiv(d, limits.ROUTE_INPUTS), sum(E)), **float32) if routes_by_x else None,
        w_part=torch.empty((cdiv(k, limits.W_PART_OUTPUTS), sum(E), r), **float32) if len(w) else None,
        part=torch.empty((splits, T, columns), **float32),
        h=h,
        w=w if len(w) else None,
    )
    run_pass("route_shrink", x, fields)
    mean = mean if need_mean and routes_by_x else torch.empty((0, 0), **float32)
    return h, w, routed_ids, routed_weights, logits, mean, token_logits, x.new_empty(0, dtype=torch.int32)


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
    """Mix in rank space and expand to the output."""
    (T, _, down, r), n, k, slots = h.shape, num_seqs, B[0].shape[1], num_slots(ids, B, 0)
    refuse_unsupported(mix, len(B), slots, r, scores is not None)
    RP = padded_rank16(r)
    y = torch.empty((T, k), dtype=dtype, device=h.device)
    fused = h.new_empty(T if mix == "smolora" else 0)
    tiles = tile_count(T, n, cuda_build.extension.TILE, cu_seqlens is not None)
    banks = [dict(E=b.shape[0], B=b, padded=_padded(b, (b.shape[0], k, RP), dtype)) for b in B]
    fields = layout(
        dtype,
        T,
        n,
        banks,
        slots,
        r,
        down < slots,
        ids=ids,
        slot_weights=slot_weights,
        mix=mix,
        scaling=scaling,
        cu_seqlens=cu_seqlens,
    )
    fields |= dict(
        k=k,
        slices=split_k(tiles, k, 256, RESIDENT * card_of(h.device).processors),
        h=h,
        w=w,
        bias=base_bias,
        u=torch.empty((T, len(B) * slots * RP), dtype=dtype, device=h.device),
        scores=fused,
        y=y,
    )
    run_pass("fuse_expand", h, fields)
    if base_weight is not None:
        y.addmm_(x, base_weight.t())
    return y, fused


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
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor]:
    """Go from g = dL/dy (T, k) to rank space, and to the gradients of what lies behind it."""
    (T, k), n, down, r, slots = g.shape, num_seqs, h.shape[2], h.shape[3], num_slots(ids, B, 0)
    need = grad_needs(mix, need_dh, any(need_B), need_importance, need_slot_weights, need_scores)
    limits, packed, programs = cuda_build.extension, cu_seqlens is not None, RESIDENT * card_of(g.device).processors
    RP, dtype = padded_rank16(r), g.dtype
    total = len(B) * slots * RP
    fused, columns = fused_p_and_dB(total, dtype), shrink_columns(total, dtype)
    block = limits.OUTER_TILES * limits.ROW // g.element_size()
    k_blocks = cdiv(k, block)
    chunk = chunk_tokens(T, n, k_blocks, limits.CHUNK, programs)
    chunks = tile_count(T, n, chunk, packed)
    tiles = tile_count(T, n, limits.TILE, packed) * cdiv(total, columns)
    splits = k_blocks if fused else split_k(tiles, k, block, programs)
    mix_tiles = tile_count(T, n, limits.MIX_TILE, packed)
    float32, int32 = dict(dtype=torch.float32, device=g.device), dict(dtype=torch.int32, device=g.device)
    dh = empty_like_if(need.p, h)
    dB = [empty_like_if(needed, b) for needed, b in zip(need_B, B, strict=True)]
    dI = [empty_like_if(need_importance, i) for i in importance]
    dslot_weights = empty_like_if(need_slot_weights, h if slot_weights is None else slot_weights)
    shape = (k, RP) if fused else (RP, _up_to_8(k))
    banks = [
        dict(
            E=b.shape[0],
            B=b,
            importance=importance[i] if importance else None,
            padded=_padded(b, (b.shape[0], *shape), dtype, transposed=not fused) if need.p else None,
            trained=trained[i] if trained else None,
            dB=dB[i] if need_B[i] else None,
            dimportance=dI[i] if need_importance else None,
        )
        for i, b in enumerate(B)
    ]
    fields = layout(
        dtype,
        T,
        n,
        banks,
        slots,
        r,
        down < slots,
        ids=ids,
        slot_weights=slot_weights,
        mix=mix,
        scaling=scaling,
        cu_seqlens=cu_seqlens,
    )
    rank_space = (mix_tiles, len(B), slots, r)
    fields |= dict(
        k=k,
        need_p=need.p,
        need_dw=need.dw,
        need_slot_weights=need_slot_weights,
        need_importance=need_importance,
        fused_p_and_dB=fused,
        columns=columns,
        split_k=splits,
        chunk=chunk,
        chunks=chunks,
        g=g,
        h=h,
        w=w,
        scores=scores,
        u=torch.empty((T, total), dtype=dtype, device=g.device) if any(need_B) else None,
        p_part=torch.empty((splits, T, total), **float32) if need.p else None,
        B_part=torch.empty((chunks, total // 16, k, 16), **float32) if any(need_B) else None,
        chunk_to_seq=torch.empty(chunks, **int32),
        dw_part=torch.empty(rank_space, **float32) if need.dw else None,
        dweights_part=torch.empty(rank_space, **float32) if need_slot_weights else None,
        tile_to_seq=torch.empty(mix_tiles, **int32),
        dw=h.new_empty((sum(b.shape[0] for b in B), r)) if need.dw else None,
        dh=dh,
        dslot_weights=dslot_weights,
    )
    run_pass("grad_output", g, fields)
    return dh if need_dh else dh.new_empty(0), dB, dI, dslot_weights, h.new_empty(0)


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
    """Go from dh to dx, and to the gradients of A."""
    (T, _, down, r), n, d, RP = dh.shape, num_seqs, A[0].shape[2], padded_rank16(dh.shape[3])
    limits, packed, programs = cuda_build.extension, cu_seqlens is not None, RESIDENT * card_of(dh.device).processors
    shared = down_slots(A, 0) == 1
    slots, total = down if ids is None else ids.shape[2], len(A) * down * RP
    block = limits.OUTER_TILES * limits.ROW // dtype.itemsize
    chunk = chunk_tokens(T, n, cdiv(d, block), limits.CHUNK, programs)
    chunks = tile_count(T, n, chunk, packed)
    dx = dh.new_empty((T, d) if need_dx else 0, dtype=dtype)
    dA = [empty_like_if(needed, a) for needed, a in zip(need_A, A, strict=True)]
    banks = [
        dict(
            E=a.shape[0],
            dropout_stream=streams[i],
            A=a,
            padded=dh.new_empty((a.shape[0], d, RP), dtype=dtype) if need_dx else None,
            trained=trained[i] if trained else None,
            dA=dA[i] if need_A[i] else None,
        )
        for i, a in enumerate(A)
    ]
    fields = layout(
        dtype, T, n, banks, slots, r, shared, ids=ids, cu_seqlens=cu_seqlens, seed=seed, threshold=threshold
    )
    fields |= dict(
        d=d,
        need_dx=need_dx,
        need_A=any(need_A),
        slices=split_k(tile_count(T, n, limits.TILE, packed), d, 256, programs),
        chunk=chunk,
        chunks=chunks,
        x=x,
        dh=dh,
        route_mask=route_mask,
        dmean=dmean,
        u=dh.new_empty((T, total), dtype=dtype),
        A_part=dh.new_empty((chunks, total, d)) if any(need_A) else None,
        chunk_to_seq=dh.new_empty(chunks, dtype=torch.int32),
        dx=dx,
    )
    run_pass("grad_input", dh, fields)
    if need_dx and base_weight is not None:
        dx.addmm_(g, base_weight)
    return dx, dA, dh.new_empty(0)


# -------------------------------------------------------------------------------------------------------- one token


def decodes(
    x: Tensor,
    num_seqs: int,
    cu_seqlens: Tensor | None,
    threshold: int,
    banks: Sequence[Bank],
    slots: int,
    routers: Sequence[Router],
    mix: str,
) -> bool:
    """Tell whether `decode` can take a forward: one token a sequence, without dropout and without gradients."""
    one_token = x.shape[0] == num_seqs and cu_seqlens is None and 0 < num_seqs <= MAX_DECODE_SEQS
    if not one_token or threshold or torch.is_grad_enabled() or any(router.weight.dim() != 2 for router in routers):
        return False
    experts, r, limits = sum(bank.B.shape[0] for bank in banks), banks[0].B.shape[2], cuda_build.extension
    return (
        experts <= MAX_DECODE_EXPERTS
        and max(num_seqs * len(banks), experts) * slots <= limits.DECODE_ROUTES
        and (mix != "smolora" or experts * r <= limits.DECODE_WEIGHTS)
        and len(banks) * slots * padded_rank16(r) + MAX_DECODE_OUTPUTS <= limits.DECODE_MIXED
    )


def decode(
    x: Tensor,
    num_seqs: int,
    route_mask: Tensor | None,
    instruction: Tensor | None,
    ids: list[Tensor],
    slot_weights: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    importance: list[Tensor],
    routers: list[Tensor],
    router_reads_x: list[bool],
    base_weight: list[Tensor | None],
    base_bias: list[Tensor | None],
    top_k: int,
    gate: str,
    scaling: float,
    mix: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Run P projections of one token a sequence: in one launch, after their bases' products.

    Where a graph is captured, the half that reads x and weights alone is a branch of it beside the bases' products, and
    the other half, which adds to y, is a launch after them. Elsewhere a second launch would cost more than it saves.

    Arguments are those of `route_shrink` and `fuse_expand`, with a list where projections differ. The right operand of
    the up-projection stays in float32 here.

    Args:
        ids, slot_weights: one a projection. If empty, it routes here, or has all experts in order, with weights of 1.
        A, B, importance, routers: the projections one after another, the banks of each within.
        router_reads_x: of each bank, the same in all projections.
        base_weight, base_bias: of each projection; None where y is the mixture's alone.

    Returns:
        y, ids, slot_weights, logits and scores, each a list with one tensor a projection; empty if it is not made.
    """
    n, d = x.shape
    b = len(A) // len(base_weight)
    routes = bool(routers)
    results, calls = [], []
    for i, weight in enumerate(base_weight):
        own = slice(i * b, i * b + b)
        k, r, E = B[own][0].shape[1], A[own][0].shape[1], sum(each.shape[0] for each in B[own])
        slots = num_slots(ids[i] if ids else None, B[own], top_k if routes else 0)
        routed_ids, routed_weights, logits = new_routing(x, n, B[own], top_k, routes)
        scores = logits.new_empty(n if mix == "smolora" else 0)
        results.append((routed_ids, routed_weights, logits, scores))
        banks = [
            dict(
                E=B[j].shape[0],
                A=A[j],
                B=B[j],
                importance=importance[j] if importance else None,
                router=routers[j] if routes else None,
                router_reads_x=routes and router_reads_x[j - own.start],
            )
            for j in range(own.start, own.stop)
        ]
        shared = down_slots(A[own], 0) == 1
        d_slices, outputs = cdiv(d, cuda_build.extension.DECODE_INPUTS), decode_outputs(k)
        fields = layout(
            x.dtype,
            n,
            n,
            banks,
            slots,
            r,
            shared,
            ids=ids[i].contiguous() if ids else None,
            slot_weights=slot_weights[i].to(scores.dtype).contiguous() if slot_weights else None,
            mix=mix,
            scaling=scaling,
        )
        fields |= dict(
            routes=routes,
            gate_all=gate == "all",
            d=d,
            k=k,
            e=0 if instruction is None else instruction.shape[1],
            x=x,
            route_mask=route_mask,
            instruction=instruction,
            routed_ids=routed_ids,
            routed_weights=routed_weights,
            logits=logits,
            add=weight is not None,
            outputs=outputs,
            scores=scores,
            h_part=scores.new_empty((d_slices, n, b if shared else E, r)),
            z_part=scores.new_empty((d_slices, n, E)) if routes else None,
            z=scores.new_empty((n, E)) if routes else None,
            w_part=scores.new_empty((cdiv(k, outputs), E, r)) if mix == "smolora" else None,
        )
        calls.append(fields)
    forked = any(weight is not None for weight in base_weight) and in_capture(x)
    with beside(x) if forked else nullcontext() as branch:
        if forked:
            run_pass("decode", x, *(fields | dict(half=FIRST_HALF) for fields in calls))
    y = [
        x.new_empty((n, fields["k"])) if weight is None else torch.nn.functional.linear(x, weight, bias)
        for fields, weight, bias in zip(calls, base_weight, base_bias, strict=True)
    ]
    if branch is not None:
        torch.cuda.current_stream(x.device).wait_stream(branch)
    half = SECOND_HALF if forked else BOTH_HALVES
    run_pass("decode", x, *(fields | dict(half=half, y=out) for fields, out in zip(calls, y, strict=True)))
    return y, *map(list, zip(*results, strict=True))


def in_capture(x: Tensor) -> bool:
    """Tell whether what is launched for a tensor becomes a part of a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@contextmanager
def beside(x: Tensor) -> Iterator[torch.cuda.Stream]:
    """Launch what is inside on a stream of its own, from here on; yield that stream."""
    branch = _branch(x.device)
    branch.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(branch):
        yield branch


@cache
def _branch(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
