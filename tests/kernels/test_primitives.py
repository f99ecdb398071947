"""The device functions that all passes share."""

import pytest
import torch
import triton
import triton.language as tl

from smolora.kernels.primitives import tile_to_seq
from smolora.launch import chunk_tokens, tile_count
from support.marks import DEVICE, on_device

pytestmark = on_device


@triton.jit
def _tiles(cu_seqlens_ptr, out_ptr, num_seqs, seq_len, BT: tl.constexpr, EXTRA_TILES: tl.constexpr):
    tile = tl.program_id(0)
    i, j, start, end = tile_to_seq(tile, cu_seqlens_ptr, num_seqs, seq_len, BT, EXTRA_TILES)
    tl.store(out_ptr + tile * 4, i)
    tl.store(out_ptr + tile * 4 + 1, j)
    tl.store(out_ptr + tile * 4 + 2, start)
    tl.store(out_ptr + tile * 4 + 3, end)


@pytest.mark.parametrize("extra_tiles", [1, 2])
@pytest.mark.parametrize(
    "lengths",
    [(7,), (16, 16, 16), (1, 1, 1, 1, 1), (0, 5, 0, 0, 33, 0), (100, 1, 15, 17, 16), (5,) * 20],  # packed
    ids=str,
)
def test_tiles_cover_packed_sequences(lengths: tuple[int, ...], extra_tiles: int):
    """Every token lies in one tile, of its own sequence; with an extra one there is a tile to spare for a shift."""
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    count = tile_count(sum(lengths), len(lengths), 16, True, extra_tiles)
    out = torch.empty((count, 4), dtype=torch.int64, device=DEVICE)
    _tiles[(count,)](cu, out, len(lengths), 0, BT=16, EXTRA_TILES=extra_tiles)
    check_cover(out.tolist(), cu.tolist(), extra_tiles)


@pytest.mark.parametrize("extra_tiles", [1, 2])
@pytest.mark.parametrize(("n", "S"), [(1, 1), (3, 16), (2, 17), (4, 5)])
def test_tiles_cover_equal_sequences(n: int, S: int, extra_tiles: int):
    count = tile_count(n * S, n, 16, False, extra_tiles)
    out = torch.empty((count, 4), dtype=torch.int64, device=DEVICE)
    _tiles[(count,)](None, out, n, S, BT=16, EXTRA_TILES=extra_tiles)
    check_cover(out.tolist(), list(range(0, n * S + 1, S)), extra_tiles)


def check_cover(rows: list[list[int]], cu: list[int], extra_tiles: int) -> None:
    covered: list[int] = []
    room = [0] * (len(cu) - 1)
    for i, j, start, end in rows:
        assert (start, end) == (cu[i], cu[i + 1])
        assert j == room[i]
        room[i] += 1
        covered += range(start + j * 16, min(end, start + j * 16 + 16))
    assert sorted(covered) == list(range(cu[-1]))
    assert all(16 * r >= b - a + (extra_tiles - 1) * 15 for r, a, b in zip(room, cu, cu[1:], strict=False) if b > a)


def test_chunks_are_whole_tiles():
    """A chunk is whole tiles of one sequence, and no longer than what the sequence needs."""
    for tokens in (1, 63, 1000, 8192, 10**6):
        for n in (1, 3, 64):
            chunk = chunk_tokens(tokens, n, 43, 64, 132)
            assert chunk % 64 == 0 and chunk < max(1, tokens // n) + 64
