"""Tile sizes of every kernel, from rank, slots, dtype and compute capability.

They never depend on the token count (only split-K factors and chunks do), so longer batches do not recompile, and a
router's sums run in the same order for every batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from ..launch import next_power_of_2

MAX_FUSED_ROUTING_COLUMNS = 128  # of a bank: up to here one pass over x computes all experts and the router's sums
MAX_FUSED_P_AND_DB_COLUMNS = 64  # of the slots of all banks: up to here one read of g gives p and dB
MAX_KEPT_P_COLUMNS = 128  # of the slots of all banks: up to here mix_backward keeps p in registers


def padded_rank(r: int) -> int:
    """Return the columns that an expert takes in a kernel: a power of two, at least the 16 of a tensor core."""
    return max(16, next_power_of_2(r))


@dataclass(frozen=True)
class Tile:
    """A kernel's tile, for banks of up to `max_columns` columns (None: any number)."""

    max_columns: int | None
    BT: int  # tokens
    BC: int  # columns of rank space; narrower banks take as many as they have
    BD: int = 0  # of the long axis, d or k
    warps: int = 8
    stages: int = 1
    registers: int | None = None  # limit of a thread's; None leaves it to ptxas
    resident: int = 2  # programs that a processor runs at once

    def options(self) -> dict[str, int]:
        """Return them as options of a launch."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


# Found with bench/kernel_report.py: of the spill-free tiles, the ones with the most bytes in flight. What limits them:
# float32 products keep whole rows of both operands in registers; mma.sync holds float32 parameters in registers before
# it rounds them; pipelined loads take shared memory for every column block. Registers are limited where that fits a
# second block on a processor, or where ptxas would choose a tighter limit by itself, and spill.
FLOAT32 = {
    "shrink": (Tile(None, BT=32, BD=16, BC=64, warps=8, stages=2, registers=255, resident=1),),
    "expand": (
        Tile(16, BT=32, BD=64, BC=16, warps=4, stages=2, registers=128, resident=4),
        Tile(32, BT=32, BD=64, BC=32, warps=4, stages=2),
        Tile(64, BT=32, BD=32, BC=64, warps=4, stages=2),
        Tile(None, BT=32, BD=32, BC=64, warps=8, stages=1, resident=1),
    ),
    "grad_output": (
        Tile(16, BT=32, BD=64, BC=16, warps=8, stages=2, resident=1),
        Tile(None, BT=32, BD=32, BC=32, warps=8, stages=2, resident=1),
    ),
    "grad_input": (
        Tile(16, BT=32, BD=32, BC=16, warps=8, stages=2, registers=255, resident=1),
        Tile(128, BT=32, BD=32, BC=32, warps=8, stages=2, resident=1),
        Tile(None, BT=16, BD=32, BC=16, warps=4, stages=1),
    ),
}
# wgmma reads shared memory, of which there are 227 KB: compute capability 9
WARPGROUP = {
    "shrink": (
        Tile(64, BT=128, BD=64, BC=64, warps=8, stages=3, registers=128),
        Tile(None, BT=64, BD=32, BC=128, warps=8, stages=4),
    ),
    "shrink/masks": (
        Tile(64, BT=64, BD=64, BC=64, warps=4, stages=3, registers=168, resident=3),
        Tile(None, BT=64, BD=32, BC=128, warps=8, stages=4),
    ),
    "shrink/one_bank": (
        Tile(64, BT=64, BD=64, BC=64, warps=8, stages=4, registers=128),
        Tile(None, BT=64, BD=32, BC=128, warps=8, stages=4, registers=128),
    ),
    "shrink/wide_banks": (
        Tile(64, BT=64, BD=64, BC=64, warps=8, stages=4, registers=168, resident=1),
        Tile(None, BT=64, BD=32, BC=128, warps=8, stages=4),
    ),
    "expand": (
        Tile(64, BT=128, BD=64, BC=64, warps=8, stages=2, registers=128),
        Tile(None, BT=64, BD=64, BC=64, warps=4, stages=1, registers=255),
    ),
    "grad_output": (
        Tile(16, BT=64, BD=256, BC=16, warps=4, stages=3, registers=255, resident=1),
        Tile(32, BT=64, BD=256, BC=32, warps=8, stages=2, resident=1),
        Tile(None, BT=64, BD=128, BC=64, warps=8, stages=2, registers=255, resident=1),
    ),
    "grad_output/one_bank": (
        Tile(32, BT=64, BD=256, BC=32, warps=8, stages=2),
        Tile(128, BT=64, BD=128, BC=64, warps=8, stages=2, registers=128),
        Tile(None, BT=64, BD=128, BC=64, warps=8, stages=2, registers=255, resident=1),
    ),
    "grad_input": (
        Tile(16, BT=64, BD=64, BC=16, warps=4, stages=3, registers=168, resident=3),
        Tile(64, BT=32, BD=64, BC=64, warps=4, stages=3, registers=255),
        Tile(128, BT=32, BD=64, BC=64, warps=4, stages=2, registers=255),
        Tile(256, BT=32, BD=64, BC=64, warps=4, stages=1),
        Tile(None, BT=32, BD=64, BC=64, warps=8, stages=1, resident=1),
    ),
}
# tcgen05 reads it, too, and its code takes a few registers more: compute capability 10
TENSOR_MEMORY_SHRINK = (
    Tile(16, BT=64, BD=32, BC=16, warps=8, stages=6, registers=128),
    Tile(64, BT=64, BD=64, BC=64, warps=8, stages=3, registers=128),
    *WARPGROUP["shrink"][1:],
)
TENSOR_MEMORY = {
    **WARPGROUP,
    "shrink": TENSOR_MEMORY_SHRINK,
    "shrink/masks": TENSOR_MEMORY_SHRINK,
    "shrink/one_bank": (
        Tile(16, BT=64, BD=32, BC=16, warps=8, stages=6, registers=128),
        *WARPGROUP["shrink/one_bank"],
    ),
    "grad_output/one_bank": (
        WARPGROUP["grad_output/one_bank"][0],
        Tile(128, BT=64, BD=128, BC=64, warps=8, stages=2, registers=168, resident=1),
        *WARPGROUP["grad_output/one_bank"][2:],
    ),
    "grad_input": (
        Tile(16, BT=32, BD=64, BC=16, warps=4, stages=3, registers=168, resident=3),
        Tile(64, BT=32, BD=64, BC=64, warps=8, stages=3, registers=255, resident=1),
        *WARPGROUP["grad_input"][2:],
    ),
}
# mma.sync, on every other card: within the 99 KB of the smaller ones
WARP = {
    "shrink": (
        Tile(16, BT=64, BD=32, BC=16, warps=4, stages=3, registers=168, resident=3),
        Tile(None, BT=64, BD=32, BC=64, warps=4, stages=3),
    ),
    "shrink/one_bank": (
        Tile(16, BT=64, BD=32, BC=16, warps=4, stages=3),
        Tile(None, BT=64, BD=32, BC=64, warps=4, stages=3, registers=255),
    ),
    "shrink/wide_banks": (Tile(None, BT=64, BD=32, BC=64, warps=8, stages=3, registers=255, resident=1),),
    "expand": (
        Tile(64, BT=128, BD=64, BC=64, warps=8, stages=2, registers=128),
        Tile(128, BT=32, BD=64, BC=64, warps=8, stages=1, registers=255, resident=1),
        Tile(256, BT=64, BD=64, BC=64, warps=8, stages=1, registers=255, resident=1),
        Tile(None, BT=32, BD=64, BC=32, warps=8, stages=1, registers=255, resident=1),
    ),
    "grad_output": (
        Tile(16, BT=32, BD=256, BC=16, warps=4, stages=2, registers=255),
        Tile(None, BT=64, BD=128, BC=64, warps=8, stages=2, registers=255, resident=1),
    ),
    "grad_input": (
        Tile(16, BT=64, BD=64, BC=16, warps=4, stages=2, registers=168, resident=3),
        Tile(32, BT=32, BD=64, BC=32, warps=4, stages=2, registers=255),
        Tile(64, BT=32, BD=32, BC=64, warps=8, stages=2, registers=255, resident=1),
        Tile(256, BT=32, BD=32, BC=64, warps=4, stages=1),
        Tile(None, BT=32, BD=32, BC=64, warps=8, stages=1, resident=1),
    ),
}
# the same on compute capability 12, for which ptxas takes more registers
WARP_12 = {
    **WARP,
    "shrink/masks": (Tile(None, BT=32, BD=32, BC=64, warps=8, stages=3),),
    "shrink/one_bank": (replace(WARP["shrink/one_bank"][0], registers=168), *WARP["shrink/one_bank"][1:]),
    "shrink/wide_banks": (Tile(None, BT=32, BD=32, BC=32, warps=8, stages=3),),
    "grad_input": (replace(WARP["grad_input"][0], registers=255, resident=2), *WARP["grad_input"][1:]),
}
# two banks with masks of their own, and the gradient of the mean
WARPGROUP["grad_input/routers"] = TENSOR_MEMORY["grad_input"]
WARP["grad_input/routers"] = (
    Tile(16, BT=32, BD=64, BC=16, warps=4, stages=3, registers=255),
    *WARP["grad_input"][1:],
)
WARP_12["grad_input/routers"] = WARP["grad_input/routers"]
for table in (FLOAT32, WARPGROUP, TENSOR_MEMORY, WARP, WARP_12):
    # a token router takes registers, and the tile of 16 columns leaves none
    table["grad_input/token_router"] = table["grad_input"][1:]
# without a limit, ptxas chooses a tighter one than it needs there, and spills
WARP_12["grad_input/token_router"] = tuple(
    replace(tile, registers=255) if tile.max_columns == 256 else tile for tile in WARP["grad_input/token_router"]
)
# rank space alone, in float32 on every card
RANK_SPACE = (
    Tile(32, BT=32, BC=32, warps=4, registers=168),
    Tile(None, BT=16, BC=64, warps=4, registers=168),
)
SMALL = {"num_warps": 4, "maxnreg": 168}  # launch options of the kernels that only add up


@cache  # once for every launch of a model
def choose_tile(
    kernel: str, r: int, slots: int, dtype: torch.dtype, capability: tuple[int, int], variant: str = ""
) -> Tile:
    """Return the tile of a kernel.

    Args:
        kernel: "shrink", "reduce_split_k", "expand", "grad_output", "mix_backward" or "grad_input".
        r: rank.
        slots: experts whose columns a bank has in the kernel, the most of any bank.
        dtype: compute dtype.
        capability: compute capability; any that is not named above gets the tiles that fit the smallest card.
        variant: of a launch that may have tiles of its own, such as "one_bank": what follows a slash above.
    """
    columns = next_power_of_2(slots) * padded_rank(r)
    if kernel in ("reduce_split_k", "mix_backward"):
        rows = RANK_SPACE
    else:
        halves = {9: WARPGROUP, 10: TENSOR_MEMORY, 12: WARP_12}.get(capability[0], WARP)
        table = FLOAT32 if dtype == torch.float32 else halves
        rows = table.get(f"{kernel}/{variant}", table[kernel])
    tile = next(row for row in rows if row.max_columns is None or columns <= row.max_columns)
    return replace(tile, BC=min(columns, tile.BC))


def w_rows(r: int) -> int:
    """Return how many rows of an expert's B give one partial sum of w."""
    return min(512, 16384 // padded_rank(r))


def dB_rows(r: int) -> int:
    """Return how many rows of every B a program of `reduce_dB_kernel` adds up."""
    return 1024 // padded_rank(r)
