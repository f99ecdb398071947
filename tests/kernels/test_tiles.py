"""The tables of tiles: every kernel finds one, and it is the one that is written there."""

from itertools import product

import pytest
import torch

from smolora.kernels import tiles
from smolora.kernels.tiles import choose_tile, dB_rows, padded_rank, w_rows

KERNELS = ("shrink", "reduce_split_k", "expand", "grad_output", "mix_backward", "grad_input")
CARDS = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TABLES = {
    "float32": tiles.FLOAT32,
    "warpgroup": tiles.WARPGROUP,
    "tensor memory": tiles.TENSOR_MEMORY,
    "warp": tiles.WARP,
    "rank space": {"": tiles.RANK_SPACE},
}


def test_padded_ranks():
    assert [padded_rank(r) for r in (1, 8, 16, 17, 48, 128)] == [16, 16, 16, 32, 64, 128]


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_rows_are_in_order(table: dict):
    """The first row that is wide enough is taken, so rows get wider, and the last one takes any number of columns."""
    for rows in table.values():
        widths = [row.max_columns for row in rows]
        assert widths[-1] is None and widths[:-1] == sorted(set(widths[:-1]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_shape_has_a_tile(kernel: str):
    """Of powers of two, as Triton wants them, and no wider than the columns that there are."""
    for r, slots, dtype, card in product((1, 12, 16, 33, 64, 128), (1, 2, 3, 8, 40), DTYPES, CARDS):
        tile = choose_tile(kernel, r, slots, dtype, card)
        columns = 1 << (slots - 1).bit_length()
        assert columns * padded_rank(r) >= tile.BC and tile.BC >= 16 and tile.BT >= 16
        assert all(size & (size - 1) == 0 for size in (tile.BT, tile.BC, tile.BD, tile.warps))
        assert (tile.BD > 0) == (kernel not in ("reduce_split_k", "mix_backward"))


def test_which_table_a_card_has():
    """wgmma, tcgen05, and mma.sync for all others; float32 has tiles of its own on every card, rank space as well."""
    chosen = {card: choose_tile("expand", 16, 4, torch.bfloat16, card) for card in CARDS}
    assert chosen[9, 0] == tiles.WARPGROUP["expand"][0]
    assert chosen[10, 0] == tiles.TENSOR_MEMORY["expand"][0]
    others = [tile for card, tile in chosen.items() if card[0] not in (9, 10)]
    assert set(others) == {tiles.WARP["expand"][0]}
    assert {choose_tile("expand", 16, 4, torch.float32, card) for card in CARDS} == {tiles.FLOAT32["expand"][2]}
    assert {choose_tile("mix_backward", 16, 2, dtype, card) for card in CARDS for dtype in DTYPES} == {
        tiles.RANK_SPACE[0]
    }


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_variants(capability: tuple[int, int], dtype: torch.dtype):
    """A token router never has the tile of 16 columns; a variant without rows of its own has the kernel's."""
    plain = choose_tile("grad_input", 16, 1, dtype, capability)
    router = choose_tile("grad_input", 16, 1, dtype, capability, "token_router")
    wider = choose_tile("grad_input", 16, 2, dtype, capability)
    assert plain != router and (router.BT, router.BD, router.warps) == (wider.BT, wider.BD, wider.warps)
    assert choose_tile("expand", 16, 1, dtype, capability, "one_bank") == choose_tile(
        "expand", 16, 1, dtype, capability
    )


def test_options():
    """A limit on registers is passed on only where there is one."""
    assert tiles.Tile(None, BT=16, BC=16, warps=4).options() == {"num_warps": 4, "num_stages": 1}
    limited = tiles.Tile(None, BT=16, BC=16, warps=4, stages=3, registers=128)
    assert limited.options() == {"num_warps": 4, "num_stages": 3, "maxnreg": 128}


@pytest.mark.parametrize("r", [1, 16, 24, 64, 128])
def test_rows_of_B(r: int):
    """A program holds as many numbers for every rank, at most 512 rows of B for w."""
    assert w_rows(r) * padded_rank(r) <= 16384 and w_rows(r) <= 512
    assert dB_rows(r) * padded_rank(r) == 1024
