"""How many programs or blocks a kernel is launched with, whatever language it is written in."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Card:
    """What a launch needs to know of a device."""

    capability: tuple[int, int] = (9, 0)
    processors: int = 132


def card_of(device: torch.device) -> Card:
    """Return the device's card; a default one stands in for a CPU, on which kernels are interpreted or emulated."""
    if device.type != "cuda":
        return Card(processors=4) if device.type == "cpu" else Card()
    properties = torch.cuda.get_device_properties(device)
    return Card((properties.major, properties.minor), properties.multi_processor_count)


def split_k(tiles: int, length: int, block: int, processors: int) -> int:
    """Return how many programs share one tile's long axis, so that all of them run at once, two on a processor.

    A power of two, since the kernel that adds up their parts is compiled for each number of them.
    """
    fit = max(1, min(cdiv(length, block), 2 * processors // max(tiles, 1)))
    return 1 << (fit.bit_length() - 1)


def chunk_tokens(tokens: int, num_seqs: int, blocks: int, block_tokens: int, processors: int) -> int:
    """Return how many tokens of a sequence one program of a backward pass adds up.

    As many as leave four programs a processor.
    """
    wanted = cdiv(4 * processors, blocks)  # chunks in all
    per_seq = cdiv(wanted, max(num_seqs, 1))
    return max(1, next_power_of_2(cdiv(tokens // max(num_seqs, 1), block_tokens * per_seq))) * block_tokens


def tile_count(tokens: int, num_seqs: int, block: int, packed: bool, extra_tiles: int = 1) -> int:
    """Return how many programs cover all tokens in tiles of one sequence each."""
    if packed:
        return tokens // block + extra_tiles * num_seqs
    return num_seqs * ((tokens // max(num_seqs, 1) + extra_tiles * block - 1) // block)
