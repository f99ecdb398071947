"""From rank space back to the input: dx and the gradients of A, from one read of x.

Kernels, in the order they run:

    grad_input_kernel  the pass over x: dx, and partial dA of a chunk of tokens
    _collect_A         dA of every expert

A program holds a block of d and a chunk of one instance's tokens, keeps dA in registers and writes dx. When the chosen
experts have too many columns to hold, it runs twice: for dx over all column blocks, and for dA with a program for each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import branches, empty_if
from . import tiles
from .common import columns, keep_mask, locate, per_slot, wide


@triton.jit
def load_A(A_ptr, p_routes, slot, rank, o_d, m_d, d, K: tl.constexpr, R: tl.constexpr):
    """A block of the chosen down projections of a branch, [BC, BD]."""
    expert = per_slot(p_routes, slot, K, 0)
    p_a = A_ptr + ((expert * R + rank).to(tl.int64) * d)[:, None] + o_d[None, :]
    return tl.load(p_a, mask=((slot < K) & (rank < R))[:, None] & m_d[None, :], other=0)


@triton.jit(do_not_specialize=["n", "S"])
def grad_input_kernel(
    x_ptr,  # (T, d)
    dh_ptr,  # (T, b, K, R)
    routes_ptr,  # (n, b, K)
    vu_A_ptr,  # (M, R, d)
    if_A_ptr,  # (N, R, d)
    cu_ptr,  # (n + 1,)
    mask_ptr,  # (T,) bool
    dmean_ptr,  # (n, d): gradient of the mean, divided by the number of routed tokens
    seed_ptr,
    dx_ptr,  # (T, d) out
    A_part_ptr,  # (chunks, b, K, R, d) out
    owner_ptr,  # (chunks,) out: the chunk's instance, -1 if it has no token
    n,
    S,
    d,
    scale,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    VU: tl.constexpr,
    IF: tl.constexpr,
    DX: tl.constexpr,
    VU_A: tl.constexpr,
    IF_A: tl.constexpr,
    ROUTER: tl.constexpr,
    MASKED: tl.constexpr,
    VARLEN: tl.constexpr,
    THRESHOLD: tl.constexpr,
    IEEE: tl.constexpr,
):
    """Grid (blocks of d, chunks, column blocks or 1): CHUNK tokens of one instance by BD inputs.

    BLOCKS column blocks are read for dx; dA has one block in registers, so wants BLOCKS = 1 or DX off.
    """
    PRECISION: tl.constexpr = "ieee" if IEEE else "tf32"
    STRIDE: tl.constexpr = (VU + IF) * K * R
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    i_d = tl.program_id(0)
    chunk = tl.program_id(1)
    own = tl.program_id(2)
    i_n, j, start, end = locate(chunk, cu_ptr, n, S, CHUNK, 1, VARLEN)
    start += j * CHUNK
    end = tl.minimum(end, start + CHUNK)
    if i_d == 0 and own == 0:
        tl.store(owner_ptr + chunk, tl.where(start < end, i_n, -1))
    if start >= end:
        return
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < d
    p_routes = routes_ptr + i_n * (VU + IF) * K
    slot, rank = columns(own, BC, RP)
    m_c = (slot < K) & (rank < R)
    if DX and BLOCKS == 1:
        if VU:
            a_v = load_A(vu_A_ptr, p_routes, slot, rank, o_d, m_d, d, K, R).to(dtype)
        if IF:
            a_i = load_A(if_A_ptr, p_routes + VU * K, slot, rank, o_d, m_d, d, K, R).to(dtype)
    if ROUTER:
        b_dmean = tl.load(dmean_ptr + wide(i_n) * d + o_d, mask=m_d, other=0)
    if VU_A:
        d_v = tl.zeros([BC, BD], tl.float32)
    if IF_A:
        d_i = tl.zeros([BC, BD], tl.float32)

    for t in range(start, end, BT):
        rows = t + tl.arange(0, BT)
        inside = rows < end
        m_x = inside[:, None] & m_d[None, :]
        if THRESHOLD > 0:
            if VU:
                keep_v = keep_mask(seed_ptr, rows, i_d * BD, THRESHOLD, 0, BT, BD)
            if IF:
                keep_i = keep_mask(seed_ptr, rows, i_d * BD, THRESHOLD, 1, BT, BD)
        if VU_A or IF_A:
            b_x = tl.load(x_ptr + rows[:, None] * d + o_d[None, :], mask=m_x, other=0)
        if DX:
            b_dx = tl.zeros([BT, BD], tl.float32)
            if THRESHOLD > 0 and VU and IF:
                x_i = tl.zeros([BT, BD], tl.float32)
            for block in tl.static_range(BLOCKS):
                if BLOCKS > 1:
                    slot, rank = columns(block, BC, RP)
                    m_c = (slot < K) & (rank < R)
                p_h = dh_ptr + rows[:, None] * STRIDE + (slot * R + rank)[None, :]
                if VU:
                    if BLOCKS > 1:
                        a_v = load_A(vu_A_ptr, p_routes, slot, rank, o_d, m_d, d, K, R).to(dtype)
                    b_dh = tl.load(p_h, mask=inside[:, None] & m_c[None, :], other=0).to(dtype)
                    b_dx = tl.dot(b_dh, a_v, b_dx, input_precision=PRECISION)
                if IF:
                    if BLOCKS > 1:
                        a_i = load_A(if_A_ptr, p_routes + VU * K, slot, rank, o_d, m_d, d, K, R).to(dtype)
                    b_dh = tl.load(p_h + VU * K * R, mask=inside[:, None] & m_c[None, :], other=0).to(dtype)
                    if THRESHOLD > 0 and VU:  # its own mask, so its own sum
                        x_i = tl.dot(b_dh, a_i, x_i, input_precision=PRECISION)
                    else:
                        b_dx = tl.dot(b_dh, a_i, b_dx, input_precision=PRECISION)
            if THRESHOLD > 0:
                if VU and IF:
                    b_dx = tl.where(keep_v, b_dx, 0.0) + tl.where(keep_i, x_i, 0.0)
                elif VU:
                    b_dx = tl.where(keep_v, b_dx, 0.0)
                else:
                    b_dx = tl.where(keep_i, b_dx, 0.0)
            b_dx = b_dx * scale
            if ROUTER:
                routed = inside
                if MASKED:
                    routed = tl.load(mask_ptr + rows, mask=inside, other=0) != 0
                b_dx += tl.where(routed[:, None], b_dmean[None, :], 0.0)
            tl.store(dx_ptr + rows[:, None] * d + o_d[None, :], b_dx.to(dtype), mask=m_x)
        if VU_A:
            p_h = dh_ptr + rows[:, None] * STRIDE + (slot * R + rank)[None, :]
            b_dh = tl.load(p_h, mask=inside[:, None] & m_c[None, :], other=0).to(dtype)
            b_kept = b_x
            if THRESHOLD > 0:
                b_kept = tl.where(keep_v, b_x, 0.0).to(dtype)
            d_v = tl.dot(tl.trans(b_dh), b_kept, d_v, input_precision=PRECISION)
        if IF_A:
            p_h = dh_ptr + rows[:, None] * STRIDE + (VU * K * R + slot * R + rank)[None, :]
            b_dh = tl.load(p_h, mask=inside[:, None] & m_c[None, :], other=0).to(dtype)
            b_kept = b_x
            if THRESHOLD > 0:
                b_kept = tl.where(keep_i, b_x, 0.0).to(dtype)
            d_i = tl.dot(tl.trans(b_dh), b_kept, d_i, input_precision=PRECISION)

    m_a = m_c[:, None] & m_d[None, :]
    o_a = ((wide(chunk) * (VU + IF) * K + slot) * R + rank)[:, None] * d + o_d[None, :]
    if VU_A:
        tl.store(A_part_ptr + o_a, d_v * scale, mask=m_a)
    if IF_A:
        tl.store(A_part_ptr + o_a + wide(VU * K * R) * d, d_i * scale, mask=m_a)


@triton.jit(do_not_specialize=["chunks"])
def _collect_A(
    A_part_ptr,  # (chunks, b, K, R, d)
    owner_ptr,  # (chunks,)
    routes_ptr,  # (n, b, K)
    dA_ptr,  # (E, R, d) out, of the branch
    chunks,
    size,
    branch,
    K: tl.constexpr,
    BRANCHES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (E, blocks of R * d): dA_e is the sum of its chunks' parts; `branch` counts the branches in use."""
    expert = tl.program_id(0)
    o = wide(tl.program_id(1)) * BLOCK + tl.arange(0, BLOCK)
    b_dA = tl.zeros([BLOCK], tl.float32)
    for chunk in range(0, chunks):
        owner = tl.load(owner_ptr + chunk)
        for j in tl.static_range(K):
            route = tl.load(routes_ptr + (owner * BRANCHES + branch) * K + j, mask=owner >= 0, other=-1)
            p_part = A_part_ptr + ((wide(chunk) * BRANCHES + branch) * K + j) * size + o
            b_dA += tl.load(p_part, mask=(o < size) & (route == expert), other=0)
    tl.store(dA_ptr + wide(expert) * size + o, b_dA.to(dA_ptr.dtype.element_ty), mask=o < size)


def grad_input(
    x: Tensor | None,
    dh: Tensor,
    routes: Tensor,
    vu_A: Tensor,
    if_A: Tensor,
    instances: int,
    cu_seqlens: Tensor | None,
    route_mask: Tensor | None,
    dmean: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    fusion: str,
    dtype: torch.dtype,
    need_dx: bool,
    need_vu_A: bool,
    need_if_A: bool,
    g: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dvu_A, dif_A); arguments and results as in `smolora.rank_space.grad_input`."""
    T, n, top_k = dh.shape[0], instances, routes.shape[2]
    _, r, d = vu_A.shape
    use_vu, use_if = branches(fusion)
    both, packed = use_vu + use_if, cu_seqlens is not None
    need_vu_A, need_if_A = need_vu_A and use_vu, need_if_A and use_if
    need_A = need_vu_A or need_if_A
    card = tiles.card_of(dh.device)
    tile = tiles.choose_tile("grad_input", r, top_k, dtype, card.capability)
    RP, KP = tiles.rank_columns(r), tiles.next_power(top_k)
    blocks = tiles.cdiv(KP * RP, tile.BC)
    dx = dh.new_empty((T, d) if need_dx else 0, dtype=dtype)
    d_blocks = tiles.cdiv(d, tile.BD)
    chunk = tiles.chunk_tokens(T, n, d_blocks, tile.BT, card.processors)
    chunks = tiles.tile_count(T, n, chunk, packed)
    A_part = dh.new_empty((chunks, both, top_k, r, d) if need_A else 0)
    owner = torch.empty(chunks, dtype=torch.int32, device=dh.device)

    def launch(columns: int, blocks: int, want_dx: bool, want_vu_A: bool, want_if_A: bool) -> None:
        grad_input_kernel[(d_blocks, chunks, columns)](
            dx if x is None else x, dh, routes, vu_A, if_A, routes if cu_seqlens is None else cu_seqlens,
            routes if route_mask is None else route_mask.view(torch.uint8), dh if dmean is None else dmean,
            routes if seed is None else seed, dx, A_part, owner, n, T // max(n, 1), d, 256 / (256 - threshold),
            R=r, RP=RP, K=top_k, BT=tile.BT, BD=tile.BD, BC=tile.BC, BLOCKS=blocks, CHUNK=chunk, VU=use_vu, IF=use_if,
            DX=want_dx, VU_A=want_vu_A, IF_A=want_if_A, ROUTER=dmean is not None, MASKED=route_mask is not None,
            VARLEN=packed, THRESHOLD=threshold, IEEE=dtype == torch.float32, **tile.options(),
        )  # fmt: skip

    if chunks and blocks == 1 and (need_dx or need_A):
        launch(1, 1, need_dx, need_vu_A, need_if_A)
    elif chunks:
        if need_dx:
            launch(1, blocks, True, False, False)
        if need_A:
            launch(blocks, 1, False, need_vu_A, need_if_A)
    dA = empty_if(need_vu_A, vu_A), empty_if(need_if_A, if_A)
    for branch, (A, want) in enumerate(((vu_A, need_vu_A), (if_A, need_if_A))):
        if want:
            _collect_A[(A.shape[0], tiles.cdiv(r * d, 1024))](
                A_part, owner, routes, dA[branch], chunks, r * d, branch if both == 2 else 0,
                K=top_k, BRANCHES=both, BLOCK=1024, **tiles.SMALL,
            )  # fmt: skip
    if need_dx and weight is not None:
        dx.addmm_(g, weight)
    return dx, *dA
