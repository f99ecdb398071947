"""Work partitioning on a device, shared by every backend that launches kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def cdiv(a: int, b: int) -> int:
    """Divide and round up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Card:
    """The properties of a device that the partitioning depends on."""

    capability: tuple[int, int] = (9, 0)
    processors: int = 132


def card_of(device: torch.device) -> Card:
    """Return a device's card; a CPU is treated as four processors."""
    if device.type != "cuda":
        return Card(processors=4) if device.type == "cpu" else Card()
    properties = torch.cuda.get_device_properties(device)
    return Card((properties.major, properties.minor), properties.multi_processor_count)


def split_k(tiles: int, length: int, block: int, processors: int) -> int:
    """Return how many programs share one tile's long axis, such that all run at once, two on each processor.

    It is a power of two, since the kernel that adds up the partial results may be compiled for each number.
    """
    fit = max(1, min(cdiv(length, block), 2 * processors // max(tiles, 1)))
    return 1 << (fit.bit_length() - 1)


def chunk_tokens(tokens: int, num_seqs: int, blocks: int, block_tokens: int, processors: int) -> int:
    """Return how many tokens of a sequence one program of a backward pass sums, for about four programs a processor."""
    chunks = cdiv(4 * processors, blocks)
    per_seq = cdiv(chunks, max(num_seqs, 1))
    return max(1, next_power_of_2(cdiv(tokens // max(num_seqs, 1), block_tokens * per_seq))) * block_tokens


def tile_count(tokens: int, num_seqs: int, block: int, packed: bool, extra_tiles: int = 1) -> int:
    """Return how many tiles of `block` tokens cover all tokens, each tile of one sequence.

    With `packed`, this is an upper bound, because the host does not know the lengths. A sequence of L tokens has
    (L + extra_tiles * block - 1) // block tiles.
    """
    if packed:
        return tokens // block + extra_tiles * num_seqs
    return num_seqs * ((tokens // max(num_seqs, 1) + extra_tiles * block - 1) // block)
