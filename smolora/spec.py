"""Parameter objects that describe a mixture of low-rank experts, and conventions that all passes share.

For token t of sequence i, with slots j = 1..K chosen for the sequence, every mixture computes

    y_t = W x_t + b + sum_j B[b_ij] c_tj A[a_ij] dropout(x_t)

`docs/architecture.md` explains the symbols. A method describes itself with the objects below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MIXES = ("weighted", "softmax", "smolora")
GATES = ("chosen", "all")


class Bank(NamedTuple):
    """Experts of one kind, which share a dropout mask.

    With a single A, all B of the bank share it, and h = A x is computed once.
    """

    A: Tensor  # (E, r, d), or (1, r, d)
    B: Tensor  # (E, k, r)
    stream: int = 0  # of the dropout mask
    importance: Tensor | None = None  # the scores' I of Eq. 8, which mix "smolora" needs: (k,), or (E, k), each its own
    trained: Tensor | None = None  # bool (E,): experts whose B and own I get a gradient; None: all
    trained_A: Tensor | None = None  # as A has rows, bool (E,) or (1,): those that get a gradient; None: all


class Router(NamedTuple):
    """How the slots of one bank are chosen: the top k of a linear map of the sequence."""

    weight: Tensor  # (E, d) or (E, e); or one for each task, (tasks, E, d)
    reads_x: bool  # the mean of the sequence's routed tokens; else its instruction embedding
    rows: Tensor | None = None  # int64 (n,): the task of each sequence, where there is a weight for each


class Slots(NamedTuple):
    """Given experts of each sequence, in each of b banks.

    An id of -1 leaves a slot empty, where the slots have weights.
    """

    ids: Tensor | None  # int32 (n, b, K); None: every expert of the bank, in order
    weights: Tensor | None = None  # (n, b, K); None: 1


class Tokens(NamedTuple):
    """How T tokens fall into n sequences, and which of them a router averages."""

    num_seqs: int
    cu_seqlens: Tensor | None = None  # int32 (n + 1,), boundaries; None: sequences of equal length
    route_mask: Tensor | None = None  # bool (T,); None: all


class Dropout(NamedTuple):
    """Dropout on the input of A, with a mask for each bank."""

    threshold: int = 0  # an element is dropped when its random byte lies below it; 0: no dropout
    seed: Tensor | None = None  # int64 (1,), on the device


class Mixed(NamedTuple):
    """The output of a forward, and its decisions."""

    y: Tensor  # (T, k)
    ids: Tensor | None  # int32 (n, b, K)
    slot_weights: Tensor | None  # (n, b, K)
    logits: Tensor | None  # (n, sum of E), of the routers side by side; None where the slots were given
    scores: Tensor | None  # from which the mix computed each token's coefficients; see `engine.mixes`


class GradNeeds(NamedTuple):
    """Intermediate results that `grad_output` must compute for the requested gradients."""

    p: bool  # s B^T g
    dw: bool  # the gradient of w = s B^T I, through which a score reaches B and I


def grad_needs(mix: str, dh: bool, dB: bool, importance: bool, slot_weights: bool, scores: bool) -> GradNeeds:
    """Return what the requested gradients need."""
    dw = mix == "smolora" and (dB or importance)
    return GradNeeds(dh or dw or slot_weights or scores, dw)


def has_own_importance(importance: Sequence[Tensor]) -> bool:
    """Tell whether each expert has an importance vector of its own, (E, k) of each bank; else a bank has one, (k,)."""
    return bool(importance) and importance[0].dim() == 2


def accurate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of reductions over inputs of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_like_if(needed: bool, like: Tensor) -> Tensor:
    """Allocate a result like a tensor, or an empty one (0,) if it is not needed."""
    return torch.empty_like(like) if needed else like.new_empty(0)


def num_slots(ids: Tensor | None, B: list[Tensor], top_k: int) -> int:
    """Return the slots K of a bank: those of `ids`, the router's top k, or with neither all experts."""
    if ids is not None:
        return ids.shape[2]
    return top_k or B[0].shape[0]


def down_slots(A: list[Tensor], slots: int) -> int:
    """Return how many h a bank has: one where the B of each bank share an A, else one a slot."""
    return 1 if all(a.shape[0] == 1 for a in A) else slots


def new_routing(x: Tensor, num_seqs: int, B: list[Tensor], top_k: int, routed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate ids (n, b, K), slot weights (n, b, K) and logits (n, sum of E); empty where nothing is routed."""
    dtype = accurate_dtype(x.dtype)
    if not routed:
        empty = x.new_empty(0, dtype=dtype)
        return x.new_empty(0, dtype=torch.int32), empty, x.new_empty((num_seqs, 0), dtype=dtype)
    shape = (num_seqs, len(B), top_k)
    logits = x.new_empty((num_seqs, sum(b.shape[0] for b in B)), dtype=dtype)
    return x.new_empty(shape, dtype=torch.int32), x.new_empty(shape, dtype=dtype), logits


def new_masks(tokens: Tensor, streams: list[int], d: int) -> Tensor:
    """Allocate dropout's masks of x (T, d) as bits: int32 (streams, T, words), a word for 32 columns.

    `tokens` is any tensor that has T rows.
    """
    return tokens.new_empty((len(streams), tokens.shape[0], -(-d // 32)), dtype=torch.int32)


def new_rank_space(
    x: Tensor, A: list[Tensor], B: list[Tensor], slots: int, mix: str, token_router: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate h (T, b, K, r), w (sum of E, r) or (0, r), and token logits (T, E) or (T, 0)."""
    dtype, r = accurate_dtype(x.dtype), A[0].shape[1]
    h = x.new_empty((x.shape[0], len(A), down_slots(A, slots), r), dtype=dtype)
    w = x.new_empty((sum(b.shape[0] for b in B) if mix == "smolora" else 0, r), dtype=dtype)
    return h, w, x.new_empty((x.shape[0], 0 if token_router is None else token_router.shape[0]), dtype=dtype)
