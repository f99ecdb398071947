"""What passes share: the product of x (or g) into rank space, the right operand of the up-projection, sums of parts.

Kernels:

    shrink_kernel  x A^T of the slots or experts of every bank, R x of a token router, and column sums, from one read
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import card_of, cdiv, next_power_of_2, split_k, tile_count
from . import tiles
from .dropout import BITS, keep, load_mask
from .primitives import Sequences, slot_experts, slots_and_ranks, tile_to_seq, to_int64, zero_tile


@triton.jit
def load_h(
    h_ptr,  # (T, b, DOWN, R)
    rows,
    inside,
    slot,
    rank,
    bank: tl.constexpr,
    BANKS: tl.constexpr,
    K: tl.constexpr,
    DOWN: tl.constexpr,
    R: tl.constexpr,
):
    """Load h of a block's columns, [BT, BC]; with DOWN = 1 all slots have the same."""
    o_h = rank
    if DOWN > 1:
        o_h = slot * R + rank
    p_h = h_ptr + rows[:, None] * (BANKS * DOWN * R) + (bank * DOWN * R + o_h)[None, :]
    return tl.load(p_h, mask=inside[:, None] & ((slot < K) & (rank < R))[None, :], other=0)


@triton.jit
def scaled_h(
    h_ptr,  # (T, b, DOWN, R)
    scores_ptr,
    state,
    b_q,
    rows,
    inside,
    slot,
    rank,
    scaling,
    bank: tl.constexpr,
    SHARE: tl.constexpr,
    BANKS: tl.constexpr,
    K: tl.constexpr,
    DOWN: tl.constexpr,
    R: tl.constexpr,
):
    """Return a block of the up-projection's right operand, s q share h, [BT, BC]."""
    b_h = load_h(h_ptr, rows, inside, slot, rank, bank, BANKS, K, DOWN, R)
    return b_h * (scaling * SHARE(state, scores_ptr, rows, inside, slot, bank, K)) * b_q[None, :]


@triton.jit
def sum_chunks(
    part_ptr,  # (chunks, b, K, size)
    chunk_to_seq_ptr,  # (chunks,)
    ids_ptr,  # (n, b, K) or None
    bank: tl.constexpr,
    expert,
    o,
    mask,
    chunks,
    size,
    BANKS: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,  # chunks that are loaded together
):
    """Return the sum of an expert's parts over the chunks of tokens [N], at offsets `o` into `size` numbers."""
    b_sum = tl.zeros([N], tl.float32)
    for first in range(0, chunks, GROUP):
        o_c = first + tl.arange(0, GROUP)
        i_n = tl.load(chunk_to_seq_ptr + o_c, mask=o_c < chunks, other=-1)
        o_part = (o_c.to(tl.int64) * BANKS + bank) * K
        if ids_ptr is None:
            p_part = part_ptr + ((o_part + expert) * size)[:, None] + o[None, :]
            b_sum += tl.sum(tl.load(p_part, mask=(i_n >= 0)[:, None] & mask[None, :], other=0), 0)
        else:
            for j in tl.static_range(K):
                chosen = tl.load(ids_ptr + (i_n * BANKS + bank) * K + j, mask=i_n >= 0, other=-1)
                p_part = part_ptr + ((o_part + j) * size)[:, None] + o[None, :]
                b_sum += tl.sum(tl.load(p_part, mask=(chosen == expert)[:, None] & mask[None, :], other=0), 0)
    return b_sum


def chunks_at_once(ids: Tensor | None, K: int) -> int:
    """Return `sum_chunks`' GROUP, with which eight loads are in flight: a chunk has one, or with ids one a slot."""
    return 8 if ids is None else max(1, 8 // next_power_of_2(K))


@triton.jit
def sum_p(
    p_part_ptr,  # (p_parts, T, P_WIDTH)
    rows,
    inside,
    slot,
    rank,
    T,
    p_parts,
    scaling,
    P_WIDTH: tl.constexpr,
    R: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Return a block of p [BT, BR]: the sum of its parts over k, in their order."""
    m_p = inside[:, None] & (rank < R)[None, :]
    b_p = tl.zeros([BT, BR], tl.float32)
    for first in range(0, p_parts, GROUP):
        for i in tl.static_range(GROUP):  # loads that are in flight together
            o_p = (rows + to_int64(first + i) * T)[:, None] * P_WIDTH + (slot * R + rank)[None, :]
            b_p += tl.load(p_part_ptr + o_p, mask=m_p & (first + i < p_parts), other=0)
    return scaling * b_p


@triton.jit(do_not_specialize=["T", "num_seqs", "seq_len"])
def shrink_kernel(
    x_ptr,  # (T, d)
    A_ptrs,  # (E, R, d) by strides
    token_router_ptr,  # (Z, d) or None
    part_ptrs,  # (split_k, T, slots * R) out
    logits_part_ptr,  # (split_k, T, Z) out, or None
    sums_ptr,  # (tiles, d) out: column sums over the routed tokens of a tile; or None
    routed_ptr,  # (n, 2): the first routed token, and how many there are; None without sums
    route_mask_ptr,  # (T,) bool or None: the sums have all tokens
    cu_seqlens_ptr,  # (n + 1,) or None
    ids_ptr,  # (n, b, K) or None
    masks_ptr,  # (banks, T, words of 32 columns) or None: no dropout
    T,
    num_seqs,
    seq_len,
    d,
    words,
    stride_e,
    stride_r,
    stride_d,
    BANKS: tl.constexpr,  # 0: sums alone
    SLOTS: tl.constexpr,  # of each bank
    BY_ID: tl.constexpr,  # of each bank: its slots are those of the ids, else experts in order
    K: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    Z: tl.constexpr,
    ZP: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,  # of each bank
    EXTRA_TILES: tl.constexpr,
):
    """Grid (tiles, split_k, column blocks): a program has a tile of tokens, a part of d and a block of columns."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tile = tl.program_id(0)
    i_s = tl.program_id(1)
    block = tl.program_id(2)
    i_n, j, start, end = tile_to_seq(tile, cu_seqlens_ptr, num_seqs, seq_len, BT, EXTRA_TILES)
    offset = 0
    if EXTRA_TILES == 2:  # lay the tiles from the first routed token: left padding must not move a sum
        offset = ((BT - tl.load(routed_ptr + i_n * 2) % BT) % BT).to(tl.int32)
    rows = start + j * BT - offset + tl.arange(0, BT)
    inside = (rows >= start) & (rows < end)
    if sums_ptr is None:
        if tl.max(inside.to(tl.int32), 0) == 0:
            return

    p_a = ()
    m_c = ()
    b_h = ()
    for bank in tl.static_range(BANKS):
        slot, rank = slots_and_ranks(block, BC[bank], RP)
        expert = slot
        if BY_ID[bank]:
            expert = slot_experts(ids_ptr, i_n, bank, slot, BANKS, K)
        p_a = p_a + (A_ptrs[bank] + expert.to(tl.int64) * stride_e + rank * stride_r,)
        m_c = m_c + ((slot < SLOTS[bank]) & (rank < R),)
        b_h = b_h + (zero_tile(BT, BC[bank]),)
    if token_router_ptr is not None:
        o_z = tl.arange(0, ZP)
        m_z = (o_z < Z) & (block == 0)
        b_z = tl.zeros([BT, ZP], tl.float32)
    if sums_ptr is not None:
        routed = inside
        if route_mask_ptr is not None:
            routed = tl.load(route_mask_ptr + rows, mask=inside, other=0) != 0
        b_ones = (routed[:, None] & (tl.arange(0, 16)[None, :] == 0)).to(dtype)  # [BT, 16]
        if BD < 64:
            b_ones = tl.trans(b_ones)

    span = tl.cdiv(tl.cdiv(d, BD), tl.num_programs(1)) * BD
    for c in range(i_s * span, tl.minimum(d, (i_s + 1) * span), BD):
        o_d = c + tl.arange(0, BD)
        m_d = o_d < d
        b_x = tl.load(x_ptr + rows[:, None] * d + o_d[None, :], mask=inside[:, None] & m_d[None, :], other=0)
        if sums_ptr is not None:
            b_seen = b_x
            if route_mask_ptr is not None:  # mask with where, not by multiplying: 0 * NaN is NaN
                b_seen = tl.where(routed[:, None], b_x, 0.0).to(dtype)
            if dtype == tl.float32:  # no tensor core adds float32 exactly
                b_sum = tl.sum(b_seen, 0)
            else:  # of 16 sums, only the first is not zero; with 64 rows, wgmma reads x as it lies
                if BD < 64:
                    b_sum = tl.sum(tl.dot(b_ones, b_seen), 0)
                else:
                    b_sum = tl.sum(tl.dot(tl.trans(b_seen), b_ones), 1)
            if block == 0:
                tl.store(sums_ptr + to_int64(tile) * d + o_d, b_sum, mask=m_d)
        if BANKS > 0:
            o_a = o_d[:, None].to(tl.int64) * stride_d
            b_added = ()
            for bank in tl.static_range(BANKS):
                b_a = tl.load(p_a[bank][None, :] + o_a, mask=m_d[:, None] & m_c[bank][None, :], other=0).to(dtype)
                b_kept = b_x
                if masks_ptr is not None:
                    b_mask = load_mask(masks_ptr, rows, inside, c, T, words, bank, BT, BD)
                    b_kept = keep(b_x, b_mask, BT, BD)
                b_added = b_added + (tl.dot(b_kept, b_a, b_h[bank], input_precision="ieee"),)
            b_h = b_added
        if token_router_ptr is not None:
            p_z = token_router_ptr + o_z[None, :].to(tl.int64) * d + o_d[:, None]
            b_r = tl.load(p_z, mask=m_d[:, None] & m_z[None, :], other=0).to(dtype)
            b_z = tl.dot(b_x, b_r, b_z, input_precision="ieee")

    o_t = to_int64(i_s) * T + rows
    for bank in tl.static_range(BANKS):
        slot, rank = slots_and_ranks(block, BC[bank], RP)
        p_out = part_ptrs[bank] + o_t[:, None] * (SLOTS[bank] * R) + (slot * R + rank)[None, :]
        tl.store(p_out, b_h[bank], mask=inside[:, None] & m_c[bank][None, :])
    if token_router_ptr is not None:
        tl.store(logits_part_ptr + o_t[:, None] * Z + o_z[None, :], b_z, mask=inside[:, None] & m_z[None, :])


class Shrunk(NamedTuple):
    """Partial results of `shrink`, to be added up over split_k."""

    parts: tuple[Tensor, ...]  # of each bank, (split_k, T, slots * r)
    logits_part: Tensor | None  # (split_k, T, Z)
    split_k: int
    sums: Tensor | None  # (tiles, d)
    tile_tokens: int


def shrink(
    x: Tensor,
    A: list[Tensor],
    slots: list[int],
    by_id: list[bool],
    ids: Tensor | None,
    seqs: Sequences,
    *,
    r: int,
    strides: tuple[int, int, int],
    num_columns: int = 0,
    token_router: Tensor | None = None,
    routed: Tensor | None = None,
    route_mask: Tensor | None = None,
    masks: Tensor | None = None,
) -> Shrunk:
    """Launch `shrink_kernel`, the pass over x.

    Args:
        A: one a bank; empty for column sums alone.
        slots: of each bank, how many experts are computed: those of its ids, or the first ones in order.
        by_id: of each bank, whether it computes the experts of its ids (n, b, K).
        r, strides: rank, and the strides of A between experts, ranks and inputs.
        num_columns: slots that the tile is chosen for where A is empty.
        routed: (n, 2), if the columns are summed, too, over the tokens of `route_mask`.
        masks: of each bank's dropout, from `draw_masks`.
    """
    T, d = x.shape
    banks, widest = len(A), max(slots, default=num_columns)
    card, RP = card_of(x.device), tiles.padded_rank(r)
    if banks == 1:
        variant = "one_bank"
    elif banks and min(slots) * RP > 16:
        variant = "wide_banks"
    else:
        variant = "" if masks is None else "masks"
    tile = tiles.choose_tile("shrink", r, widest, x.dtype, card.capability, variant)
    extra_tiles = 1 if routed is None or route_mask is None else 2
    num_tiles = tile_count(T, seqs.num_seqs, tile.BT, seqs.packed, extra_tiles)
    BC = tuple(min(next_power_of_2(s) * RP, tile.BC) for s in slots)
    blocks = max((cdiv(s * RP, width) for s, width in zip(slots, BC, strict=True)), default=1)
    splits = split_k(num_tiles * blocks, d, 4 * tile.BD, tile.resident * card.processors)
    Z = 0 if token_router is None else token_router.shape[0]
    float32 = dict(dtype=torch.float32, device=x.device)
    parts = tuple(torch.empty((splits, T, s * r), **float32) for s in slots)
    logits_part = torch.empty((splits, T, Z), **float32) if Z else None
    sums = None if routed is None else torch.empty((num_tiles, d), **float32)
    if num_tiles:
        shrink_kernel[(num_tiles, splits, blocks)](
            x_ptr=x,
            A_ptrs=tuple(A) or None,
            token_router_ptr=token_router,
            part_ptrs=parts or None,
            logits_part_ptr=logits_part,
            sums_ptr=sums,
            routed_ptr=routed,
            route_mask_ptr=None if route_mask is None or routed is None else route_mask.view(torch.uint8),
            ids_ptr=ids if any(by_id) else None,
            masks_ptr=masks,
            T=T,
            **seqs.arguments(),
            d=d,
            words=cdiv(d, BITS),
            stride_e=strides[0],
            stride_r=strides[1],
            stride_d=strides[2],
            BANKS=banks,
            SLOTS=tuple(slots),
            BY_ID=tuple(by_id),
            K=ids.shape[2] if any(by_id) else 0,
            R=r,
            RP=RP,
            Z=Z,
            ZP=max(16, next_power_of_2(Z)),
            BT=tile.BT,
            BD=tile.BD,
            BC=BC,
            EXTRA_TILES=extra_tiles,
            **tile.options(),
        )
    return Shrunk(parts, logits_part, splits, sums, tile.BT)
