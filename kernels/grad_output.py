"""g = dL/dy -> dh, dB, dI, and the gradients of slot weights and scores. docs/architecture.md explains the symbols.

Kernels, in the order they run:

    grad_output_kernel          the pass over g: partial p, and partial dB, summed over a chunk of tokens
    mix_backward_kernel         dh and dscores from p; per-tile partial sums of dw and of dslot_weights
    reduce_dw_dweights_kernel   dw of every expert, and the slot weights' gradient of every sequence
    reduce_dB_kernel            dB of every expert: the sum over tokens, from the chunks' parts; and dI

p is a sum over k, and dB one over tokens. Each program owns a block of k and a chunk of one sequence's tokens. It keeps
its part of dB in registers and writes its part of p. If the slots have too many columns for that, `shrink_kernel`
computes p (g in place of x, B in place of A), and this kernel only dB, with one program for each column block.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import card_of, cdiv, chunk_tokens, next_power_of_2, part_rounds, tile_count
from ..spec import empty_like_if, grad_needs, has_own_importance, num_slots
from . import tiles
from .mixes import MIXES
from .primitives import load_slot_weights, sequences, slot_experts, tile_span, to_int64, trained_columns
from .products import chunks_at_once, load_h, shrink, sum_chunks, sum_p


@triton.jit(do_not_specialize=["T", "num_seqs", "seq_len", "chunk_size", "first_chunk"])
def grad_output_kernel(
    g_ptr,  # (T, k)
    h_ptr,  # (T, b, DOWN, R)
    ids_ptr,  # (n, b, K) or None
    slot_weights_ptr,  # (n, b, K) or None
    scores_ptr,  # (T, K) or (T,), or None
    B_ptrs,  # (E, k, R)
    trained_ptrs,  # bool (E,), or None
    cu_seqlens_ptr,  # (n + 1,) or None
    p_part_ptr,  # (blocks of k, T, b, K, R) out, or None
    B_part_ptr,  # (chunks of this launch, b, K, k, R) out
    chunk_to_seq_ptr,  # (chunks,) out: the chunk's sequence, -1 if it has no token
    T,
    num_seqs,
    seq_len,
    chunk_size,
    first_chunk,
    k,
    scaling,
    STATE: tl.constexpr,  # the functions of the mix
    SHARE: tl.constexpr,
    NEED_B: tl.constexpr,  # of each bank
    ANY_B: tl.constexpr,
    BANKS: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    DOWN: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,  # of each bank
    WIDE: tl.constexpr,  # of all banks, BC * BANKS or more
):
    """Grid (chunks * blocks of k, column blocks): `chunk_size` tokens of one sequence by BK outputs.

    The banks' columns lie side by side, so that a product reads its left operand, a tile of g, once for all of them.
    p is computed only with a single column block.
    """
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    k_blocks = tl.cdiv(k, BK)
    i_k = tl.program_id(0) % k_blocks
    part = tl.program_id(0) // k_blocks
    chunk = first_chunk + part
    block = tl.program_id(1)
    i_n, start, end = tile_span(chunk, cu_seqlens_ptr, num_seqs, seq_len, chunk_size)
    if i_k == 0 and block == 0:
        tl.store(chunk_to_seq_ptr + chunk, tl.where(start < end, i_n, -1))
    if start >= end:
        return
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < k
    o_w = tl.arange(0, WIDE)
    bank_w = o_w // BC
    if BC >= RP:  # said so that Triton sees contiguous columns
        slot_w = block * (BC // RP) + o_w % BC // RP
        rank_w = o_w % RP
    else:
        slot_w = tl.zeros([WIDE], tl.int32) + block * BC // RP
        rank_w = block * BC % RP + o_w % BC
    WHOLE: tl.constexpr = (R == RP) & (K == KP) & (BANKS * BC == WIDE)  # no column is padding
    m_w = (bank_w < BANKS) & (slot_w < K) & (rank_w < R)
    o_slot = bank_w * K + slot_w

    if p_part_ptr is not None:
        b_up = load_B(B_ptrs[0], ids_ptr, i_n, slot_w, rank_w, o_k, k, m_w & (bank_w == 0), 0, BANKS, K, R)
        for bank in tl.static_range(1, BANKS):  # only one of the masks loads an element
            m_b = m_w & (bank_w == bank)
            b_up += load_B(B_ptrs[bank], ids_ptr, i_n, slot_w, rank_w, o_k, k, m_b, bank, BANKS, K, R)
        b_up = b_up.to(dtype)  # [BK, WIDE]
    if slot_weights_ptr is None:
        b_q = tl.full([WIDE], 1.0, tl.float32)
    else:
        b_q = tl.load(slot_weights_ptr + i_n * (BANKS * K) + o_slot, mask=m_w, other=0)
    m_dB = m_w & (bank_w < 0)
    for bank in tl.static_range(BANKS):
        if NEED_B[bank]:
            m_dB = m_dB | (m_w & (bank_w == bank) & trained_columns(trained_ptrs, ids_ptr, i_n, bank, slot_w, BANKS, K))
    trains = ANY_B
    if trained_ptrs is not None:
        trains = trains & (tl.max(m_dB.to(tl.int32), 0) > 0)
        if p_part_ptr is None:
            if not trains:
                return

    o_h = bank_w * (DOWN * R) + rank_w
    if DOWN > 1:
        o_h += slot_w * R
    b_dB = tl.zeros([BK, WIDE], tl.float32)
    for t in range(start, end, BT):
        rows = t + tl.arange(0, BT)
        inside = tl.arange(0, BT) < tl.minimum(end - t, BT).to(tl.int32)
        m_t = inside[:, None]
        if not WHOLE:
            m_t = m_t & m_w[None, :]
        b_g = tl.load(g_ptr + rows[:, None] * k + o_k[None, :], mask=inside[:, None] & m_k[None, :], other=0)
        if p_part_ptr is not None:
            o_p = (to_int64(i_k) * T + rows)[:, None] * (BANKS * K * R) + (o_slot * R + rank_w)[None, :]
            tl.store(p_part_ptr + o_p, tl.dot(b_g, b_up, input_precision="ieee"), mask=m_t)
        if trains:
            state = STATE(scores_ptr, rows, inside, K, KP)
            b_share = SHARE(state, scores_ptr, rows, inside, slot_w, 0, K)
            for bank in tl.static_range(1, BANKS):
                b_share = tl.where(
                    (bank_w == bank)[None, :], SHARE(state, scores_ptr, rows, inside, slot_w, bank, K), b_share
                )
            b_h = tl.load(h_ptr + rows[:, None] * (BANKS * DOWN * R) + o_h[None, :], mask=m_t, other=0)
            b_u = (b_h * (scaling * b_share) * b_q[None, :]).to(dtype)
            b_dB = tl.dot(tl.trans(b_g), b_u, b_dB, input_precision="ieee")

    if ANY_B:
        p_out = B_part_ptr + ((to_int64(part) * (BANKS * K) + o_slot) * k * R + rank_w)[None, :]
        tl.store(p_out + o_k[:, None].to(tl.int64) * R, b_dB, mask=m_k[:, None] & m_dB[None, :])


@triton.jit
def load_B(
    B_ptr,  # (E, k, R)
    ids_ptr,
    i_n,
    slot,
    rank,
    o_k,
    k,
    mask,
    bank: tl.constexpr,
    BANKS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
):
    """Load a block of a bank's up projections in float32, [BK, BC]; zero in columns outside the mask."""
    expert = slot_experts(ids_ptr, i_n, bank, slot, BANKS, K)
    p_b = B_ptr + (expert.to(tl.int64) * k * R + rank)[None, :] + o_k[:, None].to(tl.int64) * R
    return tl.load(p_b, mask=(o_k < k)[:, None] & mask[None, :], other=0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "num_seqs", "seq_len", "p_parts"])
def mix_backward_kernel(
    p_part_ptrs,  # (p_parts, T, K * R), a row every P_WIDTH numbers
    h_ptr,  # (T, b, DOWN, R)
    w_ptr,  # (sum of E, R)
    ids_ptr,  # (n, b, K) or None
    slot_weights_ptr,  # (n, b, K) or None
    scores_ptr,  # (T, K) or (T,), or None
    cu_seqlens_ptr,  # (n + 1,) or None
    dh_ptr,  # (T, b, DOWN, R) out, as grad_input's products take it
    dscores_ptr,  # (T, K) out, or None
    dw_part_ptr,  # (tiles, b, K, R) out
    dweights_part_ptr,  # (tiles, b, K, R) out, which the next kernel sums over ranks; or None
    tile_to_seq_ptr,  # (tiles,) out: the tile's sequence, -1 if it has no token
    p_parts,
    T,
    num_seqs,
    seq_len,
    scaling,
    STATE: tl.constexpr,  # the functions of the mix
    SHARE: tl.constexpr,
    SCORES_BACKWARD: tl.constexpr,
    FUSE_BACKWARD: tl.constexpr,
    BANKS: tl.constexpr,
    FIRST: tl.constexpr,  # for each bank, the index of its first expert in the concatenated list
    K: tl.constexpr,
    KP: tl.constexpr,
    DOWN: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    P_WIDTH: tl.constexpr,
    KEEP_P: tl.constexpr,  # p of all slots stays in registers between its two uses
    BT: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Grid (tiles,): the gradient of the mix for a tile of tokens, slot by slot, BR ranks at a time."""
    tile = tl.program_id(0)
    i_n, start, end = tile_span(tile, cu_seqlens_ptr, num_seqs, seq_len, BT)
    tl.store(tile_to_seq_ptr + tile, tl.where(start < end, i_n, -1))
    if start >= end:
        return
    rows = start + tl.arange(0, BT)
    inside = rows < end
    state = STATE(scores_ptr, rows, inside, K, KP)

    kept_p = ()  # [BT, BR] each, in the order of the loops below
    if FUSE_BACKWARD is not None:
        b_ph = ()  # [BT] each, the sum of q p . h over a bank
        for bank in tl.static_range(BANKS):
            b_sum = tl.zeros([BT], tl.float32)
            for part in tl.static_range(RP // BR):
                rank = part * BR + tl.arange(0, BR)
                for j in tl.static_range(K):
                    slot = tl.full([1], j, tl.int32)
                    b_p = sum_p(
                        p_part_ptrs[bank], rows, inside, slot, rank, T, p_parts, scaling, P_WIDTH, R, BT, BR, GROUP
                    )
                    if KEEP_P:
                        kept_p = kept_p + (b_p,)
                    b_h = load_h(h_ptr, rows, inside, slot, rank, bank, BANKS, K, DOWN, R)
                    b_q = load_slot_weights(slot_weights_ptr, i_n, bank, slot, BANKS, K)
                    b_sum += tl.sum(b_p * b_h * b_q[None, :], 1)
            b_ph = b_ph + (b_sum,)
        b_delta = FUSE_BACKWARD(state, b_ph)  # [BT] each

    o_slots = tl.arange(0, KP)
    b_dshare = tl.zeros([BT, KP], tl.float32)
    for bank in tl.static_range(BANKS):
        for part in tl.static_range(RP // BR):
            rank = part * BR + tl.arange(0, BR)
            m_h = inside[:, None] & (rank < R)[None, :]
            b_shared = tl.zeros([BT, BR], tl.float32)
            for j in tl.static_range(K):
                slot = tl.full([1], j, tl.int32)
                o_slot = (bank * K + j) * R + rank
                b_q = load_slot_weights(slot_weights_ptr, i_n, bank, slot, BANKS, K)
                if KEEP_P:
                    b_p = kept_p[(bank * (RP // BR) + part) * K + j]
                else:
                    b_p = sum_p(
                        p_part_ptrs[bank], rows, inside, slot, rank, T, p_parts, scaling, P_WIDTH, R, BT, BR, GROUP
                    )
                b_gated = SHARE(state, scores_ptr, rows, inside, slot, bank, K) * b_p
                if FUSE_BACKWARD is not None:
                    expert = slot_experts(ids_ptr, i_n, bank, slot, BANKS, K)
                    b_w = tl.load(w_ptr + (FIRST[bank] + expert) * R + rank, mask=rank < R, other=0)
                    b_gated += b_delta[bank][:, None] * b_w[None, :]
                b_dh = b_gated * b_q[None, :]
                if DOWN == K:
                    o_h = rows[:, None] * (BANKS * DOWN * R) + o_slot[None, :]
                    tl.store(dh_ptr + o_h, b_dh.to(dh_ptr.dtype.element_ty), mask=m_h)
                else:
                    b_shared += b_dh
                if FUSE_BACKWARD is not None or dscores_ptr is not None or dweights_part_ptr is not None:
                    b_h = load_h(h_ptr, rows, inside, slot, rank, bank, BANKS, K, DOWN, R)
                if FUSE_BACKWARD is not None:
                    p_dw = dw_part_ptr + to_int64(tile) * (BANKS * K * R) + o_slot
                    tl.store(p_dw, tl.sum(b_delta[bank][:, None] * b_h, 0) * b_q, mask=rank < R)
                if dweights_part_ptr is not None:
                    p_dq = dweights_part_ptr + to_int64(tile) * (BANKS * K * R) + o_slot
                    tl.store(p_dq, tl.sum(b_gated * b_h, 0), mask=rank < R)
                if dscores_ptr is not None:
                    b_ph_j = tl.sum(b_p * b_h, 1)[:, None] * b_q[None, :]  # [BT, 1]
                    b_dshare += tl.where((o_slots == j)[None, :], b_ph_j, 0.0)
            if DOWN < K:
                o_h = rows[:, None] * (BANKS * R) + (bank * R + rank)[None, :]
                tl.store(dh_ptr + o_h, b_shared.to(dh_ptr.dtype.element_ty), mask=m_h)
    if dscores_ptr is not None:
        b_dscores = SCORES_BACKWARD(state, scores_ptr, rows, inside, b_dshare, K, KP)
        m_s = inside[:, None] & (o_slots < K)[None, :]
        tl.store(dscores_ptr + rows[:, None] * K + o_slots[None, :], b_dscores, mask=m_s)


@triton.jit(do_not_specialize=["num_tiles"])
def reduce_dw_dweights_kernel(
    dw_part_ptr,  # (tiles, b, K, R), or None
    dweights_part_ptr,  # (tiles, b, K, R), or None
    tile_to_seq_ptr,  # (tiles,)
    ids_ptr,  # (n, b, K) or None
    dw_ptr,  # (EXPERTS, R) out
    dweights_ptr,  # (n, b, K) out
    num_tiles,
    EXPERTS: tl.constexpr,  # of all banks; 0 where there is no dw
    FIRST: tl.constexpr,  # for each bank, the index of its first expert in the concatenated list
    BANKS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    TILES: tl.constexpr,
):
    """Grid (EXPERTS + n if there are dweights,): an expert's dw, or the gradients of a sequence's slot weights."""
    pid = tl.program_id(0)
    o_r = tl.arange(0, RP)
    if pid < EXPERTS:
        if dw_part_ptr is not None:
            bank = 0
            first = 0
            for later in tl.static_range(1, BANKS):
                bank = tl.where(pid < FIRST[later], bank, later)
                first = tl.where(pid < FIRST[later], first, FIRST[later])
            b_dw = tl.zeros([RP], tl.float32)
            for t in range(0, num_tiles, TILES):
                o_t = t + tl.arange(0, TILES)
                i_n = tl.load(tile_to_seq_ptr + o_t, mask=o_t < num_tiles, other=-1)
                for j in tl.static_range(K):
                    expert = tl.where(i_n >= 0, j, -1)
                    if ids_ptr is not None:
                        expert = tl.load(ids_ptr + (i_n * BANKS + bank) * K + j, mask=i_n >= 0, other=-1)
                    p_dw = dw_part_ptr + ((o_t.to(tl.int64) * BANKS + bank) * K + j)[:, None] * R + o_r[None, :]
                    m_dw = (expert == pid - first)[:, None] & (o_r < R)[None, :]
                    b_dw += tl.sum(tl.load(p_dw, mask=m_dw, other=0), 0)
            tl.store(dw_ptr + pid * R + o_r, b_dw, mask=o_r < R)
    else:
        if dweights_part_ptr is not None:
            seq = pid - EXPERTS
            for slot in tl.static_range(BANKS * K):
                b_dq = tl.zeros([RP], tl.float32)
                for t in range(0, num_tiles, TILES):
                    o_t = t + tl.arange(0, TILES)
                    own = tl.load(tile_to_seq_ptr + o_t, mask=o_t < num_tiles, other=-1) == seq
                    p_dq = dweights_part_ptr + (o_t.to(tl.int64) * (BANKS * K) + slot)[:, None] * R + o_r[None, :]
                    b_dq += tl.sum(tl.load(p_dq, mask=own[:, None] & (o_r < R)[None, :], other=0), 0)
                tl.store(dweights_ptr + seq * BANKS * K + slot, tl.sum(b_dq, 0))


@triton.jit(do_not_specialize=["chunks"])
def reduce_dB_kernel(
    B_part_ptr,  # (chunks, b, K, k, R)
    sum_ptrs,  # (E, k, R): what is added to the parts; or None
    chunk_to_seq_ptr,  # (chunks,)
    ids_ptr,  # (n, b, K) or None
    dw_ptr,  # (EXPERTS, R), or None
    B_ptrs,  # (E, k, R)
    importance_ptrs,  # (k,), or (E, k); or None
    trained_ptrs,  # bool (E,), or None
    dB_ptrs,  # (E, k, R) out, or None
    dI_ptrs,  # as I, out; or None
    chunks,
    k,
    scaling,
    NEED_B: tl.constexpr,  # of each bank
    EXPERTS: tl.constexpr,  # of each bank
    FIRST: tl.constexpr,  # for each bank, the index of its first expert in the concatenated list
    TOTAL: tl.constexpr,  # experts of all banks whose dB is needed, else 0
    OWN_I: tl.constexpr,  # whether each expert has an importance vector of its own
    BANKS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Grid (blocks of k, TOTAL + vectors of I if dI): dB_e = sum of its parts + s I dw_e^T, and dI = s times B_e dw_e,
    summed over the experts that share I. A program has BK rows of one of them.
    """
    i_k = tl.program_id(0)
    i_e = tl.program_id(1)
    o_r = tl.arange(0, RP)
    if i_e < TOTAL:
        o_e = tl.arange(0, BK * RP)  # as if (k, R) were one axis: R <= RP
        o_b = to_int64(i_k) * (BK * R) + o_e
        m_b = (o_e < BK * R) & (i_k * BK + o_e // R < k)
        for bank in tl.static_range(BANKS):
            if NEED_B[bank]:
                expert = i_e - FIRST[bank]
                if (expert >= 0) & (expert < EXPERTS[bank]):
                    trains = True
                    if trained_ptrs is not None:
                        trains = tl.load(trained_ptrs[bank] + expert) != 0
                    b_dB = sum_chunks(
                        B_part_ptr,
                        chunk_to_seq_ptr,
                        ids_ptr,
                        bank,
                        expert,
                        o_b,
                        m_b,
                        tl.where(trains, chunks, 0),
                        to_int64(k) * R,
                        BANKS,
                        K,
                        BK * RP,
                        GROUP,
                    )
                    o_dB = to_int64(expert) * k * R + o_b
                    if sum_ptrs is not None:
                        b_dB += tl.load(sum_ptrs[bank] + o_dB, mask=m_b, other=0)
                    if dw_ptr is not None:
                        p_i = importance_ptrs[bank] + (to_int64(expert) * k if OWN_I else 0) + i_k * BK + o_e // R
                        b_i = tl.load(p_i, mask=m_b, other=0).to(tl.float32)
                        b_dw = tl.load(dw_ptr + i_e * R + o_e % R, mask=m_b, other=0)
                        b_dB += tl.where(trains, scaling * b_i * b_dw, 0.0)
                    tl.store(dB_ptrs[bank] + o_dB, b_dB.to(dB_ptrs[bank].dtype.element_ty), mask=m_b)
    else:
        if dI_ptrs is not None:
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = o_k < k
            for bank in tl.static_range(BANKS):
                first = i_e - TOTAL - FIRST[bank] if OWN_I else 0
                if ((first >= 0) & (first < EXPERTS[bank])) if OWN_I else i_e - TOTAL == bank:
                    trains = True
                    if OWN_I and trained_ptrs is not None:
                        trains = tl.load(trained_ptrs[bank] + first) != 0
                    b_dI = tl.zeros([BK], tl.float32)
                    for expert in range(first, first + 1 if OWN_I else EXPERTS[bank]):
                        b_dw = tl.load(dw_ptr + (FIRST[bank] + expert) * R + o_r, mask=o_r < R, other=0)
                        p_b = B_ptrs[bank] + to_int64(expert) * k * R + o_k[:, None].to(tl.int64) * R + o_r[None, :]
                        b_b = tl.load(p_b, mask=m_k[:, None] & (o_r < R)[None, :], other=0).to(tl.float32)
                        b_dI += tl.sum(b_b * (scaling * b_dw)[None, :], 1)
                    p_dI = dI_ptrs[bank] + to_int64(first) * k + o_k
                    tl.store(p_dI, tl.where(trains, b_dI, 0.0).to(dI_ptrs[bank].dtype.element_ty), mask=m_k)


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
    """Backward from g = dL/dy; arguments and results as in `smolora.engine.torch_passes.grad_output`.

    dh has the dtype of g, to which `grad_input` would round it: half the bytes for each block of d to read.
    """
    (T, k), (_, banks, down, r) = g.shape, h.shape
    K = num_slots(ids, B, 0)
    need = grad_needs(mix, need_dh, any(need_B), need_importance, need_slot_weights, need_scores)
    functions, experts = MIXES[mix], [b.shape[0] for b in B]
    card, RP, KP = card_of(g.device), tiles.padded_rank(r), next_power_of_2(K)
    seqs = sequences(T, num_seqs, cu_seqlens, alike=ids is None and slot_weights is None)
    tile = tiles.choose_tile("grad_output", r, K, g.dtype, card.capability, "one_bank" if banks == 1 else "")
    blocks = cdiv(KP * RP, tile.BC)
    fused_p_and_dB = blocks == 1 and banks * KP * RP <= tiles.MAX_FUSED_P_AND_DB_COLUMNS
    float32 = dict(dtype=torch.float32, device=g.device)
    int32 = dict(dtype=torch.int32, device=g.device)
    dh = g.new_empty(h.shape if need.p else 0)
    dweights = torch.empty(slot_weights.shape if need_slot_weights else 0, **float32)
    dscores = torch.empty(scores.shape if need_scores else 0, **float32)
    dB = [empty_like_if(needed, b) for needed, b in zip(need_B, B, strict=True)]
    dI = [empty_like_if(need_importance, i) for i in importance]
    own_importance = has_own_importance(importance)
    constants = dict(BANKS=banks, K=K, R=r, RP=RP)
    mix_constants = dict(STATE=functions.state, SHARE=functions.share, KP=KP, DOWN=down, **constants)
    first = tuple(accumulate([0, *experts[:-1]]))

    k_blocks = cdiv(k, tile.BD)
    chunk = chunk_tokens(T, seqs.num_seqs, k_blocks, tile.BT, tile.resident * card.processors)
    chunks = tile_count(T, seqs.num_seqs, chunk, seqs.packed)
    chunk_to_seq = torch.empty(chunks, **int32)
    p_parts: tuple[Tensor, ...] = ()
    p_part = B_part = None
    if need.p and fused_p_and_dB:
        p_part = torch.empty((k_blocks, T, banks * K * r), **float32)
        p_parts = p_part.split(K * r, dim=2)
    elif need.p:
        p_parts = shrink(g, B, [K] * banks, [ids is not None] * banks, ids, seqs, r=r, strides=(k * r, 1, r)).parts
    rounds = part_rounds(chunks, banks * K * k * r if any(need_B) else 0)
    if any(need_B):
        B_part = torch.empty((len(rounds[0]), banks, K, k, r), **float32)
    sums: tuple[Tensor, ...] | None = None
    if len(rounds) > 1:
        sums = tuple(torch.empty(b.shape, **float32) for b in B)

    def reduce_dB(of: range, added: tuple[Tensor, ...] | None, into: tuple[Tensor, ...]) -> None:
        """Add up the parts of a round's chunks; the last round has what comes of w, too."""
        last = of is rounds[-1]
        summed, with_w = sum(experts) if any(need_B) else 0, need.dw and last
        vectors = sum(experts) if own_importance else banks
        programs, BK = summed + (vectors if need_importance and last else 0), tiles.dB_rows(r)
        if programs and k:
            reduce_dB_kernel[(cdiv(k, BK), programs)](
                B_part_ptr=B_part,
                sum_ptrs=added,
                chunk_to_seq_ptr=chunk_to_seq[of.start :],
                ids_ptr=ids,
                dw_ptr=dw if with_w else None,
                B_ptrs=tuple(B),
                importance_ptrs=tuple(importance) if with_w else None,
                trained_ptrs=tuple(t.view(torch.uint8) for t in trained) or None,
                dB_ptrs=into if summed else None,
                dI_ptrs=tuple(dI) if need_importance and last else None,
                chunks=len(of),
                k=k,
                scaling=scaling,
                NEED_B=tuple(need_B),
                EXPERTS=tuple(experts),
                FIRST=first,
                TOTAL=summed,
                OWN_I=own_importance,
                **constants,
                BK=BK,
                GROUP=chunks_at_once(ids, K),
                **tiles.SMALL,
            )

    for number, of in enumerate(rounds):
        if of and (any(need_B) or (need.p and fused_p_and_dB)):
            grad_output_kernel[(len(of) * k_blocks, blocks)](
                g_ptr=g,
                h_ptr=h,
                ids_ptr=ids,
                slot_weights_ptr=slot_weights,
                scores_ptr=scores,
                B_ptrs=tuple(B),
                trained_ptrs=tuple(t.view(torch.uint8) for t in trained) or None,
                p_part_ptr=p_part,
                B_part_ptr=B_part,
                chunk_to_seq_ptr=chunk_to_seq,
                T=T,
                **seqs.arguments(),
                chunk_size=chunk,
                first_chunk=of.start,
                k=k,
                scaling=scaling,
                NEED_B=tuple(need_B),
                ANY_B=any(need_B),
                **mix_constants,
                BT=tile.BT,
                BK=tile.BD,
                BC=tile.BC,
                WIDE=next_power_of_2(banks) * tile.BC,
                **tile.options(),
            )
        if sums is not None and of is not rounds[-1]:
            reduce_dB(of, sums if number else None, sums)
    dw = torch.empty((sum(experts) if need.dw else 0, r), **float32)
    if need.p:
        mix_tile = tiles.choose_tile("mix_backward", r, K, g.dtype, card.capability)
        num_tiles = tile_count(T, seqs.num_seqs, mix_tile.BT, seqs.packed)
        tile_to_seq = torch.empty(num_tiles, **int32)
        dw_part = torch.empty((num_tiles, banks, K, r), **float32) if functions.fuse is not None else None
        dweights_part = torch.empty((num_tiles, banks, K, r), **float32) if need_slot_weights else None
        if num_tiles:
            mix_backward_kernel[(num_tiles,)](
                p_part_ptrs=p_parts,
                h_ptr=h,
                w_ptr=w,
                ids_ptr=ids,
                slot_weights_ptr=slot_weights,
                scores_ptr=scores,
                dh_ptr=dh,
                dscores_ptr=dscores if need_scores else None,
                dw_part_ptr=dw_part,
                dweights_part_ptr=dweights_part,
                tile_to_seq_ptr=tile_to_seq,
                p_parts=p_parts[0].shape[0],
                T=T,
                **seqs.arguments(),
                scaling=scaling,
                SCORES_BACKWARD=functions.scores_backward,
                FUSE_BACKWARD=functions.fuse_backward,
                FIRST=first,
                **mix_constants,
                P_WIDTH=banks * K * r if fused_p_and_dB else K * r,
                KEEP_P=functions.fuse is not None and banks * K * RP <= tiles.MAX_KEPT_P_COLUMNS,
                BT=mix_tile.BT,
                BR=min(RP, mix_tile.BC),
                GROUP=8,
                **mix_tile.options(),
            )
        programs = dw.shape[0] + (dweights.shape[0] if need_slot_weights else 0)
        if programs:
            reduce_dw_dweights_kernel[(programs,)](
                dw_part_ptr=dw_part,
                dweights_part_ptr=dweights_part,
                tile_to_seq_ptr=tile_to_seq,
                ids_ptr=ids,
                dw_ptr=dw,
                dweights_ptr=dweights,
                num_tiles=num_tiles,
                EXPERTS=dw.shape[0],
                FIRST=first,
                **constants,
                TILES=64,
                **tiles.SMALL,
            )
    reduce_dB(rounds[-1], sums, tuple(dB))
    return dh if need_dh else dh.new_empty(0), dB, dI, dweights, dscores
