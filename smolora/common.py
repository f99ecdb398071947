"""What the passes of every backend share: branches in use, gradients asked for, and the tensors that they fill."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FIXED_LEAD = {"mean": 0.0, "vu": float("inf"), "if": -float("inf")}  # of the fusions that are not adaptive


def accurate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of reductions over inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def branches(fusion: str) -> tuple[bool, bool]:
    """Which branches, VU and IF, a fusion mode uses."""
    return fusion != "if", fusion != "vu"


def active_streams(fusion: str) -> tuple[int, ...]:
    """The branches in use by number (VU 0, IF 1), which are also their dropout streams."""
    return tuple(branch for branch, used in enumerate(branches(fusion)) if used)


class Wanted(NamedTuple):
    """What `grad_output` computes for the gradients that were asked for: nothing that the fusion does not use."""

    p: bool  # s B^T g
    c: bool  # the gradient of w, through which the score reaches B and I
    vu_B: bool
    if_B: bool
    importance: bool


def wanted(fusion: str, dh: bool, vu_B: bool, if_B: bool, importance: bool, gates: bool) -> Wanted:
    """What these gradients take."""
    use_vu, use_if = branches(fusion)
    vu_B, if_B, importance = vu_B and use_vu, if_B and use_if, importance and fusion == "adaptive"
    c = importance or (fusion == "adaptive" and (vu_B or if_B))
    return Wanted(dh or c or gates, c, vu_B, if_B, importance)


def empty_if(needed: bool, like: Tensor) -> Tensor:
    """Room for a result that looks like a tensor, or nothing (0,) where nobody needs it."""
    return torch.empty_like(like) if needed else like.new_empty(0)


def new_routing(
    x: Tensor, instances: int, experts: int, top_k: int, fusion: str, routes: Tensor | None = None,
    gates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Room for routes (n, b, c), gates (n, b, c) and logits (n, experts); or copies of given ones and logits (n, 0)."""
    dtype = accurate_dtype(x.dtype)
    if routes is not None:
        return routes.clone(), gates.to(dtype, copy=True), x.new_empty((instances, 0), dtype=dtype)
    shape = (instances, sum(branches(fusion)), top_k)
    return (
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty(shape, dtype=dtype),
        x.new_empty((instances, experts), dtype=dtype),
    )


def new_rank_space(x: Tensor, experts: int, r: int, top_k: int, fusion: str) -> tuple[Tensor, Tensor]:
    """Room for h (T, b, c, r) and w (experts, r), or (0, r) unless the fusion is adaptive."""
    dtype = accurate_dtype(x.dtype)
    h = x.new_empty((x.shape[0], sum(branches(fusion)), top_k, r), dtype=dtype)
    return h, x.new_empty((experts if fusion == "adaptive" else 0, r), dtype=dtype)
