"""Route each instance and bring its tokens into rank space: one read of x.

Five kernels, in the order they run:

    _prepare   IF routing, the routed tokens of each instance, and partial sums of w = s B^T I
    _shrink    the pass over x: A x of every VU expert (or of the chosen) and the chosen IF experts, and column sums
    _route     the mean of x over routed tokens, and partial router logits
    _finish    VU routing, and h of the chosen experts
    _add_w     the parts of w, added

The VU route is known only when all of an instance has been read, so one pass computes all VU experts; when they have
too many columns for that, a first pass takes the column sums alone and a second one the chosen experts. A route must
not depend on batch or padding: tiles are laid from an instance's first routed token, and all sums over tokens and
columns run in an order that only the instance and the layer set.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import branches, new_rank_space, new_routing
from . import tiles
from .common import columns, keep_mask, locate, per_slot, tile_base, top_k, wide

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit(do_not_specialize=["n", "S"])
def _prepare(
    instruction_ptr,  # (n, e)
    if_router_ptr,  # (N, e)
    mask_ptr,  # (T,) bool
    cu_ptr,  # (n + 1,)
    routed_ptr,  # (n, 2) out: the first routed token, and how many there are
    routes_ptr,  # (n, b, K) out
    gates_ptr,  # (n, b, K) out
    logits_ptr,  # (n, M + N) out
    vu_B_ptr,  # (M, k, R)
    if_B_ptr,  # (N, k, R)
    vu_importance_ptr,  # (k,)
    if_importance_ptr,  # (k,)
    w_part_ptr,  # (W, M + N, R) out
    n,
    S,
    k,
    e,
    scaling,
    M: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BE: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    ROUTE_VU: tl.constexpr,
    ROUTE_IF: tl.constexpr,
    BRANCHES: tl.constexpr,
    MASKED: tl.constexpr,
    VARLEN: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Grid (n + (M + N) * W): a program an instance, then one for an expert's part of w."""
    pid = tl.program_id(0)
    if pid < n:
        if ROUTE_VU:
            if VARLEN:
                start = tl.load(cu_ptr + pid).to(tl.int64)
                length = tl.load(cu_ptr + pid + 1).to(tl.int64) - start
            else:
                start = wide(pid) * S
                length = wide(S)
            first = wide(0)
            count = length
            if MASKED:
                count = wide(0)
                first = length
                for s in range(0, length, BS):
                    o_s = s + tl.arange(0, BS)
                    b_m = tl.load(mask_ptr + start + o_s, mask=o_s < length, other=0) != 0
                    count += tl.sum(b_m.to(tl.int64), 0)
                    first = tl.minimum(first, tl.min(tl.where(b_m, o_s, length), 0))
            tl.store(routed_ptr + pid * 2, first)
            tl.store(routed_ptr + pid * 2 + 1, count)
        if ROUTE_IF:
            o_n = tl.arange(0, NP)
            b_z = tl.zeros([NP], tl.float32)
            for i in range(0, e, BE):
                o_e = i + tl.arange(0, BE)
                b_i = tl.load(instruction_ptr + wide(pid) * e + o_e, mask=o_e < e, other=0).to(tl.float32)
                p_r = if_router_ptr + o_n[:, None] * e + o_e[None, :]
                b_r = tl.load(p_r, mask=(o_n[:, None] < N) & (o_e[None, :] < e), other=0).to(tl.float32)
                b_z += tl.sum(b_r * b_i[None, :], 1)
            b_route, b_gate = top_k(b_z, N, NP, K, KP)
            o_slot = tl.arange(0, KP)
            p_slot = (pid * BRANCHES + BRANCHES - 1) * K + o_slot
            tl.store(routes_ptr + p_slot, b_route, mask=o_slot < K)
            tl.store(gates_ptr + p_slot, b_gate, mask=o_slot < K)
            tl.store(logits_ptr + pid * (M + N) + M + o_n, b_z, mask=o_n < N)
    else:
        i_e = (pid - n) % (M + N)
        part = (pid - n) // (M + N)
        o_k = part * BK + tl.arange(0, BK)
        o_r = tl.arange(0, RP)
        inside = (o_k[:, None] < k) & (o_r[None, :] < R)
        if i_e < M:
            p_B = vu_B_ptr + wide(i_e) * k * R
            p_I = vu_importance_ptr
        else:
            p_B = if_B_ptr + wide(i_e - M) * k * R
            p_I = if_importance_ptr
        b_B = tl.load(p_B + o_k[:, None].to(tl.int64) * R + o_r[None, :], mask=inside, other=0)
        b_I = tl.load(p_I + o_k, mask=o_k < k, other=0)
        b_w = scaling * tl.sum(b_B.to(ROUND).to(tl.float32) * b_I.to(ROUND).to(tl.float32)[:, None], 0)
        tl.store(w_part_ptr + wide(pid - n) * R + o_r, b_w, mask=o_r < R)


@triton.jit(do_not_specialize=["T", "n", "S"])
def shrink_kernel(
    x_ptr,  # (T, d)
    vu_A_ptr,  # (M, R, d) by strides
    if_A_ptr,  # (N, R, d) by strides
    vu_part_ptr,  # (KS, T, V * R) out
    if_part_ptr,  # (KS, T, K * R) out
    sums_ptr,  # (tiles, d) out: column sums over the routed tokens of a tile
    mask_ptr,  # (T,) bool
    cu_ptr,  # (n + 1,)
    routed_ptr,  # (n, 2)
    routes_ptr,  # (n, b, K)
    seed_ptr,
    T,
    n,
    S,
    d,
    stride_e,
    stride_r,
    stride_d,
    R: tl.constexpr,
    RP: tl.constexpr,
    V: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BI: tl.constexpr,
    ALL: tl.constexpr,
    VU: tl.constexpr,
    IF: tl.constexpr,
    BRANCHES: tl.constexpr,
    SUM: tl.constexpr,
    MASKED: tl.constexpr,
    VARLEN: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SLACK: tl.constexpr,
    IEEE: tl.constexpr,
):
    """Grid (tiles, parts of d, column blocks): a program has one tile of tokens, a part of d and a block of columns.

    ALL: the V slots of the VU branch are all experts, 0 to M - 1; else they are the K chosen ones.
    """
    PRECISION: tl.constexpr = "ieee" if IEEE else "tf32"
    tile = tl.program_id(0)
    i_s = tl.program_id(1)
    block = tl.program_id(2)
    i_n, j, start, end = locate(tile, cu_ptr, n, S, BT, SLACK, VARLEN)
    offset = 0
    if SUM and MASKED:  # lay the tiles from the first routed token: left padding must not move a sum
        offset = ((BT - tl.load(routed_ptr + i_n * 2) % BT) % BT).to(tl.int32)
    rows = start + j * BT - offset + tl.arange(0, BT)
    inside = (rows >= start) & (rows < end)
    if tl.max(inside.to(tl.int32), 0) == 0 and not SUM:
        return

    if VU:
        slot_v, rank_v = columns(block, BV, RP)
        column_v = (slot_v < V) & (rank_v < R)
        if ALL:
            expert_v = slot_v
        else:
            expert_v = per_slot(routes_ptr + i_n * BRANCHES * K, slot_v, K, 0)
        p_v = vu_A_ptr + expert_v.to(tl.int64) * stride_e + rank_v * stride_r
        b_v = tl.zeros([BT, BV], tl.float32)
    if IF:
        slot_i, rank_i = columns(block, BI, RP)
        column_i = (slot_i < K) & (rank_i < R)
        expert_i = per_slot(routes_ptr + (i_n * BRANCHES + BRANCHES - 1) * K, slot_i, K, 0)
        p_i = if_A_ptr + expert_i.to(tl.int64) * stride_e + rank_i * stride_r
        b_i = tl.zeros([BT, BI], tl.float32)
    if SUM:
        routed = inside
        if MASKED:
            routed = tl.load(mask_ptr + rows, mask=inside, other=0) != 0
        b_m = ((tl.arange(0, 16)[:, None] == 0) & routed[None, :]).to(x_ptr.dtype.element_ty)  # [16, BT]

    span = tl.cdiv(tl.cdiv(d, BD), tl.num_programs(1)) * BD
    for c in range(i_s * span, tl.minimum(d, (i_s + 1) * span), BD):
        o_d = c + tl.arange(0, BD)
        m_d = o_d < d
        b_x = tl.load(x_ptr + rows[:, None] * d + o_d[None, :], mask=inside[:, None] & m_d[None, :], other=0)
        o_a = o_d[:, None].to(tl.int64) * stride_d
        if SUM:
            b_seen = b_x
            if MASKED:  # a NaN in the padding is nobody's, but 0 times it is one
                b_seen = tl.where(routed[:, None], b_x, 0.0).to(b_x.dtype)
            if IEEE:  # no tensor core adds float32 exactly
                b_sum = tl.sum(b_seen, 0)
            else:
                b_sum = tl.sum(tl.dot(b_m, b_seen), 0)  # one row is not zero
            if block == 0:
                tl.store(sums_ptr + wide(tile) * d + o_d, b_sum, mask=m_d)
        if VU:
            b_a = tl.load(p_v[None, :] + o_a, mask=m_d[:, None] & column_v[None, :], other=0).to(b_x.dtype)
            b_kept = b_x
            if THRESHOLD > 0:
                b_kept = tl.where(keep_mask(seed_ptr, rows, c, THRESHOLD, 0, BT, BD), b_x, 0.0).to(b_x.dtype)
            b_v = tl.dot(b_kept, b_a, b_v, input_precision=PRECISION)
        if IF:
            b_a = tl.load(p_i[None, :] + o_a, mask=m_d[:, None] & column_i[None, :], other=0).to(b_x.dtype)
            b_kept = b_x
            if THRESHOLD > 0:
                b_kept = tl.where(keep_mask(seed_ptr, rows, c, THRESHOLD, 1, BT, BD), b_x, 0.0).to(b_x.dtype)
            b_i = tl.dot(b_kept, b_a, b_i, input_precision=PRECISION)

    o_t = wide(i_s) * T + rows
    if VU:
        p_out = vu_part_ptr + o_t[:, None] * (V * R) + (slot_v * R + rank_v)[None, :]
        tl.store(p_out, b_v, mask=inside[:, None] & column_v[None, :])
    if IF:
        p_out = if_part_ptr + o_t[:, None] * (K * R) + (slot_i * R + rank_i)[None, :]
        tl.store(p_out, b_i, mask=inside[:, None] & column_i[None, :])


@triton.jit(do_not_specialize=["S"])
def _route(
    sums_ptr,  # (tiles, d)
    routed_ptr,  # (n, 2)
    vu_router_ptr,  # (M, d)
    cu_ptr,  # (n + 1,)
    mean_ptr,  # (n, d) out
    z_ptr,  # (n, slices, MP) out: partial logits
    S,
    d,
    M: tl.constexpr,
    MP: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    SLACK: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """Grid (n, slices of d): the mean of an instance's routed tokens over a slice of BD columns, and its logits."""
    i_n = tl.program_id(0)
    i_d = tl.program_id(1)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < d
    base = tile_base(i_n, cu_ptr, S, BT, SLACK, VARLEN)
    length = S
    if VARLEN:
        length = tl.load(cu_ptr + i_n + 1) - tl.load(cu_ptr + i_n)
    first = tl.load(routed_ptr + i_n * 2)
    offset = ((BT - first % BT) % BT).to(tl.int32)
    b_sum = tl.zeros([BD], tl.float32)
    for t in range(base, base + tl.cdiv(length + offset, BT)):
        b_sum += tl.load(sums_ptr + wide(t) * d + o_d, mask=m_d, other=0)
    b_mean = b_sum / tl.maximum(tl.load(routed_ptr + i_n * 2 + 1), 1).to(tl.float32)
    tl.store(mean_ptr + wide(i_n) * d + o_d, b_mean, mask=m_d)
    o_m = tl.arange(0, MP)
    p_r = vu_router_ptr + o_m[:, None].to(tl.int64) * d + o_d[None, :]
    b_r = tl.load(p_r, mask=(o_m[:, None] < M) & m_d[None, :], other=0).to(tl.float32)
    tl.store(z_ptr + (i_n * tl.num_programs(1) + i_d) * MP + o_m, tl.sum(b_r * b_mean[None, :], 1))


@triton.jit(do_not_specialize=["slices"])
def _choose(
    z_ptr,  # (n, slices, MP)
    routes_ptr,  # (n, b, K) out
    gates_ptr,  # (n, b, K) out
    logits_ptr,  # (n, M + N) out
    slices,
    M: tl.constexpr,
    MP: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    BRANCHES: tl.constexpr,
):
    """Grid (n,): VU routing of an instance from its partial logits."""
    i_n = tl.program_id(0)
    o_m = tl.arange(0, MP)
    b_z = tl.zeros([MP], tl.float32)
    for i in range(0, slices):
        b_z += tl.load(z_ptr + (i_n * slices + i) * MP + o_m)
    b_route, b_gate = top_k(b_z, M, MP, K, KP)
    o_k = tl.arange(0, KP)
    tl.store(routes_ptr + i_n * BRANCHES * K + o_k, b_route, mask=o_k < K)
    tl.store(gates_ptr + i_n * BRANCHES * K + o_k, b_gate, mask=o_k < K)
    tl.store(logits_ptr + i_n * (M + N) + o_m, b_z, mask=o_m < M)


@triton.jit(do_not_specialize=["T", "n", "S", "tiles", "W"])
def _finish(
    vu_part_ptr,  # (KS, T, V * R)
    if_part_ptr,  # (KS, T, K * R)
    routes_ptr,  # (n, b, K)
    w_part_ptr,  # (W, M + N, R)
    cu_ptr,  # (n + 1,)
    h_ptr,  # (T, b, K, R) out
    w_ptr,  # (M + N, R) out
    tiles,
    T,
    n,
    S,
    W,
    scale,
    E: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    V: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BLOCKS: tl.constexpr,
    KS: tl.constexpr,
    ALL: tl.constexpr,
    VU: tl.constexpr,
    IF: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """Grid (tiles + M + N): add the parts of the chosen experts' columns, times dropout's scale; then those of w."""
    pid = tl.program_id(0)
    if pid < tiles:
        i_n, j, start, end = locate(pid, cu_ptr, n, S, BT, 1, VARLEN)
        rows = start + j * BT + tl.arange(0, BT)
        inside = rows < end
        b_routes: tl.constexpr = VU + IF
        for block in tl.static_range(BLOCKS):
            slot, rank = columns(block, BC, RP)
            m_c = inside[:, None] & ((slot < K) & (rank < R))[None, :]
            o_h = rows[:, None] * (b_routes * K * R) + (slot * R + rank)[None, :]
            if VU:
                source = slot
                if ALL:
                    source = per_slot(routes_ptr + i_n * b_routes * K, slot, K, 0)
                b_h = tl.zeros([BT, BC], tl.float32)
                for i in tl.static_range(KS):
                    p_part = vu_part_ptr + (rows[:, None] + wide(i) * T) * (V * R)
                    b_h += tl.load(p_part + (source * R + rank)[None, :], mask=m_c, other=0)
                tl.store(h_ptr + o_h, b_h * scale, mask=m_c)
            if IF:
                b_h = tl.zeros([BT, BC], tl.float32)
                for i in tl.static_range(KS):
                    p_part = if_part_ptr + (rows[:, None] + wide(i) * T) * (K * R)
                    b_h += tl.load(p_part + (slot * R + rank)[None, :], mask=m_c, other=0)
                tl.store(h_ptr + o_h + VU * K * R, b_h * scale, mask=m_c)
    else:
        o_r = tl.arange(0, RP)
        b_w = tl.zeros([RP], tl.float32)
        for i in range(0, W):
            b_w += tl.load(w_part_ptr + (i * E + pid - tiles) * R + o_r, mask=o_r < R, other=0)
        tl.store(w_ptr + (pid - tiles) * R + o_r, b_w, mask=o_r < R)


def shrink(
    x: Tensor,
    vu_A: Tensor,
    if_A: Tensor,
    routes: Tensor,
    instances: int,
    cu_seqlens: Tensor | None,
    fusion: str,
    *,
    r: int,
    strides: tuple[int, int, int],
    experts: int | None = None,
    sums: tuple[Tensor, Tensor] | None = None,
    route_mask: Tensor | None = None,
    seed: Tensor | None = None,
    threshold: int = 0,
    columns: bool = True,
) -> tuple[Tensor, Tensor, int]:
    """Launch the pass over x: parts (KS, T, slots * r) of the VU and of the IF branch's A x, and KS.

    Args:
        strides: of vu_A and if_A between experts, ranks and inputs.
        experts: M, to compute all VU experts; None for the chosen ones in `routes` (n, b, K).
        sums: (column sums (tiles, d) out, routed tokens (n, 2)), to sum too.
        columns: False to sum only.
    """
    (T, d), top_k = x.shape, routes.shape[2]
    card = tiles.card_of(x.device)
    tile = tiles.choose_tile("shrink", r, experts or top_k, x.dtype, card.capability)
    RP = tiles.rank_columns(r)
    V = experts or top_k
    slack = 2 if sums is not None and route_mask is not None else 1
    number = tiles.tile_count(T, instances, tile.BT, cu_seqlens is not None, slack)
    use_vu, use_if = columns and fusion != "if", columns and fusion != "vu"
    BI = min(tiles.next_power(top_k) * RP, tile.BC)
    blocks = max(tiles.cdiv(V * RP, tile.BC), tiles.cdiv(top_k * RP, BI))
    KS = tiles.splits(number * blocks, d, 4 * tile.BD, card.processors)
    vu_part = x.new_empty((KS, T, V * r) if use_vu else 0, dtype=torch.float32)
    if_part = x.new_empty((KS, T, top_k * r) if use_if else 0, dtype=torch.float32)
    sums_out, routed = (vu_part, routes) if sums is None else sums
    shrink_kernel[(number, KS, blocks if columns else 1)](
        x, vu_A, if_A, vu_part, if_part, sums_out, x if route_mask is None else route_mask.view(torch.uint8),
        routes if cu_seqlens is None else cu_seqlens, routed, routes, routes if seed is None else seed,
        T, instances, T // max(instances, 1), d, *strides,
        R=r, RP=RP, V=V, K=top_k, BT=tile.BT, BD=tile.BD, BV=tile.BC, BI=BI, ALL=experts is not None,
        VU=use_vu, IF=use_if, BRANCHES=routes.shape[1], SUM=sums is not None, MASKED=slack == 2,
        VARLEN=cu_seqlens is not None, THRESHOLD=threshold, SLACK=slack, IEEE=x.dtype == torch.float32,
        **tile.options(),
    )  # fmt: skip
    return vu_part, if_part, KS


def route_shrink(
    x: Tensor,
    instances: int,
    cu_seqlens: Tensor | None,
    route_mask: Tensor | None,
    instruction: Tensor | None,
    given_routes: Tensor | None,
    given_gates: Tensor | None,
    vu_A: Tensor,
    if_A: Tensor,
    vu_B: Tensor,
    if_B: Tensor,
    vu_router: Tensor,
    if_router: Tensor,
    vu_importance: Tensor,
    if_importance: Tensor,
    seed: Tensor | None,
    threshold: int,
    top_k: int,
    scaling: float,
    fusion: str,
    need_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(h, w, routes, gates, logits, mean); arguments and results as in `smolora.rank_space.route_shrink`."""
    (T, d), n = x.shape, instances
    (M, r, _), N, k = vu_A.shape, if_A.shape[0], vu_B.shape[1]
    use_vu, use_if = branches(fusion)
    adaptive, packed = fusion == "adaptive", cu_seqlens is not None
    S, RP, KP = T // max(n, 1), tiles.rank_columns(r), tiles.next_power(top_k)
    MP, NP = max(2, tiles.next_power(M)), max(2, tiles.next_power(N))
    card = tiles.card_of(x.device)
    h, w = new_rank_space(x, M + N, r, top_k, fusion)
    mean = x.new_empty((0, 0), dtype=torch.float32)
    routed_here = given_routes is None
    routes, gates, logits = new_routing(x, n, M + N, top_k, fusion, given_routes, given_gates)
    logits.zero_()  # those of a branch that is not in use
    route_vu = routed_here and use_vu
    routed = torch.empty((n, 2), dtype=torch.int64, device=x.device)
    BK = tiles.prepare_rows(r)
    W = tiles.cdiv(k, BK) if adaptive else 0
    w_part = x.new_empty((W, M + N, r), dtype=torch.float32)
    cu = routes if cu_seqlens is None else cu_seqlens
    programs = (n if routed_here else 0) + (M + N) * W
    if programs:
        _prepare[(programs,)](
            x if instruction is None else instruction, if_router,
            x if route_mask is None else route_mask.view(torch.uint8), cu, routed, routes, gates, logits,
            vu_B, if_B, vu_importance, if_importance, w_part, n if routed_here else 0, S, k,
            if_router.shape[1], scaling, M=M, N=N, NP=NP, R=r, RP=RP, K=top_k, KP=KP, BE=128, BS=1024, BK=BK,
            ROUTE_VU=route_vu, ROUTE_IF=routed_here and use_if, BRANCHES=use_vu + use_if,
            MASKED=route_mask is not None, VARLEN=packed,
            ROUND=DTYPES[x.dtype], **tiles.SMALL,
        )  # fmt: skip
    one_pass = route_vu and M * RP <= tiles.MAX_ONE_PASS_COLUMNS
    arguments = (x, vu_A, if_A, routes, n, cu_seqlens, fusion)
    options = dict(r=r, strides=(r * d, d, 1), seed=seed, threshold=threshold)
    if route_vu:
        BT = tiles.choose_tile("shrink", r, M if one_pass else top_k, x.dtype, card.capability).BT
        slack = 1 if route_mask is None else 2
        sums = x.new_empty((tiles.tile_count(T, n, BT, packed, slack), d), dtype=torch.float32)
        parts = shrink(
            *arguments, **options, experts=M if one_pass else None, sums=(sums, routed), route_mask=route_mask,
            columns=one_pass,
        )  # fmt: skip
        BD = 512
        slices = tiles.cdiv(d, BD)
        mean = x.new_empty((n, d), dtype=torch.float32)
        z = x.new_empty((n, slices, MP), dtype=torch.float32)
        if n:
            _route[(n, slices)](sums, routed, vu_router, cu, mean, z, S, d, M=M, MP=MP, BT=BT, BD=BD, SLACK=slack,
                                VARLEN=packed, **tiles.SMALL)  # fmt: skip
            _choose[(n,)](z, routes, gates, logits, slices, M=M, MP=MP, N=N, K=top_k, KP=KP,
                          BRANCHES=use_vu + use_if, num_warps=1)  # fmt: skip
    if not one_pass:
        parts = shrink(*arguments, **options)
    vu_part, if_part, KS = parts
    tile = tiles.choose_tile("finish", r, top_k, x.dtype, card.capability)
    number = tiles.tile_count(T, n, tile.BT, packed)
    programs = number + (M + N if adaptive else 0)
    if programs:
        _finish[(programs,)](
            vu_part, if_part, routes, w_part, cu, h, w, number, T, n, S, W, 256 / (256 - threshold),
            E=M + N, R=r, RP=RP, V=M if one_pass else top_k, K=top_k, BT=tile.BT, BC=tile.BC,
            BLOCKS=tiles.cdiv(KP * RP, tile.BC), KS=KS, ALL=one_pass, VU=use_vu, IF=use_if, VARLEN=packed,
            **tile.options(),
        )  # fmt: skip
    return h, w, routes, gates, logits, mean if need_mean else x.new_empty((0, 0), dtype=torch.float32)
