"""How a mixture's coefficients come about, and where their gradient goes, in plain torch.

A mix is three functions in rank space. They see tokens in N blocks of L, each block of one sequence, with b banks and
K slots a bank:

    h             (N, L, b, K, r)  A x; (N, L, b, 1, r) where the slots share an A
    p             (N, L, b, K, r)  s B^T g
    w             (N, b, K, r)     s B^T I of the slots' experts, mix "smolora" alone
    slot_weights  (N, b, K)        or None, which is 1
    scores        what a token brings: (N, L, K) given coefficients, or (N, L, E) logits, or the fusion logit (N, L)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class MixGradients(NamedTuple):
    """What a mix hands back; an entry that nobody needs, or that the mix does not have, is None."""

    dh: Tensor  # (N, L, b, K or 1, r)
    dw: Tensor | None = None  # (N, b, K, r)
    slot_weights: Tensor | None = None  # (N, b, K)
    scores: Tensor | None = None  # as the scores


class Mix(NamedTuple):
    """The three functions of a mix."""

    coefficients: Callable[..., Tensor]  # (slot_weights, scores, scaling) -> c, which broadcasts to (N, L, b, K)
    backward: Callable[..., MixGradients]  # (p, h, w, slot_weights, scores, need_slot_weights)
    fuse: Callable[..., Tensor] | None = None  # (h, w, slot_weights) -> scores (N, L), where h makes them


def _to_down_slots(dh: Tensor, h: Tensor) -> Tensor:
    """Sum over the slots that share an A."""
    return dh.sum(3, keepdim=True) if h.shape[3] < dh.shape[3] else dh


# ---- weighted: c = s times the slot's weight, or s times a given number a token


def weighted_coefficients(slot_weights: Tensor | None, scores: Tensor | None, scaling: float) -> Tensor | float:
    if scores is not None:
        return (scaling * scores)[:, :, None]
    return scaling if slot_weights is None else (scaling * slot_weights)[:, None]


def weighted_backward(
    p: Tensor, h: Tensor, w: Tensor | None, slot_weights: Tensor | None, scores: Tensor | None, need_slot_weights: bool
) -> MixGradients:
    if scores is not None:
        dscores = (p * h).sum(4)[:, :, 0]
        return MixGradients(_to_down_slots(scores[:, :, None, :, None] * p, h), scores=dscores)
    gated = p if slot_weights is None else slot_weights[:, None, ..., None] * p
    return MixGradients(_to_down_slots(gated, h), slot_weights=(p * h).sum((1, 4)) if need_slot_weights else None)


# ---- softmax: c = s softmax(R x) over all experts, for each token; R x are the scores


def softmax_coefficients(slot_weights: None, scores: Tensor, scaling: float) -> Tensor:
    return scaling * torch.softmax(scores, -1)[:, :, None]


def softmax_backward(
    p: Tensor, h: Tensor, w: Tensor | None, slot_weights: None, scores: Tensor, need_slot_weights: bool
) -> MixGradients:
    pi = torch.softmax(scores, -1)
    dc = (p * h).sum(4)[:, :, 0]  # (N, L, E)
    dscores = pi * (dc - (pi * dc).sum(-1, keepdim=True))
    return MixGradients(_to_down_slots(pi[:, :, None, :, None] * p, h), scores=dscores)


# ---- smolora: c = s q alpha in the first bank, s q beta in the second; sigmoid(score) is alpha (Eq. 8 and 9)


def shares(fusion_logit: Tensor) -> Tensor:
    """The fusion logit (...) -> alpha and beta (..., 2).

    beta is sigmoid(-logit), which 1 - alpha would round away where beta is small.
    """
    return torch.sigmoid(torch.stack([fusion_logit, -fusion_logit], -1))


def smolora_fuse(h: Tensor, w: Tensor, slot_weights: Tensor) -> Tensor:
    """The fusion logit I . x_vu - I . x_if of Eq. 8, (N, L)."""
    score = (h * (w * slot_weights[..., None])[:, None]).sum((3, 4))
    return score[..., 0] - score[..., 1]


def smolora_coefficients(slot_weights: Tensor, scores: Tensor, scaling: float) -> Tensor:
    return scaling * shares(scores)[..., None] * slot_weights[:, None]


def smolora_backward(
    p: Tensor, h: Tensor, w: Tensor, slot_weights: Tensor, scores: Tensor, need_slot_weights: bool
) -> MixGradients:
    share = shares(scores)
    q = slot_weights[:, None, ..., None]
    gated = share[..., None, None] * p
    qh = q * h
    ph = (p * qh).sum((3, 4))  # (N, L, 2)
    delta = share.prod(-1) * (ph[..., 0] - ph[..., 1])  # (N, L): the fusion logit's gradient
    delta = torch.stack([delta, -delta], -1)[..., None, None]
    gated = gated.addcmul_(delta, w[:, None])
    dq = (gated * h).sum((1, 4)) if need_slot_weights else None
    return MixGradients(_to_down_slots(q * gated, h), (delta * qh).sum(1), dq)


MIX = {
    "weighted": Mix(weighted_coefficients, weighted_backward),
    "softmax": Mix(softmax_coefficients, softmax_backward),
    "smolora": Mix(smolora_coefficients, smolora_backward, smolora_fuse),
}
