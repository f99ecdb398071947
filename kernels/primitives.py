"""Device functions that all passes share: tiles of tokens, columns of rank space, and top-k.

In rank space a bank has K slots of R columns. A kernel pads both to powers of two: column `slot * RP + rank`, BC of
them at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Sequences(NamedTuple):
    """How T tokens fall into sequences, in the form of kernel arguments."""

    num_seqs: int
    seq_len: int  # where all sequences are equally long
    cu_seqlens: Tensor | None  # int32 (n + 1,), boundaries of packed sequences

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    def arguments(self) -> dict[str, int | Tensor | None]:
        """Return them as keyword arguments of a launch."""
        return {"num_seqs": self.num_seqs, "seq_len": self.seq_len, "cu_seqlens_ptr": self.cu_seqlens}


def sequences(tokens: int, num_seqs: int, cu_seqlens: Tensor | None, alike: bool = False) -> Sequences:
    """Lay tokens out in their sequences, or as a single one where a pass treats all tokens alike."""
    if alike:
        return Sequences(1, tokens, None)
    return Sequences(num_seqs, tokens // max(num_seqs, 1), cu_seqlens)


@triton.jit
def to_int64(i):
    """Return a number as int64, also a Python integer: offsets may not fit 32 bits."""
    return tl.zeros([], tl.int64) + i


@triton.jit
def first_tile(i_n, cu_seqlens_ptr, seq_len, BT: tl.constexpr, EXTRA_TILES: tl.constexpr):
    """Return the number of a sequence's first tile; L tokens have (L + EXTRA_TILES * BT - 1) // BT tiles."""
    if cu_seqlens_ptr is not None:
        tile = tl.load(cu_seqlens_ptr + i_n) // BT + i_n * EXTRA_TILES
    else:
        tile = i_n * ((seq_len + EXTRA_TILES * BT - 1) // BT)
    return tile


@triton.jit
def tile_to_seq(tile, cu_seqlens_ptr, num_seqs, seq_len, BT: tl.constexpr, EXTRA_TILES: tl.constexpr):
    """Return a tile's sequence, its number in that sequence, and the sequence's first token and end.

    In a packed batch, tiles past a sequence's end are empty.
    """
    if cu_seqlens_ptr is not None:
        # first_tile grows with i_n: a binary search over the boundaries
        i_n = 0
        above = num_seqs
        while above - i_n > 1:
            middle = (i_n + above) // 2
            before = first_tile(middle, cu_seqlens_ptr, seq_len, BT, EXTRA_TILES) <= tile
            i_n = tl.where(before, middle, i_n)
            above = tl.where(before, above, middle)
        start = tl.load(cu_seqlens_ptr + i_n).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + i_n + 1).to(tl.int64)
    else:
        i_n = tile // ((seq_len + EXTRA_TILES * BT - 1) // BT)
        start = to_int64(i_n) * seq_len
        end = start + seq_len
    return i_n, tile - first_tile(i_n, cu_seqlens_ptr, seq_len, BT, EXTRA_TILES), start, end


@triton.jit
def tile_span(tile, cu_seqlens_ptr, num_seqs, seq_len, BT: tl.constexpr):
    """Return a tile's sequence, and its own first token and end; in an empty tile start >= end."""
    i_n, j, start, end = tile_to_seq(tile, cu_seqlens_ptr, num_seqs, seq_len, BT, 1)
    start += j * BT
    return i_n, start, tl.minimum(end, start + BT)


@triton.jit
def slots_and_ranks(block, BC: tl.constexpr, RP: tl.constexpr):
    """Return slot and rank of each column of a block, [BC] each."""
    o_c = block * BC + tl.arange(0, BC)
    return o_c // RP, o_c % RP


@triton.jit
def slot_values(p_slots, slot, K: tl.constexpr, DEFAULT: tl.constexpr):
    """Load a value for each of the slots [BC] from K contiguous values, DEFAULT for slots past the last."""
    if K == 1:
        b_value = tl.where(slot == 0, tl.load(p_slots), DEFAULT)
    else:
        b_value = tl.load(p_slots + slot, mask=slot < K, other=DEFAULT)
    return b_value


@triton.jit
def slot_experts(
    ids_ptr,  # (n, b, K), or None: every expert in order
    i_n,
    bank: tl.constexpr,
    slot,
    BANKS: tl.constexpr,
    K: tl.constexpr,
):
    """Return the expert of each of the slots [BC]. An empty slot (id -1) gets expert 0; its weight is 0."""
    if ids_ptr is None:
        expert = slot
    else:
        expert = tl.maximum(slot_values(ids_ptr + (i_n * BANKS + bank) * K, slot, K, 0), 0)
    return expert


@triton.jit
def trained_columns(
    trained_ptrs,  # bool (E,), or None: all
    ids_ptr,
    i_n,
    bank: tl.constexpr,
    slot,
    BANKS: tl.constexpr,
    K: tl.constexpr,
):
    """Return a mask of the columns [BC] whose expert gets a gradient."""
    m_c = slot < K
    if trained_ptrs is not None:
        expert = slot_experts(ids_ptr, i_n, bank, slot, BANKS, K)
        m_c = m_c & (tl.load(trained_ptrs[bank] + expert, mask=m_c, other=0) != 0)
    return m_c


@triton.jit
def load_slot_weights(
    slot_weights_ptr,  # (n, b, K), or None: 1
    i_n,
    bank: tl.constexpr,
    slot,
    BANKS: tl.constexpr,
    K: tl.constexpr,
):
    """Return the weight of each of the slots [BC]."""
    if slot_weights_ptr is None:
        b_q = tl.full(slot.shape, 1.0, tl.float32)
    else:
        b_q = slot_values(slot_weights_ptr + (i_n * BANKS + bank) * K, slot, K, 0.0)
    return b_q


@triton.jit
def zero_tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return zeros [ROWS, COLUMNS]: Triton takes sizes from a tuple in a call, but not in a list."""
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def choose_top_k(b_z, E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, GATE_ALL: tl.constexpr):
    """Choose the K largest of E logits [EP], ties to the lowest: experts and weights, [KP] each.

    The weights are the softmax over the chosen logits (Eq. 5 and 6), or over all of them.
    """
    o_e = tl.arange(0, EP)
    o_k = tl.arange(0, KP)
    b_left = tl.where(o_e < E, b_z, -float("inf"))
    b_id = tl.zeros([KP], tl.int32)
    b_logit = tl.full([KP], -float("inf"), tl.float32)
    for j in tl.static_range(K):
        best = tl.max(b_left, 0)
        expert = tl.min(tl.where((b_left == best) & (o_e < E), o_e, EP), 0)
        expert = tl.minimum(expert, E - 1)  # a NaN equals nothing: stay inside
        b_id = tl.where(o_k == j, expert, b_id)
        b_logit = tl.where(o_k == j, best, b_logit)
        b_left = tl.where(o_e == expert, -float("inf"), b_left)
    largest = tl.max(b_logit, 0)
    b_weight = tl.exp(b_logit - largest)
    if GATE_ALL:
        total = tl.sum(tl.exp(tl.where(o_e < E, b_z, -float("inf")) - largest), 0)
    else:
        total = tl.sum(b_weight, 0)
    return b_id, b_weight / total
