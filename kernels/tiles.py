"""Tile sizes, from shape, rank, dtype and compute capability, in one place.

Nothing here depends on the number of tokens, but for how often a pass is split to fill the machine, so no kernel is
compiled anew when a batch is longer, and the tiles that order the router's sums are the same for every batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_ONE_PASS_COLUMNS = 128  # of all VU experts: up to here one pass over x computes them all
MAX_BLOCK_COLUMNS = 64  # chosen columns of a branch that a program holds


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


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


@dataclass(frozen=True)
class Card:
    """What the choice needs to know of a device."""

    capability: tuple[int, int] = (9, 0)
    processors: int = 132


def card_of(device: torch.device) -> Card:
    """The device's card; the default one stands in for a CPU, on which the interpreter runs."""
    if device.type != "cuda":
        return Card(processors=4) if device.type == "cpu" else Card()
    properties = torch.cuda.get_device_properties(device)
    return Card((properties.major, properties.minor), properties.multi_processor_count)


def choose_tile(kernel: str, r: int, slots: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """The tile of a kernel.

    Args:
        kernel: "shrink" (slots: the larger of the branches'), "finish", "expand", "grad_output", "mix_backward" or
            "grad_input".
        r: rank.
        slots: experts whose columns a branch has.
        dtype: compute dtype.
        capability: compute capability; one that is not known gets the tiles of the nearest below.
    """
    padded = next_power(slots) * rank_columns(r)
    exact = dtype == torch.float32
    if kernel == "shrink":
        columns = min(padded, MAX_ONE_PASS_COLUMNS)
        if exact:
            return Tile(32, 32, min(columns, 64), 4, 2)
        if capability[0] >= 9:
            return Tile(64, 64, columns, 4, 4)
        return Tile(64, 64, columns, 4 if columns <= 64 else 8, 3)
    columns = min(padded, MAX_BLOCK_COLUMNS)
    if kernel in ("finish", "mix_backward"):
        return Tile(16 if columns > 32 else 32, 0, columns, 4, 1)
    if exact:
        return Tile(32, 64 if columns <= 32 else 32, columns, 4, 2)
    if kernel == "expand":
        return Tile(64, 128, columns, 4, 2)
    if kernel == "grad_output":
        return Tile(64, 128, columns, 4, 3)
    if kernel == "grad_input":
        return Tile(64, 64, columns, 4, 3)
    raise KeyError(kernel)


def splits(tiles: int, length: int, block: int, processors: int) -> int:
    """Programs that share one tile's long axis, so that tiles * splits programs occupy every processor about twice."""
    return max(1, min(cdiv(length, block), cdiv(2 * processors, max(tiles, 1))))


def chunk_tokens(tokens: int, instances: int, blocks: int, block_tokens: int, processors: int) -> int:
    """Tokens of an instance that one program of a backward pass adds up: as many as leave four programs a processor."""
    wanted = cdiv(4 * processors, blocks)  # chunks in all
    per_instance = cdiv(wanted, max(instances, 1))
    return max(1, next_power(cdiv(tokens // max(instances, 1), block_tokens * per_instance))) * block_tokens


def tile_count(tokens: int, instances: int, block: int, packed: bool, slack: int = 1) -> int:
    """Programs that cover all tokens in tiles of one instance each (see `common.locate`)."""
    if packed:
        return tokens // block + slack * instances
    return instances * ((tokens // max(instances, 1) + slack * block - 1) // block)
