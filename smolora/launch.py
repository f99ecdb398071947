"""Work partitioning on a device, shared by every backend that launches kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PART_BYTES = 2**28  # of partial sums at a time


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


def split_k(tiles: int, length: int, block: int, programs: int) -> int:
    """Return how many programs share one tile's long axis.

    Args:
        length: of the axis; a program has at least `block` of it.
        programs: how many the card runs at once.
    """
    return fewest_parts(tiles, cdiv(length, block), programs)


def fewest_parts(units: int, most: int, programs: int) -> int:
    """Return into how many parts each of `units` pieces of work is cut, such that the card is full to the end.

    `programs` parts run at once. If r rounds of them do all parts, then r / parts of a unit's time pass. Each part
    writes a partial result, so take the fewest that are within 15% of the best with up to four rounds.
    """
    most = max(1, min(most, 4 * programs // max(units, 1)))
    times = [cdiv(units * parts, programs) / parts for parts in range(1, most + 1)]
    return next(parts for parts, time in enumerate(times, 1) if time <= 1.15 * min(times))


def chunk_tokens(tokens: int, num_seqs: int, blocks: int, block_tokens: int, programs: int) -> int:
    """Return how many tokens of a sequence one program of a backward pass sums, a multiple of `block_tokens`.

    Each of `blocks` blocks of the long axis has a program for each chunk, of which the card runs `programs` at once.
    """
    seq_blocks = max(1, cdiv(tokens // max(num_seqs, 1), block_tokens))
    return cdiv(seq_blocks, fewest_parts(blocks * max(num_seqs, 1), seq_blocks, programs)) * block_tokens


def part_rounds(chunks: int, numbers: int) -> list[range]:
    """Cut the chunks of a backward pass into rounds, so that the parts of a round take no more than PART_BYTES.

    Chunks grow with the number of sequences, and short sequences would have more parts than anything else.

    Args:
        numbers: of a chunk's parts, in float32.

    Returns:
        At least one round, all nearly as long.
    """
    most = max(1, PART_BYTES // max(numbers * 4, 1))
    each = max(1, cdiv(chunks, max(1, cdiv(chunks, most))))
    return [range(first, min(first + each, chunks)) for first in range(0, max(chunks, 1), each)]


def tile_count(tokens: int, num_seqs: int, block: int, packed: bool, extra_tiles: int = 1) -> int:
    """Return how many tiles of `block` tokens cover all tokens, each tile of one sequence.

    With `packed`, this is an upper bound, because the host does not know the lengths. A sequence of L tokens has
    (L + extra_tiles * block - 1) // block tiles.
    """
    if packed:
        return tokens // block + extra_tiles * num_seqs
    return num_seqs * ((tokens // max(num_seqs, 1) + extra_tiles * block - 1) // block)
