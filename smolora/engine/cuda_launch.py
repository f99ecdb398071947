"""Calls of the CUDA C++ extension: the fields of a pass's params struct (`csrc/params.h`), from tensors and numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec import has_own_importance
from . import cuda_build

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
OTHER_DTYPE = 4
MIXES = {"weighted": 0, "smolora": 1}
BOTH_HALVES, FIRST_HALF, SECOND_HALF = range(3)  # of decode


def run_pass(name: str, like: Tensor, *parts: dict[str, Any]) -> None:
    """Run a pass of the extension on the current stream of the device of `like`.

    Args:
        parts: the fields of its params struct; only decode takes several structs. A tensor is passed as its address and
            dtype, None leaves a field at its default, and "banks" is a list with the fields of each.
    """
    common: dict[str, Any] = {"device": like.device.index or 0}
    if like.device.type == "cuda":
        common["stream"] = torch.cuda.current_stream(like.device).cuda_stream, OTHER_DTYPE
    if cuda_build.extension.emulated:
        cuda_build.extension.forget()
    getattr(cuda_build.extension, name)(*[common | _addresses(fields) for fields in parts])


def _addresses(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields as the extension reads them."""
    values = {}
    for field, value in fields.items():
        if isinstance(value, Tensor):
            values[field] = value.data_ptr(), DTYPES.get(value.dtype, OTHER_DTYPE)
            if cuda_build.extension.emulated:
                cuda_build.extension.allow(value.data_ptr(), value.numel() * value.element_size())
        elif field == "banks":
            values[field] = [_addresses(bank) for bank in value]
        elif value is not None:
            values[field] = value
    return values


def layout(
    dtype: torch.dtype,
    tokens: int,
    num_seqs: int,
    banks: list[dict[str, Any]],
    slots: int,
    r: int,
    shared: bool,
    *,
    ids: Tensor | None = None,
    slot_weights: Tensor | None = None,
    mix: str = "weighted",
    scaling: float = 1.0,
    cu_seqlens: Tensor | None = None,
    seed: Tensor | None = None,
    threshold: int = 0,
) -> dict[str, Any]:
    """Return the fields that every pass has."""
    vectors = [bank["importance"] for bank in banks if bank.get("importance") is not None]
    return dict(
        dtype=DTYPES[dtype],
        T=tokens,
        n=num_seqs,
        b=len(banks),
        banks=banks,
        K=slots,
        r=r,
        shared=shared,
        mix=MIXES[mix],
        own_importance=has_own_importance(vectors),
        scaling=scaling,
        ids=ids,
        slot_weights=slot_weights,
        cu_seqlens=cu_seqlens,
        seed=seed if threshold else None,
        threshold=threshold,
    )
