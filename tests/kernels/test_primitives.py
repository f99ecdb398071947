"""The device functions that all passes share."""

import pytest
import torch
import triton
import triton.language as tl

from smolora.kernels.primitives import keep_mask, tile_to_seq
from smolora.launch import chunk_tokens, next_power_of_2, tile_count
from smolora.reference import philox_bytes
from support.marks import DEVICE, on_device

pytestmark = on_device


@triton.jit
def _masks(
    seed_ptr, out_ptr, first, D, THRESHOLD: tl.constexpr, STREAM: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    rows = tl.load(first) + tl.arange(0, BT)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    keep = keep_mask(seed_ptr, rows, tl.program_id(0) * BD, THRESHOLD, STREAM, BT, BD)
    tl.store(out_ptr + tl.arange(0, BT)[:, None] * D + o_d[None, :], keep.to(tl.uint8), mask=o_d[None, :] < D)


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345, -7])
@pytest.mark.parametrize("stream", [0, 1])
def test_masks_are_those_of_the_reference(seed: int, stream: int):
    """The same counter, key and byte order as the reference's own Philox, over block edges."""
    out = torch.full((16, 70), 7, dtype=torch.uint8, device=DEVICE)
    first = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    _masks[(3,)](torch.tensor([seed], device=DEVICE), out, first, 70, THRESHOLD=77, STREAM=stream, BT=16, BD=32)
    expected = torch.from_numpy(philox_bytes(seed % 2**64, 16, 70, stream) >= 77)
    assert torch.equal(out.cpu().bool(), expected)


def test_rows_past_32_bits_have_masks_of_their_own():
    """The counter has the row's high word: row 2^32 is not row 0 again."""
    masks = []
    for row in (0, 2**32):
        out = torch.empty((16, 64), dtype=torch.uint8, device=DEVICE)
        first = torch.full((1,), row, dtype=torch.int64, device=DEVICE)
        _masks[(2,)](torch.tensor([5], device=DEVICE), out, first, 64, THRESHOLD=128, STREAM=0, BT=16, BD=32)
        masks.append(out)
    assert 0.3 < (masks[0] != masks[1]).float().mean() < 0.7


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
    """A chunk is a power of two of tiles, whatever the batch: its number never makes a kernel compile anew often."""
    for tokens in (1, 63, 1000, 8192, 10**6):
        for n in (1, 3, 64):
            chunk = chunk_tokens(tokens, n, 43, 64, 132)
            assert chunk % 64 == 0 and next_power_of_2(chunk) == chunk and chunk // 2 < max(64, tokens)
