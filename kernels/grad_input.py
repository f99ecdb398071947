"""dh -> dx, dA, and the gradient of a token router, with one read of x. docs/architecture.md explains the symbols.

Kernels, in the order they run:

    grad_input_kernel  the pass over x: dx, and partial dA and dR, summed over a chunk of tokens
    reduce_dA_kernel   dA of every expert, or dR: the sum over tokens, from the chunks' parts

A program has a block of d and a chunk of one sequence's tokens: it keeps its part of dA in registers and writes dx.
When the slots have too many columns for that, the kernel runs twice: for dx over all column blocks, and for dA with a
program for each block.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import card_of, cdiv, chunk_tokens, next_power_of_2, part_rounds, tile_count
from ..spec import empty_like_if, new_masks
from . import tiles
from .dropout import BITS, draw_masks, keep, keeps, load_mask
from .primitives import (
    sequences,
    slot_experts,
    slots_and_ranks,
    tile_span,
    to_int64,
    trained_columns,
    zero_tile,
)
from .products import chunks_at_once, sum_chunks


@triton.jit
def load_A(
    A_ptr,  # (E, R, d)
    ids_ptr,  # (n, b, K) or None
    i_n,
    slot,
    rank,
    o_d,
    d,
    bank: tl.constexpr,
    BANKS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
):
    """Load a block of the slots' down projections, [BC, BD]."""
    expert = slot_experts(ids_ptr, i_n, bank, slot, BANKS, K)
    p_a = A_ptr + ((expert * R + rank).to(tl.int64) * d)[:, None] + o_d[None, :]
    return tl.load(p_a, mask=((slot < K) & (rank < R))[:, None] & (o_d < d)[None, :], other=0)


@triton.jit
def load_dh(
    dh_ptr,  # (T, b, K, R)
    rows,
    inside,
    slot,
    rank,
    bank: tl.constexpr,
    BANKS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
):
    """Load a block of dh, [BT, BC]."""
    p_h = dh_ptr + rows[:, None] * (BANKS * K * R) + (bank * K * R + slot * R + rank)[None, :]
    return tl.load(p_h, mask=inside[:, None] & ((slot < K) & (rank < R))[None, :], other=0)


@triton.jit(do_not_specialize=["T", "num_seqs", "seq_len", "chunk_size", "first_chunk"])
def grad_input_kernel(
    x_ptr,  # (T, d), or None for dx alone
    dh_ptr,  # (T, b, K, R); K = 1 where the slots share an A
    A_ptrs,  # (E, R, d)
    trained_ptrs,  # bool (E,) or (1,), or None: all
    ids_ptr,  # (n, b, K) or None
    token_router_ptr,  # (Z, d) or None
    dlogits_ptr,  # (T, Z)
    cu_seqlens_ptr,  # (n + 1,) or None
    route_mask_ptr,  # (T,) bool or None
    dmean_ptr,  # (n, d), gradient of the mean over the number of routed tokens; or None
    masks_ptr,  # (b, T, words of 32 columns) or None: no dropout
    dx_ptr,  # (T, d) out, or None
    A_part_ptr,  # (chunks of this launch, b, K, R, d) out
    router_part_ptr,  # (chunks of this launch, Z, d) out, or None
    chunk_to_seq_ptr,  # (chunks,) out: the chunk's sequence, -1 if it has no token
    T,
    num_seqs,
    seq_len,
    chunk_size,
    first_chunk,
    d,
    words,
    scale,
    NEED_A: tl.constexpr,  # of each bank
    ANY_A: tl.constexpr,
    BANKS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    Z: tl.constexpr,
    ZP: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Grid (chunks * blocks of d, column blocks or 1): `chunk_size` tokens of one sequence by BD inputs.

    BLOCKS column blocks are read for dx. dA has only one of them in registers, so it needs BLOCKS = 1, or no dx.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty if dx_ptr is None else dx_ptr.dtype.element_ty
    d_blocks = tl.cdiv(d, BD)
    i_d = tl.program_id(0) % d_blocks
    part = tl.program_id(0) // d_blocks
    chunk = first_chunk + part
    own = tl.program_id(1)
    i_n, start, end = tile_span(chunk, cu_seqlens_ptr, num_seqs, seq_len, chunk_size)
    if i_d == 0 and own == 0:
        tl.store(chunk_to_seq_ptr + chunk, tl.where(start < end, i_n, -1))
    if start >= end:
        return
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < d
    slot, rank = slots_and_ranks(own, BC, RP)
    if dx_ptr is not None and BLOCKS == 1:
        held = ()  # [BC, BD] each
        for bank in tl.static_range(BANKS):
            held = held + (load_A(A_ptrs[bank], ids_ptr, i_n, slot, rank, o_d, d, bank, BANKS, K, R).to(dtype),)
    if dmean_ptr is not None:
        b_dmean = tl.load(dmean_ptr + to_int64(i_n) * d + o_d, mask=m_d, other=0)
    if token_router_ptr is not None:
        o_z = tl.arange(0, ZP)
        m_z = (o_z < Z) & (own == 0)
        p_r = token_router_ptr + o_z[:, None].to(tl.int64) * d + o_d[None, :]
        b_r = tl.load(p_r, mask=m_z[:, None] & m_d[None, :], other=0).to(dtype)  # [ZP, BD]
        b_dr = tl.zeros([ZP, BD], tl.float32)
    b_dA = ()  # transposed, [BD, BC] each: dh is a right operand, laid out in shared memory as dx's left one is
    trains = ()  # whether any A of the bank in this column block learns
    any_trains = (dx_ptr is not None) | (router_part_ptr is not None)
    for bank in tl.static_range(BANKS):
        bank_trains = NEED_A[bank]
        if trained_ptrs is not None:
            m_t = trained_columns(trained_ptrs, ids_ptr, i_n, bank, slot, BANKS, K)
            bank_trains = bank_trains & (tl.max(m_t.to(tl.int32), 0) > 0)
        any_trains = any_trains | bank_trains
        trains = trains + (bank_trains,)
        b_dA = b_dA + (zero_tile(BD, BC),)
    if trained_ptrs is not None:
        if not any_trains:
            return

    for t in range(start, end, BT):
        rows = t + tl.arange(0, BT)
        inside = tl.arange(0, BT) < tl.minimum(end - t, BT).to(tl.int32)
        m_x = inside[:, None] & m_d[None, :]
        if ANY_A or router_part_ptr is not None:
            b_x = tl.load(x_ptr + rows[:, None] * d + o_d[None, :], mask=m_x, other=0)
        if token_router_ptr is not None:
            b_dz = tl.load(dlogits_ptr + rows[:, None] * Z + o_z[None, :], mask=inside[:, None] & m_z[None, :], other=0)
            b_dz = b_dz.to(dtype)  # [BT, ZP]
        masks = ()
        if masks_ptr is not None:
            for bank in tl.static_range(BANKS):
                masks = masks + (load_mask(masks_ptr, rows, inside, i_d * BD, T, words, bank, BT, BD),)
        dhs = ()  # of the own column block, for both products; [BT, BC] each
        if ANY_A or BLOCKS == 1:
            for bank in tl.static_range(BANKS):
                dhs = dhs + (load_dh(dh_ptr, rows, inside, slot, rank, bank, BANKS, K, R).to(dtype),)
        if dx_ptr is not None:
            b_dx = tl.zeros([BT, BD], tl.float32)
            for bank in tl.static_range(BANKS):
                b_bank = b_dx
                if masks_ptr is not None:  # each bank has its own mask, so its own sum
                    b_bank = tl.zeros([BT, BD], tl.float32)
                for block in tl.static_range(BLOCKS):
                    if BLOCKS == 1:
                        b_a = held[bank]
                        b_dh = dhs[bank]
                    else:
                        slot_b, rank_b = slots_and_ranks(block, BC, RP)
                        b_a = load_A(A_ptrs[bank], ids_ptr, i_n, slot_b, rank_b, o_d, d, bank, BANKS, K, R).to(dtype)
                        b_dh = load_dh(dh_ptr, rows, inside, slot_b, rank_b, bank, BANKS, K, R).to(dtype)
                    b_bank = tl.dot(b_dh, b_a, b_bank, input_precision="ieee")
                if masks_ptr is not None:
                    b_dx += tl.where(keeps(masks[bank], BT, BD), b_bank, 0.0)
                else:
                    b_dx = b_bank
            b_dx = b_dx * scale
            if token_router_ptr is not None:
                b_dx = tl.dot(b_dz, b_r, b_dx, input_precision="ieee")
            if dmean_ptr is not None:
                routed = inside
                if route_mask_ptr is not None:
                    routed = tl.load(route_mask_ptr + rows, mask=inside, other=0) != 0
                b_dx += tl.where(routed[:, None], b_dmean[None, :], 0.0)
            tl.store(dx_ptr + rows[:, None] * d + o_d[None, :], b_dx.to(dtype), mask=m_x)
        if ANY_A:
            b_summed = ()
            for bank in tl.static_range(BANKS):
                b_sum = b_dA[bank]
                if trains[bank]:
                    b_kept = b_x
                    if masks_ptr is not None:
                        b_kept = keep(b_x, masks[bank], BT, BD)
                    b_sum = tl.dot(tl.trans(b_kept), dhs[bank], b_sum, input_precision="ieee")
                b_summed = b_summed + (b_sum,)
            b_dA = b_summed
        if router_part_ptr is not None:
            b_dr = tl.dot(tl.trans(b_dz), b_x, b_dr, input_precision="ieee")

    if ANY_A:
        m_a = ((slot < K) & (rank < R))[:, None] & m_d[None, :]
        for bank in tl.static_range(BANKS):
            if NEED_A[bank]:
                o_a = ((to_int64(part) * (BANKS * K) + bank * K + slot) * R + rank)[:, None] * d + o_d[None, :]
                tl.store(A_part_ptr + o_a, tl.trans(b_dA[bank] * scale), mask=m_a)
    if router_part_ptr is not None:
        p_r = router_part_ptr + (to_int64(part) * Z + o_z)[:, None] * d + o_d[None, :]
        tl.store(p_r, b_dr, mask=m_z[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["chunks"])
def reduce_dA_kernel(
    part_ptr,  # (chunks, b, K, size)
    router_part_ptr,  # (chunks, Z, d) or None
    sum_ptrs,  # (E, size): what is added to the parts; or None
    router_sum_ptr,  # (Z, d), the same for theirs; or None
    chunk_to_seq_ptr,  # (chunks,)
    ids_ptr,  # (n, b, K) or None
    trained_ptrs,  # bool (E,), or None
    dA_ptrs,  # (E, size) out, or None
    drouter_ptr,  # (Z, d) out
    chunks,
    size,
    d,
    NEED_A: tl.constexpr,  # of each bank
    EXPERTS: tl.constexpr,  # of each bank
    FIRST: tl.constexpr,  # for each bank, the index of its first expert in the concatenated list
    TOTAL: tl.constexpr,  # experts of all banks whose dA is needed, else 0
    BANKS: tl.constexpr,
    K: tl.constexpr,
    Z: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Grid (blocks of size or d, TOTAL + Z): an expert's dA, or a row of dR: the sum of its parts over the chunks."""
    i_e = tl.program_id(1)
    o = to_int64(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    if i_e < TOTAL:
        for bank in tl.static_range(BANKS):
            if NEED_A[bank]:
                expert = i_e - FIRST[bank]
                if (expert >= 0) & (expert < EXPERTS[bank]):
                    live = chunks
                    if trained_ptrs is not None:
                        live = tl.where(tl.load(trained_ptrs[bank] + expert) != 0, chunks, 0)
                    b_dA = sum_chunks(
                        part_ptr,
                        chunk_to_seq_ptr,
                        ids_ptr,
                        bank,
                        expert,
                        o,
                        o < size,
                        live,
                        to_int64(size),
                        BANKS,
                        K,
                        BLOCK,
                        GROUP,
                    )
                    o_dA = to_int64(expert) * size + o
                    if sum_ptrs is not None:
                        b_dA += tl.load(sum_ptrs[bank] + o_dA, mask=o < size, other=0)
                    tl.store(dA_ptrs[bank] + o_dA, b_dA.to(dA_ptrs[bank].dtype.element_ty), mask=o < size)
    else:
        if router_part_ptr is not None:
            i_z = i_e - TOTAL
            b_dR = sum_chunks(
                router_part_ptr, chunk_to_seq_ptr, None, 0, i_z, o, o < d, chunks, to_int64(d), 1, Z, BLOCK, GROUP
            )
            o_dR = to_int64(i_z) * d + o
            if router_sum_ptr is not None:
                b_dR += tl.load(router_sum_ptr + o_dR, mask=o < d, other=0)
            tl.store(drouter_ptr + o_dR, b_dR.to(drouter_ptr.dtype.element_ty), mask=o < d)


class Sums(NamedTuple):
    """Gradients that the parts of chunks add up to."""

    A: tuple[Tensor, ...]  # of each bank, (E, r, d)
    router: Tensor  # (Z, d)


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
    """Differentiate by x; arguments and results as in `smolora.engine.torch_passes.grad_input`."""
    T, banks, K, r = dh.shape
    d = A[0].shape[2]
    if all(a.shape[0] == 1 for a in A):
        ids = None  # all slots have the one A
    card, RP = card_of(dh.device), tiles.padded_rank(r)
    variant = "routers" if dmean is not None and banks > 1 else "" if dtoken_logits is None else "token_router"
    tile = tiles.choose_tile("grad_input", r, K, dtype, card.capability, variant)
    seqs = sequences(T, num_seqs, cu_seqlens, alike=ids is None and dmean is None)
    blocks = cdiv(next_power_of_2(K) * RP, tile.BC)
    d_blocks = cdiv(d, tile.BD)
    chunk = chunk_tokens(T, seqs.num_seqs, d_blocks, tile.BT, tile.resident * card.processors)
    chunks = tile_count(T, seqs.num_seqs, chunk, seqs.packed)
    Z = 0 if dtoken_logits is None else dtoken_logits.shape[1]
    dx = dh.new_empty((T, d) if need_dx else 0, dtype=dtype)
    dA = [empty_like_if(need, a) for need, a in zip(need_A, A, strict=True)]
    drouter = empty_like_if(need_token_router, dh if token_router is None else token_router)
    float32 = dict(dtype=torch.float32, device=dh.device)
    rounds = part_rounds(chunks, (banks * K * r * d if any(need_A) else 0) + (Z * d if need_token_router else 0))
    A_part = torch.empty((len(rounds[0]), banks, K, r, d), **float32) if any(need_A) else None
    router_part = torch.empty((len(rounds[0]), Z, d), **float32) if need_token_router else None
    chunk_to_seq = torch.empty(chunks, dtype=torch.int32, device=dh.device)
    if threshold and masks is None:
        masks = draw_masks(new_masks(dh, streams, d), seed, streams, threshold)

    def launch(of: range, programs: int, blocks: int, with_dx: bool, with_parts: bool) -> None:
        """Launch the pass over some chunks for dx, for the parts of dA and dR, or for all."""
        with_router = Z > 0 and (with_dx or need_token_router)
        grad_input_kernel[(len(of) * d_blocks, programs)](
            x_ptr=x if with_parts else None,
            dh_ptr=dh,
            A_ptrs=tuple(A),
            trained_ptrs=tuple(t.view(torch.uint8) for t in trained) or None if with_parts else None,
            ids_ptr=ids,
            token_router_ptr=token_router if with_router else None,
            dlogits_ptr=dtoken_logits if with_router else None,
            route_mask_ptr=None if dmean is None or route_mask is None else route_mask.view(torch.uint8),
            dmean_ptr=dmean if with_dx else None,
            masks_ptr=masks,
            dx_ptr=dx if with_dx else None,
            A_part_ptr=A_part if with_parts else None,
            router_part_ptr=router_part if with_parts else None,
            chunk_to_seq_ptr=chunk_to_seq,
            T=T,
            **seqs.arguments(),
            chunk_size=chunk,
            first_chunk=of.start,
            d=d,
            words=cdiv(d, BITS),
            scale=256 / (256 - threshold),
            NEED_A=tuple(need and with_parts for need in need_A),
            ANY_A=any(need_A) and with_parts,
            BANKS=banks,
            K=K,
            R=r,
            RP=RP,
            Z=Z,
            ZP=max(16, next_power_of_2(Z)),
            BT=tile.BT,
            BD=tile.BD,
            BC=tile.BC,
            BLOCKS=blocks,
            **tile.options(),
        )

    experts = [a.shape[0] for a in A]
    summed, summed_Z = sum(experts) if any(need_A) else 0, Z if need_token_router else 0

    def reduce_dA(of: range, added: Sums | None, into: Sums) -> None:
        """Add up the parts of a round's chunks."""
        if summed + summed_Z:
            reduce_dA_kernel[(cdiv(r * d if summed else d, 1024), summed + summed_Z)](
                part_ptr=A_part,
                router_part_ptr=router_part,
                sum_ptrs=added.A if added and summed else None,
                router_sum_ptr=added.router if added and summed_Z else None,
                chunk_to_seq_ptr=chunk_to_seq[of.start :],
                ids_ptr=ids,
                trained_ptrs=tuple(t.view(torch.uint8) for t in trained) or None,
                dA_ptrs=into.A if summed else None,
                drouter_ptr=into.router if summed_Z else None,
                chunks=len(of),
                size=r * d,
                d=d,
                NEED_A=tuple(need_A),
                EXPERTS=tuple(experts),
                FIRST=tuple(accumulate([0, *experts[:-1]])),
                TOTAL=summed,
                BANKS=banks,
                K=K,
                Z=Z,
                BLOCK=1024,
                GROUP=chunks_at_once(ids, K),
                **tiles.SMALL,
            )

    need_parts, at_once = any(need_A) or need_token_router, blocks == 1
    if chunks and need_dx and not (at_once and need_parts):
        launch(range(chunks), 1, blocks, True, False)
    sums = None
    if len(rounds) > 1:
        sums = Sums(tuple(torch.empty(a.shape, **float32) for a in A), torch.empty((Z, d), **float32))
    for number, of in enumerate(rounds):
        if of and need_parts:
            launch(of, blocks if any(need_A) else 1, 1, need_dx and at_once, True)
        into = Sums(tuple(dA), drouter) if of is rounds[-1] or sums is None else sums
        reduce_dA(of, sums if number else None, into)
    if need_dx and base_weight is not None:
        dx.addmm_(g, base_weight)
    return dx, dA, drouter
