"""Checks of values. They read tensors, so on a GPU they sync, and run only with SMOLORA_CHECK=1."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def check_values(
    x: Tensor,
    num_seqs: int,
    cu_seqlens: Tensor | None,
    route_mask: Tensor | None,
    instruction: Tensor | None,
) -> None:
    """Check what only the values can tell.

    Raises:
        ValueError: `cu_seqlens` are no boundaries of x's tokens, `instruction` is not finite, or `route_mask` leaves a
            sequence that has tokens without any.
    """
    if cu_seqlens is not None:
        cu = cu_seqlens.tolist()
        if cu[0] != 0 or cu[-1] != x.shape[0] or any(a > b for a, b in pairwise(cu)):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {x.shape[0]}, got {cu}")
    if instruction is not None and not bool(torch.isfinite(instruction).all()):
        bad = (~torch.isfinite(instruction).all(-1)).nonzero().flatten().tolist()
        raise ValueError(f"instruction must be finite, got NaN or infinity in rows {bad}")
    if route_mask is not None and x.shape[0]:
        total = torch.cat([route_mask.new_zeros(1, dtype=torch.int64), route_mask.cumsum(0)])
        if cu_seqlens is None:
            bounds = torch.arange(0, x.shape[0] + 1, x.shape[0] // num_seqs, device=x.device)
        else:
            bounds = cu_seqlens.long()
        empty = (total[bounds[1:]] == total[bounds[:-1]]) & (bounds[1:] > bounds[:-1])
        if bool(empty.any()):
            rows = empty.nonzero().flatten().tolist()
            raise ValueError(f"route_mask must keep a token of every instance, got none for instances {rows}")


def check_ids(ids: Tensor, B: list[Tensor]) -> None:
    """Check given slots (n, b, K): -1, or an expert of the bank.

    Raises:
        ValueError: they name an expert that does not exist.
    """
    for bank, experts in enumerate(B):
        chosen = ids[:, bank]
        if chosen.numel() and not bool(((chosen >= -1) & (chosen < experts.shape[0])).all()):
            raise ValueError(f"ids of bank {bank} must lie in 0 to {experts.shape[0] - 1}, got {chosen.tolist()}")
