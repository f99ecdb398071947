"""Dropout's masks by Philox4x32-10, the same bits on every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from . import compiled

LOW = 0xFFFFFFFF


def keep_masks(
    seed: Tensor, rows: int, columns: int, threshold: int, streams: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Dropout masks (streams, rows, columns) of `dtype`: 1 where an element is kept and 0 where it is dropped.

    Philox4x32-10 with counter (column // 16, row low, row high, stream) and key `seed` (int64 (1,), on the device);
    byte `column % 16` of its output is compared with `threshold`.
    """
    device, blocks = seed.device, -(-columns // 16)
    masks = torch.empty((len(streams), rows, 16 * blocks), dtype=dtype, device=device)
    if compiled.module is not None and device.type == "cpu" and dtype in compiled.TYPES:
        fill = compiled.function("keep_mask", dtype)
        for mask, stream in zip(masks, streams, strict=True):
            fill(mask.data_ptr(), rows, blocks, stream, int(seed) % 2**64, threshold, torch.get_num_threads())
        return masks[..., :columns]
    # a CPU goes through some rows at a time, so that ten rounds of a counter find it in the cache
    step = max(1, rows)
    if device.type == "cpu":
        step = max(1, 32768 * torch.get_num_threads() // max(1, len(streams) * blocks))
    column = torch.arange(blocks, device=device)
    stream = torch.tensor(streams, device=device)[:, None, None]
    for start in range(0, rows, step):
        row = torch.arange(start, min(rows, start + step), device=device)[:, None]
        words = torch.empty((len(streams), row.shape[0], blocks, 4), dtype=torch.int32, device=device)
        for i, word in enumerate(_philox(column, row & LOW, row >> 32, stream, seed)):
            words[..., i] = word  # wraps to the lower half
        torch.ge(words.view(torch.uint8).flatten(2), threshold, out=masks[:, start : start + step])
    return masks[..., :columns]


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of counters that broadcast together: four 32-bit words, each the lower half of an int64.

    A product of two 32-bit words wraps in int64, but has the right 64 bits. The counters are broadcast by the rounds
    themselves: in the first three, most words depend on the row, the column or the stream alone.
    """
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = _xor((b >> 32).bitwise_xor_(k0), c1).bitwise_and_(LOW)
        c2 = _xor((a >> 32).bitwise_xor_(k1), c3).bitwise_and_(LOW)
        c1, c3 = b, a
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


def _xor(own: Tensor, other: Tensor) -> Tensor:
    """own ^ other, in place where it has room for the result."""
    return own.bitwise_xor_(other) if own.shape == other.shape else own ^ other
