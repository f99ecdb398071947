"""Fuse the branches in rank space and expand them to the output: one pass that writes y."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import FIXED_LEAD, branches
from . import tiles
from .common import columns, locate, per_slot
from .mix import mix


@triton.jit
def fused(h_ptr, rows, inside, share, slot, rank, b_q, scaling, K: tl.constexpr, R: tl.constexpr, STRIDE: tl.constexpr):
    """A block of a branch of what B is multiplied with, s share q h, [BT, BC]; h_ptr is at the branch."""
    m_h = inside[:, None] & ((slot < K) & (rank < R))[None, :]
    b_h = tl.load(h_ptr + rows[:, None] * STRIDE + (slot * R + rank)[None, :], mask=m_h, other=0)
    return b_h * (scaling * share)[:, None] * b_q[None, :]


@triton.jit
def score(h_ptr, rows, inside, w_ptr, p_routes, p_gates, K: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
          STRIDE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """A branch's score I . x of Eq. 8 in rank space, the sum of q w . h over its slots, [BT]."""
    b_score = tl.zeros([BT], tl.float32)
    for block in tl.static_range(BLOCKS):
        slot, rank = columns(block, BC, RP)
        m_c = (slot < K) & (rank < R)
        b_w = tl.load(w_ptr + per_slot(p_routes, slot, K, 0) * R + rank, mask=m_c, other=0)
        b_w *= per_slot(p_gates, slot, K, 0.0)
        p_h = h_ptr + rows[:, None] * STRIDE + (slot * R + rank)[None, :]
        b_score += tl.sum(tl.load(p_h, mask=inside[:, None] & m_c[None, :], other=0) * b_w[None, :], 1)
    return b_score


@triton.jit(do_not_specialize=["n", "S"])
def fuse_expand_kernel(
    h_ptr,  # (T, b, K, R)
    w_ptr,  # (M + N, R)
    routes_ptr,  # (n, b, K)
    gates_ptr,  # (n, b, K)
    vu_B_ptr,  # (M, k, R)
    if_B_ptr,  # (N, k, R)
    bias_ptr,  # (k,)
    cu_ptr,  # (n + 1,)
    lead_ptr,  # (T,) out
    y_ptr,  # (T, k) out
    n,
    S,
    k,
    scaling,
    fixed_lead,
    M: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    BLOCKS: tl.constexpr,
    VU: tl.constexpr,
    IF: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    BIAS: tl.constexpr,
    VARLEN: tl.constexpr,
    IEEE: tl.constexpr,
):
    """Grid (tiles, parts of k): a program writes one tile of tokens of y over a part of k."""
    PRECISION: tl.constexpr = "ieee" if IEEE else "tf32"
    STRIDE: tl.constexpr = (VU + IF) * K * R
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    i_n, j, start, end = locate(tl.program_id(0), cu_ptr, n, S, BT, 1, VARLEN)
    i_s = tl.program_id(1)
    rows = start + j * BT + tl.arange(0, BT)
    inside = rows < end
    if start + j * BT >= end:
        return
    p_routes = routes_ptr + i_n * (VU + IF) * K
    p_gates = gates_ptr + i_n * (VU + IF) * K
    h_if_ptr = h_ptr + VU * K * R

    if ADAPTIVE:
        score_vu = score(h_ptr, rows, inside, w_ptr, p_routes, p_gates, K, R, RP, STRIDE, BT, BC, BLOCKS)
        score_if = score(
            h_if_ptr, rows, inside, w_ptr + M * R, p_routes + K, p_gates + K, K, R, RP, STRIDE, BT, BC, BLOCKS
        )
        b_lead = mix(score_vu, score_if)
    else:
        b_lead = tl.zeros([BT], tl.float32) + fixed_lead
    if i_s == 0:
        tl.store(lead_ptr + rows, b_lead, mask=inside)

    slot, rank = columns(0, BC, RP)
    if BLOCKS == 1:  # what B is multiplied with stays in registers over the whole of k
        if VU:
            b_q = per_slot(p_gates, slot, K, 0.0)
            u_v = fused(h_ptr, rows, inside, tl.sigmoid(b_lead), slot, rank, b_q, scaling, K, R, STRIDE).to(dtype)
        if IF:
            b_q = per_slot(p_gates + VU * K, slot, K, 0.0)
            u_i = fused(h_if_ptr, rows, inside, tl.sigmoid(-b_lead), slot, rank, b_q, scaling, K, R, STRIDE).to(dtype)
    span = tl.cdiv(tl.cdiv(k, BK), tl.num_programs(1)) * BK
    for c in range(i_s * span, tl.minimum(k, (i_s + 1) * span), BK):
        o_k = c + tl.arange(0, BK)
        m_k = o_k < k
        b_y = tl.zeros([BT, BK], tl.float32)
        for block in tl.static_range(BLOCKS):
            if BLOCKS > 1:
                slot, rank = columns(block, BC, RP)
            m_b = m_k[None, :] & ((slot < K) & (rank < R))[:, None]
            if VU:
                if BLOCKS > 1:
                    b_q = per_slot(p_gates, slot, K, 0.0)
                    u_v = fused(h_ptr, rows, inside, tl.sigmoid(b_lead), slot, rank, b_q, scaling, K, R, STRIDE).to(
                        dtype
                    )
                expert = per_slot(p_routes, slot, K, 0)
                p_b = vu_B_ptr + (expert.to(tl.int64) * k * R + rank)[:, None] + o_k[None, :].to(tl.int64) * R
                b_b = tl.load(p_b, mask=m_b, other=0).to(dtype)
                b_y = tl.dot(u_v, b_b, b_y, input_precision=PRECISION)
            if IF:
                if BLOCKS > 1:
                    b_q = per_slot(p_gates + VU * K, slot, K, 0.0)
                    u_i = fused(h_if_ptr, rows, inside, tl.sigmoid(-b_lead), slot, rank, b_q, scaling, K, R, STRIDE).to(
                        dtype
                    )
                expert = per_slot(p_routes + VU * K, slot, K, 0)
                p_b = if_B_ptr + (expert.to(tl.int64) * k * R + rank)[:, None] + o_k[None, :].to(tl.int64) * R
                b_b = tl.load(p_b, mask=m_b, other=0).to(dtype)
                b_y = tl.dot(u_i, b_b, b_y, input_precision=PRECISION)
        if BIAS:
            b_y += tl.load(bias_ptr + o_k, mask=m_k, other=0).to(tl.float32)[None, :]
        tl.store(y_ptr + rows[:, None] * k + o_k[None, :], b_y.to(dtype), mask=inside[:, None] & m_k[None, :])


def fuse_expand(
    h: Tensor,
    w: Tensor,
    routes: Tensor,
    gates: Tensor,
    vu_B: Tensor,
    if_B: Tensor,
    instances: int,
    cu_seqlens: Tensor | None,
    scaling: float,
    fusion: str,
    dtype: torch.dtype,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, lead); arguments and results as in `smolora.rank_space.fuse_expand`.

    y is written once, and the base's product accumulates on it inside its matrix product, which reads y while it is
    bound by arithmetic.
    """
    T, n = h.shape[0], instances
    (M, k, r), top_k = vu_B.shape, routes.shape[2]
    use_vu, use_if = branches(fusion)
    card = tiles.card_of(h.device)
    tile = tiles.choose_tile("expand", r, top_k, dtype, card.capability)
    RP = tiles.rank_columns(r)
    y = torch.empty((T, k), dtype=dtype, device=h.device)
    lead = h.new_empty(T)
    number = tiles.tile_count(T, n, tile.BT, cu_seqlens is not None)
    splits = tiles.splits(number, k, 4 * tile.BD, card.processors)
    if number and k:
        fuse_expand_kernel[(number, splits)](
            h, w, routes, gates, vu_B, if_B, h if bias is None else bias, routes if cu_seqlens is None else cu_seqlens,
            lead, y, n, T // max(n, 1), k, scaling, FIXED_LEAD.get(fusion, 0.0),
            M=M, R=r, RP=RP, K=top_k, BT=tile.BT, BK=tile.BD, BC=tile.BC,
            BLOCKS=tiles.cdiv(tiles.next_power(top_k) * RP, tile.BC), VU=use_vu, IF=use_if,
            ADAPTIVE=fusion == "adaptive", BIAS=bias is not None, VARLEN=cu_seqlens is not None,
            IEEE=dtype == torch.float32, **tile.options(),
        )  # fmt: skip
    if weight is not None:
        y.addmm_(x, weight.t())
    return y, lead
