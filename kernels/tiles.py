"""Tile sizes, from shape, rank, dtype and compute capability, in one place.

Nothing here depends on the number of tokens, but for how often a pass is split to fill the machine, so no kernel is
compiled anew when a batch is longer, and the tiles that order the router's sums are the same for every batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from smolora.launch import (  # noqa: F401
    Card,
    card_of,
    cdiv,
    chunk_tokens,
    next_power_of_2 as next_power,
    split_k as splits,
    tile_count,
)

MAX_ONE_PASS_COLUMNS = 128  # of all VU experts: up to here one pass over x computes them all
MAX_ONE_READ_COLUMNS = 64  # chosen ones of both branches: up to here one read of g gives p and dB


def rank_columns(r: int) -> int:
    """Columns an expert takes in a kernel: its rank as a power of two, at least the 16 of a tensor core."""
    return max(16, next_power(r))


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: BT tokens by BD of the long axis (d or k), BC columns of rank space a block."""

    BT: int
    BD: int
    BC: int
    warps: int
    stages: int
    registers: int | None  # limit of a thread's; None leaves it to ptxas

    def options(self) -> dict[str, int]:
        """The launch's options."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


# (columns, BT, BD, BC, warps, stages, registers): the first row whose columns a branch does not exceed; BC shrinks to
# fit them. Found with bench/kernel_report.py: of the tiles without spills, those that keep most bytes on their way.
# What holds them back: float32 products keep whole rows of both operands in registers; mma.sync takes float32
# parameters there before it rounds them; pipelined loads take shared memory for every column block. A limit on
# registers stands where it buys a second block a processor, or keeps ptxas from a tighter one, for which it spills.
ANY = 1 << 30
Rows = tuple[tuple[int, int, int, int, int, int, int | None], ...]

FLOAT32: dict[str, Rows] = {
    "shrink": ((ANY, 32, 16, 64, 8, 2, None),),
    "expand": ((32, 32, 64, 32, 4, 2, None), (64, 32, 32, 64, 4, 2, None), (ANY, 32, 32, 64, 8, 1, None)),
    "grad_output": ((16, 32, 64, 16, 8, 2, None), (ANY, 32, 32, 32, 8, 2, None)),
    "grad_input": ((16, 32, 64, 16, 8, 2, None), (128, 32, 32, 32, 8, 2, None), (ANY, 16, 32, 16, 4, 1, None)),
}
# wgmma and tcgen05 read shared memory, of which there are 227 KB: compute capabilities 9 and 10
WARPGROUP: dict[str, Rows] = {
    "shrink": ((64, 64, 64, 64, 8, 4, 128), (ANY, 64, 32, 128, 8, 4, None)),
    "expand": ((64, 128, 64, 64, 8, 2, 128), (ANY, 64, 64, 64, 4, 1, 255)),
    "grad_output": ((32, 64, 256, 32, 8, 2, None), (128, 64, 128, 64, 8, 2, 128), (ANY, 64, 128, 64, 8, 2, 255)),
    "grad_input": (
        (16, 32, 64, 16, 4, 3, 128), (64, 32, 64, 64, 4, 3, 255), (128, 32, 64, 64, 4, 2, 255),
        (ANY, 32, 64, 64, 4, 1, None),
    ),
}  # fmt: skip
# mma.sync, on every other card: within the 99 KB of the smaller ones
WARP: dict[str, Rows] = {
    "shrink": ((ANY, 64, 16, 64, 4, 4, None),),
    "expand": ((64, 128, 64, 64, 8, 2, 128), (128, 32, 64, 64, 8, 1, 255), (ANY, 64, 64, 64, 8, 1, 255)),
    "grad_output": ((16, 32, 256, 16, 8, 3, None), (ANY, 64, 128, 64, 8, 2, None)),
    "grad_input": (
        (16, 32, 64, 16, 8, 3, 128), (32, 32, 64, 32, 4, 2, 255), (64, 32, 32, 64, 8, 2, 255),
        (ANY, 32, 32, 64, 4, 1, None),
    ),
}  # fmt: skip
# rank space alone, in float32 on every card
MIX: Rows = ((32, 32, 0, 32, 4, 1, 168), (ANY, 16, 0, 64, 4, 1, 168))
SMALL = {"num_warps": 4, "maxnreg": 168}  # launch options of the kernels that only add up


def choose_tile(kernel: str, r: int, slots: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """The tile of a kernel.

    Args:
        kernel: "shrink" (slots: the larger of the branches'), "finish", "expand", "grad_output", "mix_backward" or
            "grad_input".
        r: rank.
        slots: experts whose columns a branch has.
        dtype: compute dtype.
        capability: compute capability; any that is not named above gets the tiles that fit the smallest card.
    """
    padded = next_power(slots) * rank_columns(r)
    if kernel in ("finish", "mix_backward"):
        rows = MIX
    elif dtype == torch.float32:
        rows = FLOAT32[kernel]
    else:
        rows = (WARPGROUP if capability[0] in (9, 10) else WARP)[kernel]
    _, BT, BD, BC, warps, stages, registers = next(row for row in rows if padded <= row[0])
    return Tile(BT, BD, min(padded, BC), warps, stages, registers)


def prepare_rows(r: int) -> int:
    """Rows of an expert's B of which a program of `_prepare` makes a part of w."""
    return min(512, 16384 // rank_columns(r))


def collect_rows(r: int) -> int:
    """Rows of every B whose gradient a program of `_collect_B` adds up."""
    return 1024 // rank_columns(r)
