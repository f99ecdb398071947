"""x -> routes and h, with one read of x. docs/architecture.md explains the symbols.

Kernels, in the order they run (`shrink_kernel`, the pass over x, is in products.py):

    route_instruction_and_w_kernel  routers of the instruction, routed tokens, and partial sums of w = s B^T I
    router_logits_kernel            the mean of x over routed tokens, and partial logits of the routers of x
    choose_kernel                   the slots that the routers of x choose
    reduce_split_k_kernel           h of the chosen slots, token logits, and w

A router of x decides only when all of a sequence has been read, so one pass computes all experts of its bank. When they
have too many columns for that, a first pass takes the column sums alone and a second one the chosen experts. A route
must not depend on batch or padding: tiles are laid from a sequence's first routed token, and all sums over tokens and
columns run in an order that only the sequence and the layer set.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import card_of, cdiv, next_power_of_2, tile_count
from ..spec import down_slots, has_own_importance, new_masks, new_rank_space, new_routing, num_slots
from . import tiles
from .dropout import draw_masks
from .primitives import choose_top_k, first_tile, sequences, slot_experts, slots_and_ranks, tile_span, to_int64
from .products import shrink

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def find_routed(i_n, route_mask_ptr, cu_seqlens_ptr, seq_len, BS: tl.constexpr):
    """Return a sequence's first routed token, counted from its start, and how many there are."""
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + i_n).to(tl.int64)
        length = tl.load(cu_seqlens_ptr + i_n + 1).to(tl.int64) - start
    else:
        start = to_int64(i_n) * seq_len
        length = to_int64(seq_len)
    first = to_int64(0)
    count = length
    if route_mask_ptr is not None:
        first = length
        count = to_int64(0)
        for s in range(0, length, BS):
            o_s = s + tl.arange(0, BS)
            b_m = tl.load(route_mask_ptr + start + o_s, mask=o_s < length, other=0) != 0
            count += tl.sum(b_m.to(tl.int64), 0)
            first = tl.minimum(first, tl.min(tl.where(b_m, o_s, length), 0))
    return first, count


@triton.jit
def task_router(router_ptr, router_rows_ptr, i_n, size, TASKS: tl.constexpr):
    """Return a pointer to a sequence's router: the only one, or that of its task."""
    if TASKS:
        router_ptr += tl.load(router_rows_ptr + i_n) * size
    return router_ptr


@triton.jit(do_not_specialize=["num_seqs", "seq_len"])
def route_instruction_and_w_kernel(
    instruction_ptr,  # (n, e) or None
    router_ptrs,  # (E, e), or (tasks, E, e), of the banks that do not read x; None: nothing is routed
    router_rows_ptr,  # (n,) or None
    route_mask_ptr,  # (T,) bool or None
    cu_seqlens_ptr,  # (n + 1,) or None
    routed_ptr,  # (n, 2) out: the first routed token, and how many there are; None: no router reads x
    ids_ptr,  # (n, b, K) out
    slot_weights_ptr,  # (n, b, K) out
    logits_ptr,  # (n, TOTAL) out
    B_ptrs,  # (E, k, R); None: there is no w
    importance_ptrs,  # (k,), or (E, k)
    w_part_ptr,  # (parts of k, TOTAL, R) out
    num_seqs,
    seq_len,
    instruction_dim,
    k,
    scaling,
    BANKS: tl.constexpr,
    EXPERTS: tl.constexpr,  # of each bank
    PADDED: tl.constexpr,  # the same, as powers of two
    FIRST: tl.constexpr,  # of each bank, where its experts begin when they are counted through
    TOTAL: tl.constexpr,
    READS_X: tl.constexpr,  # of each bank's router
    TASKS: tl.constexpr,  # of each bank's router, whether there is one a task
    OWN_I: tl.constexpr,  # whether each expert has an importance vector of its own
    GATE_ALL: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    BE: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    ROUND: tl.constexpr,  # dtype that B and I are rounded to
):
    """Grid (n if routed + TOTAL * parts of k if w,): a program for a sequence, then one for a part of an expert's w."""
    pid = tl.program_id(0)
    if pid < num_seqs:
        if routed_ptr is not None:
            first, count = find_routed(pid, route_mask_ptr, cu_seqlens_ptr, seq_len, BS)
            tl.store(routed_ptr + pid * 2, first)
            tl.store(routed_ptr + pid * 2 + 1, count)
        if router_ptrs is not None:
            o_j = tl.arange(0, KP)
            for bank in tl.static_range(BANKS):
                if not READS_X[bank]:
                    size = EXPERTS[bank] * instruction_dim
                    p_router = task_router(router_ptrs[bank], router_rows_ptr, pid, size, TASKS[bank])
                    o_n = tl.arange(0, PADDED[bank])
                    b_z = tl.full(o_n.shape, 0.0, tl.float32)
                    for e in range(0, instruction_dim, BE):
                        o_e = e + tl.arange(0, BE)
                        m_e = o_e < instruction_dim
                        p_i = instruction_ptr + to_int64(pid) * instruction_dim + o_e
                        b_e = tl.load(p_i, mask=m_e, other=0).to(tl.float32)
                        p_r = p_router + o_n[:, None] * instruction_dim + o_e[None, :]
                        b_r = tl.load(p_r, mask=(o_n[:, None] < EXPERTS[bank]) & m_e[None, :], other=0).to(tl.float32)
                        b_z += tl.sum(b_r * b_e[None, :], 1)
                    b_id, b_q = choose_top_k(b_z, EXPERTS[bank], PADDED[bank], K, KP, GATE_ALL)
                    o_slot = (pid * BANKS + bank) * K + o_j
                    tl.store(ids_ptr + o_slot, b_id, mask=o_j < K)
                    tl.store(slot_weights_ptr + o_slot, b_q, mask=o_j < K)
                    tl.store(logits_ptr + pid * TOTAL + FIRST[bank] + o_n, b_z, mask=o_n < EXPERTS[bank])
    else:
        if B_ptrs is not None:
            o_k = (pid - num_seqs) // TOTAL * BK + tl.arange(0, BK)
            o_r = tl.arange(0, RP)
            m_b = (o_k[:, None] < k) & (o_r[None, :] < R)
            for bank in tl.static_range(BANKS):
                expert = (pid - num_seqs) % TOTAL - FIRST[bank]
                if (expert >= 0) & (expert < EXPERTS[bank]):
                    p_b = B_ptrs[bank] + to_int64(expert) * k * R + o_k[:, None].to(tl.int64) * R + o_r[None, :]
                    b_b = tl.load(p_b, mask=m_b, other=0).to(ROUND).to(tl.float32)
                    p_i = importance_ptrs[bank] + (to_int64(expert) * k if OWN_I else 0) + o_k
                    b_i = tl.load(p_i, mask=o_k < k, other=0).to(ROUND).to(tl.float32)
                    b_w = scaling * tl.sum(b_b * b_i[:, None], 0)
                    tl.store(w_part_ptr + to_int64(pid - num_seqs) * R + o_r, b_w, mask=o_r < R)


@triton.jit(do_not_specialize=["seq_len"])
def router_logits_kernel(
    sums_ptr,  # (tiles, d)
    routed_ptr,  # (n, 2)
    router_ptrs,  # (E, d), or (tasks, E, d), of the banks that read x
    router_rows_ptr,  # (n,) or None
    cu_seqlens_ptr,  # (n + 1,) or None
    mean_ptr,  # (n, d) out
    z_part_ptr,  # (n, slices, TOTAL) out
    seq_len,
    d,
    BANKS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    FIRST: tl.constexpr,
    TOTAL: tl.constexpr,
    READS_X: tl.constexpr,
    TASKS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    EXTRA_TILES: tl.constexpr,
):
    """Grid (n, slices of d): the mean of a sequence's routed tokens over a slice of BD columns, and its logits."""
    i_n = tl.program_id(0)
    i_d = tl.program_id(1)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < d
    first = first_tile(i_n, cu_seqlens_ptr, seq_len, BT, EXTRA_TILES)
    length = seq_len
    if cu_seqlens_ptr is not None:
        length = tl.load(cu_seqlens_ptr + i_n + 1) - tl.load(cu_seqlens_ptr + i_n)
    offset = ((BT - tl.load(routed_ptr + i_n * 2) % BT) % BT).to(tl.int32)
    b_sum = tl.zeros([BD], tl.float32)
    for tile in range(first, first + tl.cdiv(length + offset, BT)):
        b_sum += tl.load(sums_ptr + to_int64(tile) * d + o_d, mask=m_d, other=0)
    b_mean = b_sum / tl.maximum(tl.load(routed_ptr + i_n * 2 + 1), 1).to(tl.float32)
    tl.store(mean_ptr + to_int64(i_n) * d + o_d, b_mean, mask=m_d)
    p_z = z_part_ptr + (i_n * tl.num_programs(1) + i_d) * TOTAL
    for bank in tl.static_range(BANKS):
        if READS_X[bank]:
            p_router = task_router(router_ptrs[bank], router_rows_ptr, i_n, EXPERTS[bank] * d, TASKS[bank])
            o_n = tl.arange(0, PADDED[bank])
            p_r = p_router + o_n[:, None].to(tl.int64) * d + o_d[None, :]
            b_r = tl.load(p_r, mask=(o_n[:, None] < EXPERTS[bank]) & m_d[None, :], other=0).to(tl.float32)
            tl.store(p_z + FIRST[bank] + o_n, tl.sum(b_r * b_mean[None, :], 1), mask=o_n < EXPERTS[bank])


@triton.jit(do_not_specialize=["slices"])
def choose_kernel(
    z_part_ptr,  # (n, slices, TOTAL)
    ids_ptr,  # (n, b, K) out
    slot_weights_ptr,  # (n, b, K) out
    logits_ptr,  # (n, TOTAL) out
    slices,
    BANKS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    FIRST: tl.constexpr,
    TOTAL: tl.constexpr,
    READS_X: tl.constexpr,
    GATE_ALL: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
):
    """Grid (n,): the slots of a sequence from the partial logits of the routers that read x."""
    i_n = tl.program_id(0)
    o_j = tl.arange(0, KP)
    for bank in tl.static_range(BANKS):
        if READS_X[bank]:
            o_n = tl.arange(0, PADDED[bank])
            m_n = o_n < EXPERTS[bank]
            b_z = tl.full(o_n.shape, 0.0, tl.float32)
            for i in range(0, slices):
                b_z += tl.load(z_part_ptr + (i_n * slices + i) * TOTAL + FIRST[bank] + o_n, mask=m_n, other=0)
            b_id, b_q = choose_top_k(b_z, EXPERTS[bank], PADDED[bank], K, KP, GATE_ALL)
            o_slot = (i_n * BANKS + bank) * K + o_j
            tl.store(ids_ptr + o_slot, b_id, mask=o_j < K)
            tl.store(slot_weights_ptr + o_slot, b_q, mask=o_j < K)
            tl.store(logits_ptr + i_n * TOTAL + FIRST[bank] + o_n, b_z, mask=m_n)


@triton.jit(do_not_specialize=["num_tiles", "T", "num_seqs", "seq_len", "split_k", "w_parts"])
def reduce_split_k_kernel(
    part_ptrs,  # (split_k, T, slots * R)
    logits_part_ptr,  # (split_k, T, Z) or None
    ids_ptr,  # (n, b, K) or None
    w_part_ptr,  # (w_parts, TOTAL, R) or None
    cu_seqlens_ptr,  # (n + 1,) or None
    h_ptr,  # (T, b, DOWN, R) out
    token_logits_ptr,  # (T, Z) out, or None
    w_ptr,  # (TOTAL, R) out
    num_tiles,
    T,
    num_seqs,
    seq_len,
    split_k,
    w_parts,
    scale,  # of what dropout keeps
    BANKS: tl.constexpr,
    SLOTS: tl.constexpr,  # of each bank's partial results
    CHOOSE: tl.constexpr,  # of each bank: they are all experts, of which the ids choose
    TOTAL: tl.constexpr,
    GROUP: tl.constexpr,  # parts that are loaded at once
    K: tl.constexpr,
    DOWN: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    Z: tl.constexpr,
    ZP: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Grid (tiles + TOTAL if w,): a program adds the parts of a tile's h and logits, or those of an expert's w."""
    pid = tl.program_id(0)
    if pid < num_tiles:
        i_n, start, end = tile_span(pid, cu_seqlens_ptr, num_seqs, seq_len, BT)
        rows = start + tl.arange(0, BT)
        inside = rows < end
        for block in tl.static_range(BLOCKS):
            slot, rank = slots_and_ranks(block, BC, RP)
            m_c = inside[:, None] & ((slot < DOWN) & (rank < R))[None, :]
            for bank in tl.static_range(BANKS):
                source = slot
                if CHOOSE[bank]:
                    source = slot_experts(ids_ptr, i_n, bank, slot, BANKS, K)
                b_h = tl.zeros([BT, BC], tl.float32)
                for s in range(0, split_k, GROUP):
                    for i in tl.static_range(GROUP):
                        p_part = part_ptrs[bank] + (rows[:, None] + to_int64(s + i) * T) * (SLOTS[bank] * R)
                        b_h += tl.load(p_part + (source * R + rank)[None, :], mask=m_c & (s + i < split_k), other=0)
                p_h = h_ptr + rows[:, None] * (BANKS * DOWN * R) + (bank * DOWN * R + slot * R + rank)[None, :]
                tl.store(p_h, b_h * scale, mask=m_c)
        if logits_part_ptr is not None:
            o_z = tl.arange(0, ZP)
            m_z = inside[:, None] & (o_z < Z)[None, :]
            b_z = tl.zeros([BT, ZP], tl.float32)
            for s in range(0, split_k, GROUP):
                for i in tl.static_range(GROUP):
                    p_part = logits_part_ptr + (rows[:, None] + to_int64(s + i) * T) * Z + o_z[None, :]
                    b_z += tl.load(p_part, mask=m_z & (s + i < split_k), other=0)
            tl.store(token_logits_ptr + rows[:, None] * Z + o_z[None, :], b_z, mask=m_z)
    else:
        if w_part_ptr is not None:
            o_r = tl.arange(0, RP)
            b_w = tl.zeros([RP], tl.float32)
            for i in range(0, w_parts):
                b_w += tl.load(w_part_ptr + (i * TOTAL + pid - num_tiles) * R + o_r, mask=o_r < R, other=0)
            tl.store(w_ptr + (pid - num_tiles) * R + o_r, b_w, mask=o_r < R)


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
    """Route and shrink; arguments and results as in `smolora.engine.torch_passes.route_shrink`."""
    (T, d), n, banks = x.shape, num_seqs, len(A)
    r, k, K = A[0].shape[1], B[0].shape[1], num_slots(ids, B, top_k)
    RP, KP, down = tiles.padded_rank(r), next_power_of_2(K), down_slots(A, K)
    experts = [b.shape[0] for b in B]
    total, routed_here = sum(experts), bool(routers)
    reads_x = router_reads_x if routed_here else [False] * banks
    card = card_of(x.device)
    h, w, token_logits = new_rank_space(x, A, B, K, mix, token_router)
    mean = x.new_empty((n, d) if any(reads_x) else (0, 0), dtype=torch.float32)
    routed_ids, slot_weights, logits = new_routing(x, n, B, top_k, routed_here)
    chosen = routed_ids if routed_here else ids
    shared = all(a.shape[0] == 1 for a in A)
    seqs = sequences(T, n, cu_seqlens, alike=not routed_here and (ids is None or shared))
    bank_constants = dict(
        BANKS=banks,
        EXPERTS=tuple(experts),
        PADDED=tuple(max(2, next_power_of_2(e)) for e in experts),
        FIRST=tuple(accumulate([0, *experts[:-1]])),
        TOTAL=total,
        READS_X=tuple(reads_x),
    )
    routing = dict(router_ptrs=tuple(routers), router_rows_ptr=router_rows) if routed_here else {}
    tasks = tuple(router.dim() == 3 for router in routers)

    routed = torch.empty((n, 2), dtype=torch.int64, device=x.device) if any(reads_x) else None
    BK = tiles.w_rows(r)
    w_parts = cdiv(k, BK) if mix == "smolora" else 0
    w_part = torch.empty((w_parts, total, r), dtype=torch.float32, device=x.device) if w_parts else None
    programs = (n if routed_here else 0) + total * w_parts
    if programs:
        route_instruction_and_w_kernel[(programs,)](
            instruction_ptr=instruction,
            router_ptrs=tuple(routers) or None,
            router_rows_ptr=router_rows,
            route_mask_ptr=None if route_mask is None else route_mask.view(torch.uint8),
            cu_seqlens_ptr=cu_seqlens,
            routed_ptr=routed,
            ids_ptr=routed_ids,
            slot_weights_ptr=slot_weights,
            logits_ptr=logits,
            B_ptrs=tuple(B) if w_parts else None,
            importance_ptrs=tuple(importance) or None,
            w_part_ptr=w_part,
            num_seqs=n if routed_here else 0,
            seq_len=seqs.seq_len,
            instruction_dim=0 if instruction is None else instruction.shape[1],
            k=k,
            scaling=scaling,
            **bank_constants,
            TASKS=tasks,
            OWN_I=has_own_importance(importance),
            GATE_ALL=gate == "all",
            K=K,
            KP=KP,
            R=r,
            RP=RP,
            BE=128,
            BS=1024,
            BK=BK,
            ROUND=DTYPES[x.dtype],
            **tiles.SMALL,
        )

    if x.dtype != torch.float32 and T > n:  # every tile of tokens reads A; a step of decoding has only one
        A = [a.to(x.dtype) for a in A]

    # fused routing: one pass over x computes all experts of the banks that x routes, as slots are known only after it
    routed_by_x = [reads and not shared for reads in reads_x]
    widest = max((e * RP for e, by_x in zip(experts, routed_by_x, strict=True) if by_x), default=0)
    fused_routing = widest <= tiles.MAX_FUSED_ROUTING_COLUMNS
    all_experts = [by_x and fused_routing for by_x in routed_by_x]
    by_id = [chosen is not None and not shared and not whole for whole in all_experts]
    slots = [e if whole else down for e, whole in zip(experts, all_experts, strict=True)]
    masks = draw_masks(new_masks(x, streams, d), seed, streams, threshold) if threshold else None
    pass_over_x = dict(r=r, strides=(r * d, d, 1), token_router=token_router, masks=masks)
    if any(reads_x):
        sums_too = dict(routed=routed, route_mask=route_mask)
        if fused_routing:
            shrunk = shrink(x, A, slots, by_id, chosen, seqs, **pass_over_x, **sums_too)
        else:
            shrunk = shrink(x, [], [], [], None, seqs, r=r, strides=(0, 0, 0), num_columns=K, **sums_too)
        BD = 512
        slices = cdiv(d, BD)
        z_part = torch.empty((n, slices, total), dtype=torch.float32, device=x.device)
        if n:
            router_logits_kernel[(n, slices)](
                sums_ptr=shrunk.sums,
                routed_ptr=routed,
                **routing,
                cu_seqlens_ptr=cu_seqlens,
                mean_ptr=mean,
                z_part_ptr=z_part,
                seq_len=seqs.seq_len,
                d=d,
                **bank_constants,
                TASKS=tasks,
                BT=shrunk.tile_tokens,
                BD=BD,
                EXTRA_TILES=1 if route_mask is None else 2,
                **tiles.SMALL,
            )
            choose_kernel[(n,)](
                z_part_ptr=z_part,
                ids_ptr=routed_ids,
                slot_weights_ptr=slot_weights,
                logits_ptr=logits,
                slices=slices,
                **bank_constants,
                GATE_ALL=gate == "all",
                K=K,
                KP=KP,
                num_warps=1,
            )
    if not (any(reads_x) and fused_routing):
        shrunk = shrink(x, A, slots, by_id, chosen, seqs, **pass_over_x)

    tile = tiles.choose_tile("reduce_split_k", r, down, x.dtype, card.capability)
    num_tiles = tile_count(T, seqs.num_seqs, tile.BT, seqs.packed)
    programs = num_tiles + (total if w_parts else 0)
    if programs:
        Z = token_logits.shape[1]
        reduce_split_k_kernel[(programs,)](
            part_ptrs=shrunk.parts,
            logits_part_ptr=shrunk.logits_part,
            ids_ptr=chosen if any(all_experts) else None,
            w_part_ptr=w_part,
            h_ptr=h,
            token_logits_ptr=token_logits if Z else None,
            w_ptr=w,
            num_tiles=num_tiles,
            T=T,
            **seqs.arguments(),
            split_k=shrunk.split_k,
            w_parts=w_parts,
            scale=256 / (256 - threshold),
            BANKS=banks,
            SLOTS=tuple(slots),
            CHOOSE=tuple(all_experts),
            TOTAL=total,
            GROUP=max(1, 4096 // (tile.BT * tile.BC)),  # in at most 32 registers of 128 threads
            K=K,
            DOWN=down,
            R=r,
            RP=RP,
            Z=Z,
            ZP=max(16, next_power_of_2(Z)),
            BT=tile.BT,
            BC=tile.BC,
            BLOCKS=cdiv(next_power_of_2(down) * RP, tile.BC),
            **tile.options(),
        )
    mean = mean if need_mean else mean.new_empty((0, 0))
    masks = x.new_empty(0, dtype=torch.int32) if masks is None else masks
    return h, w, routed_ids, slot_weights, logits, mean, token_logits, masks
