"""Rows of several packed samples: where each sample begins and ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_capturing(tensor: Tensor) -> bool:
    """Return whether a CUDA graph is being captured, in which no value can be read."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def boundaries(inputs: dict[str, Any], batch: int, count: int) -> Tensor | None:
    """Find the boundaries of the samples in a forward's (batch, count) tokens.

    The arguments tell them as they tell transformers' attention: `cu_seq_lens_q`, `position_ids` that restart at 0,
    `seq_idx`, or an `attention_mask` that numbers its samples. Padding begins no sample.

    Returns:
        int32 (n + 1,), over the flattened tokens; None if each row is one sample.

    Raises:
        TypeError, ValueError: an argument does not fit the tokens, or does not tell where a sample begins.
    """
    given, positions = inputs.get("cu_seq_lens_q"), inputs.get("position_ids")
    if given is not None:
        return _checked(given, batch, count)
    mask, index = inputs.get("attention_mask"), inputs.get("seq_idx")
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == (batch, count) else None
    begins = None
    if isinstance(positions, Tensor) and count > 1:
        begins = _restarts(positions, batch, count, mask)
    elif isinstance(index, Tensor) and index.dim() == 2 and index.shape[1] == count:
        begins = (index[:, 1:] != index[:, :-1]).expand(batch, -1)
    if mask is not None and mask.dtype in (torch.int32, torch.int64) and not is_capturing(mask):
        numbered = (mask[:, 1:] != mask[:, :-1]) & (mask[:, 1:] > 0) & (mask[:, :-1] > 0)
        begins = numbered if begins is None else begins | numbered.to(begins.device)
    if begins is None or not bool(begins.any()):
        return None
    begins = torch.nn.functional.pad(begins, (1, 0), value=True).flatten()
    ends = begins.new_full((1,), begins.shape[0], dtype=torch.int32)
    return torch.cat([begins.nonzero().flatten().int(), ends])


def _checked(given: Any, batch: int, count: int) -> Tensor:
    """Check `cu_seq_lens_q`; return it as int32."""
    integers = (torch.int32, torch.int64)
    if not isinstance(given, Tensor) or given.dim() != 1 or given.shape[0] < 2 or given.dtype not in integers:
        got = f"{given.dtype} of {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"cu_seq_lens_q must be an integer tensor (n + 1,) of n packed samples, got {got}")
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q says how one row is packed, but the batch has {batch} rows")
    if given.device.type == "cpu":
        found = given.tolist()
        if found[0] != 0 or found[-1] != count or found != sorted(found):
            raise ValueError(f"cu_seq_lens_q must rise from 0 to the {count} tokens of the row, got {found}")
    return given.int()


def _restarts(positions: Tensor, batch: int, count: int, mask: Tensor | None) -> Tensor | None:
    """Return whether each token of a row, from the second on, begins another sample: bool (batch, count - 1)."""
    several = positions.dim() == 3 and positions.shape[0] == 3  # time, height and width, without text positions
    if positions.dim() == 3 and not several:
        positions = positions[0]
    if positions.shape[-1] != count:
        return None
    if is_capturing(positions):
        raise ValueError(
            "position_ids must be left out where a CUDA graph is captured, or cu_seq_lens_q given: whether they "
            "restart within a row, which begins another sample, cannot be read then"
        )
    zero = (positions == 0).all(0) if several else positions == 0
    zero = zero.expand(batch, -1) if zero.dim() == 2 else zero.expand(batch, count)
    begins = zero[:, 1:]
    if mask is not None:
        valid = mask.bool().to(begins.device)
        return begins & valid[:, 1:] & valid[:, :-1]
    if not several:
        steps = torch.diff(positions, dim=-1)
        jumps = (steps != 1) & (positions[..., 1:] != 0)
        if bool(jumps.any()):
            row, place = (jumps if jumps.dim() == 2 else jumps[None]).nonzero()[0].tolist()
            around = (positions if positions.dim() == 2 else positions[None])[row, place : place + 2].tolist()
            raise ValueError(
                f"position_ids must go up by 1, or restart at 0 where a packed row's next sample begins, got "
                f"{around[0]} and then {around[1]} in row {row}: give cu_seq_lens_q for packed samples, or "
                "attention_mask where a row is one sample"
            )
    return begins


def sums(flags: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Count the set flags (B, S) of each sample, (n,)."""
    if cu_seqlens is None:
        return flags.sum(1)
    total = torch.nn.functional.pad(flags.flatten().cumsum(0), (1, 0))
    bounds = cu_seqlens.long()
    return total[bounds[1:]] - total[bounds[:-1]]


def spread(values: Tensor, cu_seqlens: Tensor | None, shape: torch.Size) -> Tensor:
    """Repeat each sample's value (n,) over its tokens, (B, S)."""
    if cu_seqlens is None:
        return values[:, None].expand(shape)
    token = torch.arange(shape.numel(), device=values.device)
    return values[torch.searchsorted(cu_seqlens[1:].long(), token, right=True)].view(shape)
