"""h -> y: mix in rank space, and expand in one pass that writes y. docs/architecture.md explains the symbols.

Kernels:

    fuse_expand_kernel  y, and the scores that the mix makes of h
"""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import card_of, cdiv, next_power_of_2, split_k, tile_count
from ..spec import num_slots
from . import tiles
from .mixes import MIXES
from .primitives import load_slot_weights, sequences, slot_experts, slots_and_ranks, tile_span
from .products import scaled_h


@triton.jit(do_not_specialize=["num_seqs", "seq_len"])
def fuse_expand_kernel(
    h_ptr,  # (T, b, DOWN, R)
    w_ptr,  # (sum of E, R)
    ids_ptr,  # (n, b, K) or None
    slot_weights_ptr,  # (n, b, K) or None
    scores_ptr,  # (T, K) or None
    B_ptrs,  # (E, k, R)
    bias_ptr,  # (k,) or None
    cu_seqlens_ptr,  # (n + 1,) or None
    fused_ptr,  # (T,) out: scores that the mix makes of h
    y_ptr,  # (T, k) out
    num_seqs,
    seq_len,
    k,
    scaling,
    STATE: tl.constexpr,  # the functions of the mix
    SHARE: tl.constexpr,
    FUSE: tl.constexpr,
    BANKS: tl.constexpr,
    FIRST: tl.constexpr,  # of each bank, where its experts begin when they are counted through
    K: tl.constexpr,
    KP: tl.constexpr,
    DOWN: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Grid (tiles, slices of k): a program writes y of one tile of tokens over a slice of k."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    i_n, start, end = tile_span(tl.program_id(0), cu_seqlens_ptr, num_seqs, seq_len, BT)
    i_s = tl.program_id(1)
    if start >= end:
        return
    rows = start + tl.arange(0, BT)
    inside = rows < end

    if FUSE is not None:
        state = FUSE(
            h_ptr, w_ptr, ids_ptr, slot_weights_ptr, i_n, rows, inside, FIRST, BANKS, K, DOWN, R, RP, BT, BC, BLOCKS
        )
        if i_s == 0:
            tl.store(fused_ptr + rows, state, mask=inside)
    else:
        state = STATE(scores_ptr, rows, inside, K, KP)

    if BLOCKS == 1:  # the right operand stays in registers for all of k
        slot, rank = slots_and_ranks(0, BC, RP)
        held = ()
        for bank in tl.static_range(BANKS):
            b_q = load_slot_weights(slot_weights_ptr, i_n, bank, slot, BANKS, K)
            b_u = scaled_h(
                h_ptr, scores_ptr, state, b_q, rows, inside, slot, rank, scaling, bank, SHARE, BANKS, K, DOWN, R
            ).to(dtype)
            held = held + (b_u,)  # [BT, BC]
    span = tl.cdiv(tl.cdiv(k, BK), tl.num_programs(1)) * BK
    for c in range(i_s * span, tl.minimum(k, (i_s + 1) * span), BK):
        o_k = c + tl.arange(0, BK)
        m_k = o_k < k
        b_y = tl.zeros([BT, BK], tl.float32)
        for block in tl.static_range(BLOCKS):
            slot, rank = slots_and_ranks(block, BC, RP)
            m_b = m_k[None, :] & ((slot < K) & (rank < R))[:, None]
            for bank in tl.static_range(BANKS):
                if BLOCKS == 1:
                    b_u = held[bank]
                else:
                    b_q = load_slot_weights(slot_weights_ptr, i_n, bank, slot, BANKS, K)
                    b_u = scaled_h(
                        h_ptr, scores_ptr, state, b_q, rows, inside, slot, rank, scaling, bank, SHARE, BANKS, K, DOWN, R
                    ).to(dtype)
                expert = slot_experts(ids_ptr, i_n, bank, slot, BANKS, K)
                p_b = B_ptrs[bank] + (expert.to(tl.int64) * k * R + rank)[:, None] + o_k[None, :].to(tl.int64) * R
                b_b = tl.load(p_b, mask=m_b, other=0).to(dtype)  # [BC, BK]
                b_y = tl.dot(b_u, b_b, b_y, input_precision="ieee")
        if bias_ptr is not None:
            b_y += tl.load(bias_ptr + o_k, mask=m_k, other=0).to(tl.float32)[None, :]
        tl.store(y_ptr + rows[:, None] * k + o_k[None, :], b_y.to(dtype), mask=inside[:, None] & m_k[None, :])


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
    """Fuse and expand; arguments and results as in `smolora.engine.torch_passes.fuse_expand`.

    The kernel writes y once. The base's matrix product then accumulates on it: that product is bound by arithmetic, so
    reading y is free.
    """
    T, banks, down, r = h.shape
    k, K = B[0].shape[1], num_slots(ids, B, 0)
    card, RP, KP = card_of(h.device), tiles.padded_rank(r), next_power_of_2(K)
    tile = tiles.choose_tile("expand", r, K, dtype, card.capability)
    functions = MIXES[mix]
    y = torch.empty((T, k), dtype=dtype, device=h.device)
    fused = h.new_empty(T if functions.fuse is not None else 0)
    seqs = sequences(T, num_seqs, cu_seqlens, alike=ids is None and slot_weights is None)
    num_tiles = tile_count(T, seqs.num_seqs, tile.BT, seqs.packed)
    slices = split_k(num_tiles, k, 4 * tile.BD, tile.resident * card.processors)
    if num_tiles and k:
        fuse_expand_kernel[(num_tiles, slices)](
            h_ptr=h,
            w_ptr=w,
            ids_ptr=ids,
            slot_weights_ptr=slot_weights,
            scores_ptr=scores,
            B_ptrs=tuple(B),
            bias_ptr=base_bias,
            fused_ptr=fused,
            y_ptr=y,
            **seqs.arguments(),
            k=k,
            scaling=scaling,
            STATE=functions.state,
            SHARE=functions.share,
            FUSE=functions.fuse,
            BANKS=banks,
            FIRST=tuple(accumulate([0, *(b.shape[0] for b in B[:-1])])),
            K=K,
            KP=KP,
            DOWN=down,
            R=r,
            RP=RP,
            BT=tile.BT,
            BK=tile.BD,
            BC=tile.BC,
            BLOCKS=cdiv(KP * RP, tile.BC),
            **tile.options(),
        )
    if base_weight is not None:
        y.addmm_(x, base_weight.t())
    return y, fused
