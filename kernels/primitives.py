"""What the passes share: where a tile of tokens lies, which columns of rank space a block has, and dropout's masks.

Rank space has, in each branch, `K` slots (chosen experts) of `R` columns. A kernel sees them padded to powers of two,
as columns `slot * RP + rank`, `BC` of them at a time.
"""

import triton
import triton.language as tl


@triton.jit
def wide(i):
    """A number as int64, also where it is a Python integer: addresses are past 32 bits before they are multiplied."""
    return tl.zeros([], tl.int64) + i


@triton.jit
def tile_base(i, cu_ptr, S, BT: tl.constexpr, SLACK: tl.constexpr, VARLEN: tl.constexpr):
    """Number of the first tile of instance i. An instance of L tokens has room for (L + SLACK * BT - 1) // BT tiles."""
    if VARLEN:
        base = tl.load(cu_ptr + i) // BT + i * SLACK
    else:
        base = i * ((S + SLACK * BT - 1) // BT)
    return base


@triton.jit
def locate(tile, cu_ptr, n, S, BT: tl.constexpr, SLACK: tl.constexpr, VARLEN: tl.constexpr):
    """The instance i that owns a tile, the tile's number j in it, and the instance's first and last-plus-one token.

    Packed instances: tile_base grows with i, so a binary search over the n + 1 boundaries finds i. Tiles past an
    instance's last token are empty.
    """
    if VARLEN:
        i = 0
        above = n
        while above - i > 1:
            middle = (i + above) // 2
            before = tile_base(middle, cu_ptr, S, BT, SLACK, VARLEN) <= tile
            i = tl.where(before, middle, i)
            above = tl.where(before, above, middle)
        start = tl.load(cu_ptr + i).to(tl.int64)
        end = tl.load(cu_ptr + i + 1).to(tl.int64)
    else:
        i = tile // ((S + SLACK * BT - 1) // BT)
        start = wide(i) * S
        end = start + S
    j = tile - tile_base(i, cu_ptr, S, BT, SLACK, VARLEN)
    return i, j, start, end


@triton.jit
def columns(block, BC: tl.constexpr, RP: tl.constexpr):
    """Slot and rank of each column of a block, [BC] each."""
    o_c = block * BC + tl.arange(0, BC)
    return o_c // RP, o_c % RP


@triton.jit
def per_slot(p_slots, slot, K: tl.constexpr, DEFAULT: tl.constexpr):
    """Load a value for each column from K contiguous values, [BC]; columns past the last slot get DEFAULT."""
    if K == 1:
        b_value = tl.where(slot == 0, tl.load(p_slots), DEFAULT)
    else:
        b_value = tl.load(p_slots + slot, mask=slot < K, other=DEFAULT)
    return b_value


@triton.jit
def top_k(b_z, E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """softmax(top_k(z)) of Eq. 5 and 6: the K largest of E logits [EP], ties to the lowest, and gates; [KP] each."""
    o_e = tl.arange(0, EP)
    o_k = tl.arange(0, KP)
    b_z = tl.where(o_e < E, b_z, -float("inf"))
    b_route = tl.zeros([KP], tl.int32)
    b_logit = tl.full([KP], -float("inf"), tl.float32)
    for j in tl.static_range(K):
        best = tl.max(b_z, 0)
        i_e = tl.min(tl.where((b_z == best) & (o_e < E), o_e, EP), 0)
        i_e = tl.minimum(i_e, E - 1)  # a NaN equals nothing: stay inside
        b_route = tl.where(o_k == j, i_e, b_route)
        b_logit = tl.where(o_k == j, best, b_logit)
        b_z = tl.where(o_e == i_e, -float("inf"), b_z)
    b_gate = tl.exp(b_logit - tl.max(b_logit, 0))
    return b_route, b_gate / tl.sum(b_gate, 0)


@triton.jit
def keep_mask(
    seed_ptr, rows, column, THRESHOLD: tl.constexpr, STREAM: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    """Dropout's mask of a tile [BT, BD], True where an element stays; `column`, the first, is a multiple of 16.

    Philox4x32-10 with counter (column // 16, row low, row high, stream), key = seed; byte column % 16 is compared.
    """
    o_block = column // 16 + tl.arange(0, BD // 16)
    c0 = tl.broadcast_to(o_block[None, :], [BT, BD // 16]).to(tl.uint32, bitcast=True)
    rows = rows.to(tl.int64)
    c1 = tl.broadcast_to(rows[:, None], [BT, BD // 16]).to(tl.uint32)
    c2 = tl.broadcast_to((rows >> 32)[:, None], [BT, BD // 16]).to(tl.uint32)
    c3 = tl.full([BT, BD // 16], STREAM, tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), c0, c1, c2, c3)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BT, BD // 16, 2, 2], in the order 0 1 2 3
    words = tl.reshape(words, [BT, BD // 4, 1])
    shifts = (tl.arange(0, 4) * 8).to(tl.uint32)
    b_byte = (words >> shifts[None, None, :]) & 0xFF
    return tl.reshape(b_byte, [BT, BD]) >= THRESHOLD
