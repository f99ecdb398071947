"""The mixes: device functions for the coefficients of a mixture and their gradients.

The coefficient of token t and slot j is s q_j share_tj, where q is the slot's weight in the sequence and the mix gives
the share of each token. The passes take a mix's functions as constexpr arguments and know nothing else about it. The
functions get the `rows` of a tile [BT], the mask `inside` of those that exist, and the `slot` of each column [BC]; for
rows that are not inside they return finite numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import load_slot_weights, slot_experts, slots_and_ranks
from .products import load_h


class Mix(NamedTuple):
    """The device functions of a mix; `smolora.engine.mixes` has the same formulas in torch."""

    state: Any  # (scores_ptr, rows, inside, K, KP) -> what shares need of a token; loaded once for all its slots
    share: Any  # (state, scores_ptr, rows, inside, slot, bank, K) -> [BT, BC], or [BT, 1] or [1, 1]
    scores_backward: Any = None  # (state, scores_ptr, rows, inside, b_dshare [BT, KP], K, KP) -> dscores [BT, KP]
    fuse: Any = None  # the state [BT] where the mix makes it of h, see `smolora_fuse`
    fuse_backward: Any = None  # (state, ph of each bank [BT]) -> the state's gradient through each bank's score


# ---- weighted: the share is 1, or a given number


@triton.jit
def weighted_state(scores_ptr, rows, inside, K: tl.constexpr, KP: tl.constexpr):
    return 0.0


@triton.jit
def weighted_share(state, scores_ptr, rows, inside, slot, bank: tl.constexpr, K: tl.constexpr):
    if scores_ptr is None:
        b_share = tl.full([1, 1], 1.0, tl.float32)
    else:
        m_s = inside[:, None] & (slot < K)[None, :]
        b_share = tl.load(scores_ptr + rows[:, None] * K + slot[None, :], mask=m_s, other=0).to(tl.float32)
    return b_share


@triton.jit
def weighted_scores_backward(state, scores_ptr, rows, inside, b_dshare, K: tl.constexpr, KP: tl.constexpr):
    return b_dshare


# ---- softmax: over the logits of all experts


@triton.jit
def softmax_state(scores_ptr, rows, inside, K: tl.constexpr, KP: tl.constexpr):
    """Return the largest logit, and the sum of exponentials below it, [BT] each."""
    o_k = tl.arange(0, KP)
    b_z = tl.load(scores_ptr + rows[:, None] * K + o_k[None, :], mask=inside[:, None] & (o_k < K)[None, :], other=0)
    b_z = tl.where((o_k < K)[None, :], b_z, -float("inf"))
    b_max = tl.max(b_z, 1)
    return b_max, tl.sum(tl.exp(b_z - b_max[:, None]), 1)


@triton.jit
def softmax_share(state, scores_ptr, rows, inside, slot, bank: tl.constexpr, K: tl.constexpr):
    m_s = inside[:, None] & (slot < K)[None, :]
    b_z = tl.load(scores_ptr + rows[:, None] * K + slot[None, :], mask=m_s, other=-float("inf"))
    return tl.exp(b_z - state[0][:, None]) / state[1][:, None]


@triton.jit
def softmax_scores_backward(state, scores_ptr, rows, inside, b_dshare, K: tl.constexpr, KP: tl.constexpr):
    b_share = softmax_share(state, scores_ptr, rows, inside, tl.arange(0, KP), 0, K)
    return b_share * (b_dshare - tl.sum(b_share * b_dshare, 1)[:, None])


# ---- smolora: alpha = sigmoid(fusion logit) in the first bank, beta = sigmoid(-fusion logit) in the second (Eq. 8, 9)


@triton.jit
def smolora_state(scores_ptr, rows, inside, K: tl.constexpr, KP: tl.constexpr):
    return tl.load(scores_ptr + rows, mask=inside, other=0)


@triton.jit
def smolora_share(state, scores_ptr, rows, inside, slot, bank: tl.constexpr, K: tl.constexpr):
    if bank == 0:
        b_share = tl.sigmoid(state)
    else:
        b_share = tl.sigmoid(-state)
    return b_share[:, None]


@triton.jit
def smolora_score(
    h_ptr,  # (T, b, K or 1, R)
    w_ptr,  # (E, R) of the bank
    ids_ptr,  # (n, b, K)
    slot_weights_ptr,  # (n, b, K)
    i_n,
    rows,
    inside,
    bank: tl.constexpr,
    BANKS: tl.constexpr,
    K: tl.constexpr,
    DOWN: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Return a bank's score I . x of Eq. 8 in rank space, the sum of q w . h over its slots, [BT]."""
    b_score = tl.zeros([BT], tl.float32)
    for block in tl.static_range(BLOCKS):
        slot, rank = slots_and_ranks(block, BC, RP)
        expert = slot_experts(ids_ptr, i_n, bank, slot, BANKS, K)
        b_w = tl.load(w_ptr + expert * R + rank, mask=(slot < K) & (rank < R), other=0)
        b_w *= load_slot_weights(slot_weights_ptr, i_n, bank, slot, BANKS, K)
        b_score += tl.sum(load_h(h_ptr, rows, inside, slot, rank, bank, BANKS, K, DOWN, R) * b_w[None, :], 1)
    return b_score


@triton.jit
def smolora_fuse(
    h_ptr,  # (T, 2, K or 1, R)
    w_ptr,  # (sum of E, R)
    ids_ptr,  # (n, 2, K)
    slot_weights_ptr,  # (n, 2, K)
    i_n,
    rows,
    inside,
    FIRST: tl.constexpr,  # the row of w of each bank's first expert
    BANKS: tl.constexpr,
    K: tl.constexpr,
    DOWN: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Return the fusion logit [BT]: the two-way softmax over the banks' scores is the sigmoid of their difference."""
    vu = smolora_score(
        h_ptr, w_ptr, ids_ptr, slot_weights_ptr, i_n, rows, inside, 0, BANKS, K, DOWN, R, RP, BT, BC, BLOCKS
    )
    w_ptr += FIRST[1] * R
    return vu - smolora_score(
        h_ptr, w_ptr, ids_ptr, slot_weights_ptr, i_n, rows, inside, 1, BANKS, K, DOWN, R, RP, BT, BC, BLOCKS
    )


@triton.jit
def smolora_fuse_backward(state, b_ph):
    """Return the gradients of the banks' scores [BT]; ph is the sum of q p . h over a bank."""
    b_delta = tl.sigmoid(state) * tl.sigmoid(-state) * (b_ph[0] - b_ph[1])
    return b_delta, -b_delta


MIXES = {
    "weighted": Mix(weighted_state, weighted_share, weighted_scores_backward),
    "softmax": Mix(softmax_state, softmax_share, softmax_scores_backward),
    "smolora": Mix(smolora_state, smolora_share, fuse=smolora_fuse, fuse_backward=smolora_fuse_backward),
}
