"""Dropout's masks, drawn once a step and kept as bits.

Kernels:

    draw_masks_kernel  a bit an element of x and stream: 1 where the element stays

A pass over x reads a tile's masks in another layout than it could draw them in, and expanding a bit takes fewer
instructions than moving what was drawn. The bits of a stream are a sixteenth of x in half precision.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, next_power_of_2

BITS = 32  # of a word
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Return the four words of Philox4x32-10, with one wide product where `tl.philox` has a high and a low one."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * tl.full([], 0xD2511F53, tl.uint64)
        b = c2.to(tl.uint64) * tl.full([], 0xCD9E8D57, tl.uint64)
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        k0 += tl.full([], 0x9E3779B9, tl.uint32)
        k1 += tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def bytes_that_stay(word, THRESHOLD: tl.constexpr):
    """Return the word with the top bit of each byte that is not below the threshold, and no other.

    The sum of a byte's lower seven bits and the threshold's distance from the next multiple of 128 carries into its
    eighth bit; whether that or the byte's own decides depends on which half the threshold lies in.
    """
    low = word & tl.full([], 0x7F7F7F7F, tl.uint32)
    if THRESHOLD <= 128:
        high = (low + tl.full([], (128 - THRESHOLD) * 0x01010101, tl.uint32)) | word
    else:
        high = (low + tl.full([], (256 - THRESHOLD) * 0x01010101, tl.uint32)) & word
    return high & tl.full([], 0x80808080, tl.uint32)


@triton.jit(do_not_specialize=["T"])
def draw_masks_kernel(
    seed_ptr,  # (1,)
    masks_ptr,  # (streams, T, words) out
    T,
    words,  # of a row
    STREAMS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BT: tl.constexpr,
    BW: tl.constexpr,
):
    """Grid (blocks of tokens, blocks of words): Philox4x32-10 with counter (column // 16, row low, row high, stream).

    The key is the seed. An element stays where byte column % 16 is at least the threshold. Column c of a word's 32 has
    bit 8 (c % 4) + c // 4: eight words of random bytes go into one with a shift each.
    """
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_w = tl.program_id(1) * BW + tl.arange(0, BW)
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    c1 = tl.broadcast_to(rows[:, None], [BT, BW]).to(tl.uint32)
    c2 = tl.broadcast_to((rows >> 32)[:, None], [BT, BW]).to(tl.uint32)
    for i in tl.static_range(len(STREAMS)):
        b_bits = tl.zeros([BT, BW], tl.uint32)
        for half in tl.static_range(2):
            c0 = tl.broadcast_to((2 * o_w + half)[None, :], [BT, BW]).to(tl.uint32)
            b_words = philox(seed, c0, c1, c2, tl.full([BT, BW], STREAMS[i], tl.uint32))
            for j in tl.static_range(4):
                b_bits = (b_bits >> 1) | bytes_that_stay(b_words[j], THRESHOLD)
        p_out = masks_ptr + (i * T.to(tl.int64) + rows)[:, None] * words + o_w[None, :]
        tl.store(p_out, b_bits.to(tl.int32, bitcast=True), mask=(rows < T)[:, None] & (o_w < words)[None, :])


@triton.jit
def load_mask(masks_ptr, rows, inside, column, T, words, stream: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Load the mask of a tile of BD columns from `column`, as `keep` and `keeps` take it; `stream` is a position.

    A word [BT, BD // 4] has the bits of four columns, each at the top of a byte. BD is 16, or a multiple of 32, and
    `column` of BD.
    """
    o_w = column // 32 + tl.arange(0, max(1, BD // 32))
    p_words = masks_ptr + (stream * T.to(tl.int64) + rows)[:, None] * words + o_w[None, :]
    b_words = tl.load(p_words, mask=inside[:, None] & (o_w < words)[None, :], other=0)
    group = tl.arange(0, min(8, BD // 4))  # of four columns
    if BD < 32:
        group += column % 32 // 4
    return tl.reshape(b_words[:, :, None] << (7 - group)[None, None, :], [BT, BD // 4])


@triton.jit
def keeps(b_mask, BT: tl.constexpr, BD: tl.constexpr):
    """Return a loaded mask as booleans [BT, BD], True where an element stays."""
    return tl.reshape(b_mask[:, :, None] & (128 << 8 * tl.arange(0, 4))[None, None, :], [BT, BD]) != 0


@triton.jit
def keep(b_x, b_mask, BT: tl.constexpr, BD: tl.constexpr):
    """Return x [BT, BD], zero where a loaded mask drops it.

    Two elements of 16 bits are masked at once: `prmt` spreads the top bit of a byte over a byte. Its selector has four
    bits for each byte of the result, of which the highest asks for that; an element's column has them for both places.
    """
    if INTERPRETED or b_x.dtype == tl.float32:
        b_kept = tl.where(keeps(b_mask, BT, BD), b_x, 0.0).to(b_x.dtype)
    else:
        b_words = tl.reshape(tl.broadcast_to(b_mask[:, :, None], [BT, BD // 4, 4]), [BT, BD])
        selector = 0xCC88 + 0x1111 * (tl.arange(0, BD) % 4)
        b_kept = tl.inline_asm_elementwise(
            """{ .reg .b32 selector, mask;
            prmt.b32 selector, $4, $5, 0x0050;
            prmt.b32 mask, $2, $3, selector;
            and.b32 $0, $1, mask; }""",
            "=r,r,r,r,r,r",
            [b_x, b_words, tl.broadcast_to(selector[None, :], [BT, BD])],
            dtype=b_x.dtype,
            is_pure=True,
            pack=2,
        )
    return b_kept


def draw_masks(masks: Tensor, seed: Tensor, streams: list[int], threshold: int) -> Tensor:
    """Fill the masks (streams, T, words) with their bits and return them."""
    _, tokens, words = masks.shape
    BW = min(128, next_power_of_2(words))
    BT = 512 // BW
    if masks.numel():
        draw_masks_kernel[(cdiv(tokens, BT), cdiv(words, BW))](
            seed_ptr=seed,
            masks_ptr=masks,
            T=tokens,
            words=words,
            STREAMS=tuple(streams),
            THRESHOLD=threshold,
            BT=BT,
            BW=BW,
            num_warps=4,
        )
    return masks
