"""A plain copy, the kernel that the model must put at the memory's own rate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def copy_kernel(source_ptr, target_ptr, iterations, BLOCK: tl.constexpr):
    """Grid (programs,): each copies `iterations` blocks of BLOCK numbers that lie one after another."""
    for i in range(0, iterations):
        o = (tl.program_id(0).to(tl.int64) * iterations + i) * BLOCK + tl.arange(0, BLOCK)
        tl.store(target_ptr + o, tl.load(source_ptr + o))


def copy(programs: int, iterations: int, block: int) -> None:
    """Launch a copy of `programs * iterations * block` bfloat16 numbers, on tensors without data."""
    source, target = (torch.empty(programs * iterations * block, dtype=torch.bfloat16, device="meta") for _ in range(2))
    copy_kernel[(programs,)](
        source_ptr=source, target_ptr=target, iterations=iterations, BLOCK=block, num_warps=8, num_stages=1
    )
