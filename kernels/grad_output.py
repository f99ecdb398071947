"""From g = dL/dy to rank space: p = s B^T g and the gradients of B and I, from one read of g.

Kernels, in the order they run:

    grad_output_kernel   the pass over g: partial p, and partial dB of a chunk of tokens
    mix_backward_kernel  dh from p; partial c and gate gradients of a tile
    _collect             c of every expert, and the gate gradients of every instance
    _collect_B           dB and dI

p needs all of k, and dB all tokens: a program holds a block of k and a chunk of one instance's tokens, keeps dB in
registers and writes its part of p. When the chosen experts have too many columns to hold, p comes from the shrink
kernel (g for x, B for A), and dB from this one with a program for a block of columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import branches, empty_if, wanted
from . import tiles
from .common import columns, locate, per_slot, wide
from .fuse_expand import fused
from .mix import gradient_h, mix_backward
from .route_shrink import shrink


@triton.jit(do_not_specialize=["T", "n", "S"])
def grad_output_kernel(
    g_ptr,  # (T, k)
    h_ptr,  # (T, b, K, R)
    routes_ptr,  # (n, b, K)
    gates_ptr,  # (n, b, K)
    lead_ptr,  # (T,)
    vu_B_ptr,  # (M, k, R)
    if_B_ptr,  # (N, k, R)
    cu_ptr,  # (n + 1,)
    vu_part_ptr,  # (blocks of k, T, K * R) out
    if_part_ptr,  # (blocks of k, T, K * R) out
    B_part_ptr,  # (chunks, b, K, k, R) out
    owner_ptr,  # (chunks,) out: the chunk's instance, -1 if it has no token
    T,
    n,
    S,
    k,
    scaling,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    CHUNK: tl.constexpr,
    VU: tl.constexpr,
    IF: tl.constexpr,
    P: tl.constexpr,
    VU_B: tl.constexpr,
    IF_B: tl.constexpr,
    VARLEN: tl.constexpr,
    IEEE: tl.constexpr,
):
    """Grid (blocks of k, chunks, column blocks): CHUNK tokens of one instance by BK outputs; P has one column block."""
    PRECISION: tl.constexpr = "ieee" if IEEE else "tf32"
    STRIDE: tl.constexpr = (VU + IF) * K * R
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    i_k = tl.program_id(0)
    chunk = tl.program_id(1)
    block = tl.program_id(2)
    i_n, j, start, end = locate(chunk, cu_ptr, n, S, CHUNK, 1, VARLEN)
    start += j * CHUNK
    end = tl.minimum(end, start + CHUNK)
    if i_k == 0 and block == 0:
        tl.store(owner_ptr + chunk, tl.where(start < end, i_n, -1))
    if start >= end:
        return
    o_k = i_k * BK + tl.arange(0, BK)
    m_k = o_k < k
    slot, rank = columns(block, BC, RP)
    m_c = (slot < K) & (rank < R)
    m_b = m_k[:, None] & m_c[None, :]
    p_routes = routes_ptr + i_n * (VU + IF) * K
    p_gates = gates_ptr + i_n * (VU + IF) * K
    if VU:
        q_v = per_slot(p_gates, slot, K, 0.0)
        if P:
            expert = per_slot(p_routes, slot, K, 0)
            p_b = vu_B_ptr + (expert.to(tl.int64) * k * R + rank)[None, :] + o_k[:, None].to(tl.int64) * R
            b_v = tl.load(p_b, mask=m_b, other=0).to(dtype)
        if VU_B:
            d_v = tl.zeros([BK, BC], tl.float32)
    if IF:
        q_i = per_slot(p_gates + VU * K, slot, K, 0.0)
        if P:
            expert = per_slot(p_routes + VU * K, slot, K, 0)
            p_b = if_B_ptr + (expert.to(tl.int64) * k * R + rank)[None, :] + o_k[:, None].to(tl.int64) * R
            b_i = tl.load(p_b, mask=m_b, other=0).to(dtype)
        if IF_B:
            d_i = tl.zeros([BK, BC], tl.float32)

    for t in range(start, end, BT):
        rows = t + tl.arange(0, BT)
        inside = rows < end
        b_g = tl.load(g_ptr + rows[:, None] * k + o_k[None, :], mask=inside[:, None] & m_k[None, :], other=0)
        b_lead = tl.load(lead_ptr + rows, mask=inside, other=0)
        m_p = inside[:, None] & m_c[None, :]
        o_p = (wide(i_k) * T + rows)[:, None] * (K * R) + (slot * R + rank)[None, :]
        if VU:
            if P:
                tl.store(vu_part_ptr + o_p, tl.dot(b_g, b_v, input_precision=PRECISION), mask=m_p)
            if VU_B:
                u_v = fused(h_ptr, rows, inside, tl.sigmoid(b_lead), slot, rank, q_v, scaling, K, R, STRIDE).to(dtype)
                d_v = tl.dot(tl.trans(b_g), u_v, d_v, input_precision=PRECISION)
        if IF:
            if P:
                tl.store(if_part_ptr + o_p, tl.dot(b_g, b_i, input_precision=PRECISION), mask=m_p)
            if IF_B:
                u_i = fused(
                    h_ptr + VU * K * R, rows, inside, tl.sigmoid(-b_lead), slot, rank, q_i, scaling, K, R, STRIDE
                ).to(dtype)
                d_i = tl.dot(tl.trans(b_g), u_i, d_i, input_precision=PRECISION)

    p_out = B_part_ptr + (wide(chunk) * (VU + IF) * K + slot)[None, :] * k * R + o_k[:, None].to(tl.int64) * R
    p_out += rank[None, :]
    if VU_B:
        tl.store(p_out, d_v, mask=m_b)
    if IF_B:
        tl.store(p_out + wide(VU * K) * k * R, d_i, mask=m_b)


@triton.jit
def part_sum(
    part_ptr, rows, m_p, slot, rank, T, parts, K: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):
    """The sum of the parts of p of a branch [BT, BC], in their order."""
    b_p = tl.zeros([BT, BC], tl.float32)
    for i in range(0, parts):
        p_part = part_ptr + (rows + wide(i) * T)[:, None] * (K * R) + (slot * R + rank)[None, :]
        b_p += tl.load(p_part, mask=m_p, other=0)
    return b_p


@triton.jit
def branch_backward(
    part_ptr,  # (parts, T, K * R)
    h_ptr,  # (T, b, K, R) at the branch, and so all below
    w_ptr,  # (experts, R)
    p_routes,  # (K,)
    p_gates,  # (K,)
    dh_ptr,  # (T, b, K, R) out
    p_c,  # (K, R) out
    p_dq,  # (K, R) out
    rows,
    inside,
    b_share,
    b_delta,
    parts,
    T,
    scaling,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BLOCKS: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    GATES: tl.constexpr,
):
    """One branch of mix's gradient: dh of a tile of tokens [BT], and their sums of c and of the gates' gradient."""
    for block in tl.static_range(BLOCKS):
        slot, rank = columns(block, BC, RP)
        m_c = (slot < K) & (rank < R)
        m_p = inside[:, None] & m_c[None, :]
        o_c = slot * R + rank
        b_q = per_slot(p_gates, slot, K, 0.0)
        b_p = scaling * part_sum(part_ptr, rows, m_p, slot, rank, T, parts, K, R, BT, BC)
        b_w = tl.zeros([BC], tl.float32)
        if ADAPTIVE:
            b_w = tl.load(w_ptr + per_slot(p_routes, slot, K, 0) * R + rank, mask=m_c, other=0)
        b_dh = gradient_h(b_share, b_delta, b_p, b_w, b_q)
        tl.store(dh_ptr + rows[:, None] * STRIDE + o_c[None, :], b_dh, mask=m_p)
        if ADAPTIVE or GATES:
            b_h = tl.load(h_ptr + rows[:, None] * STRIDE + o_c[None, :], mask=m_p, other=0)
        if ADAPTIVE:
            tl.store(p_c + o_c, tl.sum(b_delta[:, None] * b_h, 0) * b_q, mask=m_c)
        if GATES:
            b_dq = tl.sum((b_share[:, None] * b_p + b_delta[:, None] * b_w[None, :]) * b_h, 0)
            tl.store(p_dq + o_c, b_dq, mask=m_c)


@triton.jit(do_not_specialize=["T", "n", "S", "parts"])
def mix_backward_kernel(
    vu_part_ptr,  # (parts, T, K * R)
    if_part_ptr,  # (parts, T, K * R)
    h_ptr,  # (T, b, K, R)
    w_ptr,  # (M + N, R)
    routes_ptr,  # (n, b, K)
    gates_ptr,  # (n, b, K)
    lead_ptr,  # (T,)
    cu_ptr,  # (n + 1,)
    dh_ptr,  # (T, b, K, R) out
    c_part_ptr,  # (tiles, b, K, R) out
    dq_part_ptr,  # (tiles, b, K, R) out: summed over ranks by the next kernel
    owner_ptr,  # (tiles,) out: the tile's instance, -1 if it has no token
    parts,
    T,
    n,
    S,
    scaling,
    M: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BLOCKS: tl.constexpr,
    VU: tl.constexpr,
    IF: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    GATES: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """Grid (tiles,): the gradient of mix for a tile of tokens."""
    STRIDE: tl.constexpr = (VU + IF) * K * R
    tile = tl.program_id(0)
    i_n, j, start, end = locate(tile, cu_ptr, n, S, BT, 1, VARLEN)
    start += j * BT
    tl.store(owner_ptr + tile, tl.where(start < end, i_n, -1))
    if start >= end:
        return
    rows = start + tl.arange(0, BT)
    inside = rows < end
    b_lead = tl.load(lead_ptr + rows, mask=inside, other=0)
    b_delta = tl.zeros([BT], tl.float32)
    if ADAPTIVE:
        ph_v = tl.zeros([BT], tl.float32)
        ph_i = tl.zeros([BT], tl.float32)
        for block in tl.static_range(BLOCKS):
            slot, rank = columns(block, BC, RP)
            m_p = inside[:, None] & ((slot < K) & (rank < R))[None, :]
            p_h = h_ptr + rows[:, None] * STRIDE + (slot * R + rank)[None, :]
            b_q = per_slot(gates_ptr + i_n * 2 * K, slot, K, 0.0)
            b_p = scaling * part_sum(vu_part_ptr, rows, m_p, slot, rank, T, parts, K, R, BT, BC)
            ph_v += tl.sum(b_p * tl.load(p_h, mask=m_p, other=0) * b_q[None, :], 1)
            b_q = per_slot(gates_ptr + (i_n * 2 + 1) * K, slot, K, 0.0)
            b_p = scaling * part_sum(if_part_ptr, rows, m_p, slot, rank, T, parts, K, R, BT, BC)
            ph_i += tl.sum(b_p * tl.load(p_h + K * R, mask=m_p, other=0) * b_q[None, :], 1)
        b_delta = mix_backward(b_lead, ph_v, ph_i)
    o_g = i_n * (VU + IF) * K
    if VU:
        branch_backward(
            vu_part_ptr, h_ptr, w_ptr, routes_ptr + o_g, gates_ptr + o_g, dh_ptr, c_part_ptr + wide(tile) * STRIDE,
            dq_part_ptr + wide(tile) * STRIDE, rows, inside, tl.sigmoid(b_lead), b_delta, parts, T, scaling, R, RP, K,
            STRIDE, BT, BC, BLOCKS, ADAPTIVE, GATES,
        )  # fmt: skip
    if IF:
        o_b = VU * K * R
        branch_backward(
            if_part_ptr, h_ptr + o_b, w_ptr + M * R, routes_ptr + o_g + VU * K, gates_ptr + o_g + VU * K, dh_ptr + o_b,
            c_part_ptr + wide(tile) * STRIDE + o_b, dq_part_ptr + wide(tile) * STRIDE + o_b, rows, inside,
            tl.sigmoid(-b_lead), -b_delta, parts, T, scaling, R, RP, K, STRIDE, BT, BC, BLOCKS, ADAPTIVE, GATES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tiles"])
def _collect(
    c_part_ptr,  # (tiles, b, K, R)
    dq_part_ptr,  # (tiles, b, K, R)
    owner_ptr,  # (tiles,)
    routes_ptr,  # (n, b, K)
    c_ptr,  # (M + N, R) out
    dq_ptr,  # (n, b, K) out
    tiles,
    M: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    BRANCHES: tl.constexpr,
    TILES: tl.constexpr,
    C: tl.constexpr,
):
    """Grid (M + N if C, n): an expert's c; then, with the pid past those, an instance's gate gradients."""
    pid = tl.program_id(0)
    o_r = tl.arange(0, RP)
    EXPERTS: tl.constexpr = (M + N) * C
    if pid < EXPERTS:
        branch = tl.where(pid < M, 0, 1)
        expert = pid - branch * M
        b_c = tl.zeros([RP], tl.float32)
        for t in range(0, tiles, TILES):
            o_t = t + tl.arange(0, TILES)
            owner = tl.load(owner_ptr + o_t, mask=o_t < tiles, other=-1)
            for j in tl.static_range(K):
                route = tl.load(routes_ptr + (owner * 2 + branch) * K + j, mask=owner >= 0, other=-1)
                p_c = c_part_ptr + ((o_t.to(tl.int64) * 2 + branch) * K + j)[:, None] * R + o_r[None, :]
                b_c += tl.sum(tl.load(p_c, mask=(route == expert)[:, None] & (o_r < R)[None, :], other=0), 0)
        tl.store(c_ptr + pid * R + o_r, b_c, mask=o_r < R)
    else:
        i_n = pid - EXPERTS
        for slot in tl.static_range(BRANCHES * K):
            b_dq = tl.zeros([RP], tl.float32)
            for t in range(0, tiles, TILES):
                o_t = t + tl.arange(0, TILES)
                own = tl.load(owner_ptr + o_t, mask=o_t < tiles, other=-1) == i_n
                p_q = dq_part_ptr + (o_t.to(tl.int64) * (BRANCHES * K) + slot)[:, None] * R + o_r[None, :]
                b_dq += tl.sum(tl.load(p_q, mask=own[:, None] & (o_r < R)[None, :], other=0), 0)
            tl.store(dq_ptr + i_n * BRANCHES * K + slot, tl.sum(b_dq, 0))


@triton.jit(do_not_specialize=["chunks"])
def _collect_B(
    B_part_ptr,  # (chunks, b, K, k, R)
    owner_ptr,  # (chunks,)
    routes_ptr,  # (n, b, K)
    c_ptr,  # (M + N, R)
    B_ptr,  # (E, k, R) of the branch
    importance_ptr,  # (k,) of the branch
    dB_ptr,  # (E, k, R) out
    dI_ptr,  # (k,) out
    chunks,
    k,
    scaling,
    branch,
    first,
    E: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    BRANCHES: tl.constexpr,
    BK: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    WANT_B: tl.constexpr,
    WANT_I: tl.constexpr,
):
    """Grid (blocks of k,): dB_e = sum of its parts + s I c_e^T of one branch's experts, and dI = s sum of B_e c_e.

    `branch` counts the branches in use, `first` is the row of c of the branch's first expert.
    """
    o_k = tl.program_id(0) * BK + tl.arange(0, BK)
    o_r = tl.arange(0, RP)
    m_k = o_k < k
    inside = m_k[:, None] & (o_r < R)[None, :]
    o_b = o_k[:, None].to(tl.int64) * R + o_r[None, :]
    if ADAPTIVE:
        b_I = tl.load(importance_ptr + o_k, mask=m_k, other=0).to(tl.float32)
        b_dI = tl.zeros([BK], tl.float32)
    for expert in tl.static_range(E):
        if ADAPTIVE:
            b_c = scaling * tl.load(c_ptr + (first + expert) * R + o_r, mask=o_r < R, other=0)
        if WANT_B:
            b_dB = tl.zeros([BK, RP], tl.float32)
            for chunk in range(0, chunks):
                owner = tl.load(owner_ptr + chunk)
                for j in tl.static_range(K):
                    route = tl.load(routes_ptr + (owner * BRANCHES + branch) * K + j, mask=owner >= 0, other=-1)
                    p_part = B_part_ptr + ((wide(chunk) * BRANCHES + branch) * K + j) * k * R + o_b
                    b_dB += tl.load(p_part, mask=inside & (route == expert), other=0)
            if ADAPTIVE:
                b_dB += b_I[:, None] * b_c[None, :]
            tl.store(dB_ptr + wide(expert) * k * R + o_b, b_dB.to(dB_ptr.dtype.element_ty), mask=inside)
        if ADAPTIVE and WANT_I:
            b_B = tl.load(B_ptr + wide(expert) * k * R + o_b, mask=inside, other=0).to(tl.float32)
            b_dI += tl.sum(b_B * b_c[None, :], 1)
    if ADAPTIVE and WANT_I:
        tl.store(dI_ptr + o_k, b_dI.to(dI_ptr.dtype.element_ty), mask=m_k)


def grad_output(
    g: Tensor,
    h: Tensor,
    w: Tensor,
    routes: Tensor,
    gates: Tensor,
    lead: Tensor,
    vu_B: Tensor,
    if_B: Tensor,
    vu_importance: Tensor,
    if_importance: Tensor,
    instances: int,
    cu_seqlens: Tensor | None,
    scaling: float,
    fusion: str,
    need_dh: bool,
    need_vu_B: bool,
    need_if_B: bool,
    need_importance: bool,
    need_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dh, dvu_B, dif_B, dvu_importance, dif_importance, dgates), as in `smolora.rank_space.grad_output`."""
    (T, k), n = g.shape, instances
    (M, _, r), N, top_k = vu_B.shape, if_B.shape[0], routes.shape[2]
    (use_vu, use_if), adaptive = branches(fusion), fusion == "adaptive"
    both, packed, S = use_vu + use_if, cu_seqlens is not None, T // max(n, 1)
    need = wanted(fusion, need_dh, need_vu_B, need_if_B, need_importance, need_gates)
    need_B = need.vu_B or need.if_B
    card = tiles.card_of(g.device)
    tile = tiles.choose_tile("grad_output", r, top_k, g.dtype, card.capability)
    RP, KP = tiles.rank_columns(r), tiles.next_power(top_k)
    blocks = tiles.cdiv(KP * RP, tile.BC)
    one_read = 2 * KP * RP <= tiles.MAX_ONE_READ_COLUMNS
    cu = routes if cu_seqlens is None else cu_seqlens
    float32 = dict(dtype=torch.float32, device=g.device)
    int32 = dict(dtype=torch.int32, device=g.device)
    dh, dgates = empty_if(need.p, h), empty_if(need_gates, gates)
    dB = empty_if(need.vu_B, vu_B), empty_if(need.if_B, if_B)
    dI = empty_if(need.importance, vu_importance), empty_if(need.importance, if_importance)

    k_blocks = tiles.cdiv(k, tile.BD)
    chunk = tiles.chunk_tokens(T, n, k_blocks, tile.BT, card.processors)
    chunks = tiles.tile_count(T, n, chunk, packed)
    vu_part = if_part = B_part = dh
    chunk_owner = torch.empty(chunks, **int32)
    if need.p and one_read:
        vu_part = torch.empty((k_blocks, T, top_k * r) if use_vu else 0, **float32)
        if_part = torch.empty((k_blocks, T, top_k * r) if use_if else 0, **float32)
        parts = k_blocks
    elif need.p:
        vu_part, if_part, parts = shrink(
            g, vu_B, if_B, routes, n, cu_seqlens, fusion, r=r, strides=(k * r, 1, r)
        )  # fmt: skip
    if need_B:
        B_part = torch.empty((chunks, both, top_k, k, r), **float32)
    if chunks and (need_B or (need.p and one_read)):
        grad_output_kernel[(k_blocks, chunks, blocks)](
            g, h, routes, gates, lead, vu_B, if_B, cu, vu_part, if_part, B_part, chunk_owner, T, n, S, k, scaling,
            R=r, RP=RP, K=top_k, BT=tile.BT, BK=tile.BD, BC=tile.BC, CHUNK=chunk, VU=use_vu, IF=use_if,
            P=need.p and one_read, VU_B=need.vu_B, IF_B=need.if_B, VARLEN=packed, IEEE=g.dtype == torch.float32,
            **tile.options(),
        )  # fmt: skip
    c = torch.empty((M + N if need.c else 0, r), **float32)
    if need.p:
        mix_tile = tiles.choose_tile("mix_backward", r, top_k, g.dtype, card.capability)
        number = tiles.tile_count(T, n, mix_tile.BT, packed)
        tile_owner = torch.empty(number, **int32)
        c_part = torch.empty((number if adaptive else 0, both, top_k, r), **float32)
        dq_part = torch.empty((number if need_gates else 0, both, top_k, r), **float32)
        if number:
            mix_backward_kernel[(number,)](
                vu_part, if_part, h, w, routes, gates, lead, cu, dh, c_part, dq_part, tile_owner, parts, T, n, S,
                scaling, M=M, R=r, RP=RP, K=top_k, BT=mix_tile.BT, BC=mix_tile.BC,
                BLOCKS=tiles.cdiv(KP * RP, mix_tile.BC), VU=use_vu, IF=use_if, ADAPTIVE=adaptive, GATES=need_gates,
                VARLEN=packed, **mix_tile.options(),
            )  # fmt: skip
        programs = c.shape[0] + dgates.shape[0]
        if programs:
            _collect[(programs,)](
                c_part, dq_part, tile_owner, routes, c, dgates, number,
                M=M, N=N, R=r, RP=RP, K=top_k, BRANCHES=both, TILES=64, C=need.c, **tiles.SMALL,
            )  # fmt: skip
    for branch, (B, importance, want) in enumerate(
        ((vu_B, vu_importance, need.vu_B), (if_B, if_importance, need.if_B))
    ):
        if not (want or need.importance):
            continue
        BK = tiles.collect_rows(r)
        _collect_B[(tiles.cdiv(k, BK),)](
            B_part, chunk_owner, routes, c, B, importance, dB[branch], dI[branch], chunks, k, scaling,
            branch if both == 2 else 0, M if branch else 0,
            E=B.shape[0], R=r, RP=RP, K=top_k, BRANCHES=both, BK=BK, ADAPTIVE=need.c, WANT_B=want,
            WANT_I=need.importance, **tiles.SMALL,
        )  # fmt: skip
    return dh if need_dh else torch.empty(0, **float32), *dB, *dI, dgates
