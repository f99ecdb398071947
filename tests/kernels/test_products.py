"""The pass over x by itself, against plain sums and products."""

import pytest
import torch

from smolora.kernels.primitives import sequences
from smolora.kernels.products import shrink
from support.marks import DEVICE, on_device

pytestmark = on_device
LENGTHS = (5, 0, 40)
T, d, r = sum(LENGTHS), 70, 12


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(T, d, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.fixture
def A() -> list[torch.Tensor]:
    return [torch.randn(e, r, d, generator=torch.Generator().manual_seed(e)).to(DEVICE) for e in (3, 4)]


def packed():
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=DEVICE)
    return sequences(T, len(LENGTHS), boundaries)


def test_all_experts_of_one_bank_and_the_slots_of_another(x: torch.Tensor, A: list[torch.Tensor]):
    """Each bank has its own columns, in the order of experts or of ids, and a token router the last ones."""
    ids = torch.tensor([[[0, 1], [3, 1]], [[0, 1], [0, 2]], [[0, 1], [2, 0]]], dtype=torch.int32, device=DEVICE)
    router = torch.randn(5, d, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    shrunk = shrink(
        x, A, slots=[3, 2], by_id=[False, True], ids=ids, seqs=packed(), r=r, strides=(r * d, d, 1), token_router=router
    )
    first, second = (part.double().sum(0) for part in shrunk.parts)
    assert shrunk.sums is None and len(shrunk.parts[0]) == shrunk.split_k
    torch.testing.assert_close(first, x.double() @ A[0].double().flatten(0, 1).T, rtol=1e-5, atol=1e-4)
    start = 0
    for sequence, length in enumerate(LENGTHS):
        rows = slice(start, start + length)
        expected = x[rows].double() @ A[1][ids[sequence, 1].long()].double().flatten(0, 1).T
        torch.testing.assert_close(second[rows], expected, rtol=1e-5, atol=1e-4)
        start += length
    torch.testing.assert_close(shrunk.logits_part.double().sum(0), x.double() @ router.double().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_column_sums_alone(x: torch.Tensor, masked: bool):
    """A sequence's tiles add up to the sum of its routed tokens, wherever its first one lies."""
    routed_tokens = torch.ones(T, dtype=torch.bool, device=DEVICE)
    if masked:
        routed_tokens[:3] = False
        routed_tokens[-5:] = False
    parts = routed_tokens.split(LENGTHS)
    routed = torch.tensor(
        [[int(part.nonzero()[0]) if len(part) else 0, int(part.sum())] for part in parts], device=DEVICE
    )
    mask = routed_tokens if masked else None
    seqs = packed()
    shrunk = shrink(x, [], [], [], None, seqs, r=r, strides=(0, 0, 0), num_columns=1, routed=routed, route_mask=mask)
    extra, first = 2 if masked else 1, [boundary // shrunk.tile_tokens for boundary in seqs.cu_seqlens.tolist()]
    for sequence, (tokens, part) in enumerate(zip(x.split(LENGTHS), parts, strict=True)):
        start = first[sequence] + sequence * extra
        offset = -int(routed[sequence, 0]) % shrunk.tile_tokens
        tiles = -(-(len(tokens) + offset) // shrunk.tile_tokens)
        total = shrunk.sums[start : start + tiles].double().sum(0)
        torch.testing.assert_close(total, tokens[part].double().sum(0), rtol=1e-5, atol=1e-4)


def test_the_transposed_read(x: torch.Tensor):
    """With the strides of B it is g B, as the backward pass wants it."""
    B = torch.randn(2, d, r, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    shrunk = shrink(x, [B], [2], [False], None, sequences(T, 1, None), r=r, strides=(d * r, 1, r))
    expected = torch.einsum("td,edr->ter", x.double(), B.double()).flatten(1)
    torch.testing.assert_close(shrunk.parts[0].double().sum(0), expected, rtol=1e-5, atol=1e-4)
