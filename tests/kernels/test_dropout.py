"""Dropout's masks as bits."""

import pytest
import torch
import triton
import triton.language as tl

from smolora.kernels.dropout import draw_masks, keep, keeps, load_mask
from smolora.reference import philox_bytes
from smolora.spec import new_masks
from support.marks import DEVICE, on_device

pytestmark = on_device


def unpacked(masks: torch.Tensor, columns: int) -> torch.Tensor:
    """The bits of int32 words, one an element: column c of a word's 32 has bit 8 (c % 4) + c // 4."""
    column = torch.arange(32)
    bits = masks.cpu().long()[..., None] >> (8 * (column % 4) + column // 4) & 1
    return bits.flatten(-2)[..., :columns].bool()


@pytest.mark.parametrize("threshold", [1, 13, 128, 129, 255])
@pytest.mark.parametrize("seed", [0, 2**62 + 12345, -7])
def test_masks_are_those_of_the_reference(seed: int, threshold: int):
    """The same counter, key and byte order as the reference's own Philox; on both sides of half a byte's range."""
    masks = new_masks(torch.empty(17, 0, device=DEVICE), [0, 3], 70)
    draw_masks(masks, torch.tensor([seed], device=DEVICE), [0, 3], threshold)
    assert masks.shape == (2, 17, 3)
    for mask, stream in zip(unpacked(masks, 70), (0, 3), strict=True):
        assert torch.equal(mask, torch.from_numpy(philox_bytes(seed % 2**64, 17, 70, stream) >= threshold))


@triton.jit
def _masked(x_ptr, masks_ptr, bits_ptr, out_ptr, T, words, D, BT: tl.constexpr, BD: tl.constexpr):
    rows = tl.arange(0, BT)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    m_x = (rows < T)[:, None] & (o_d < D)[None, :]
    for stream in tl.static_range(2):
        b_mask = load_mask(masks_ptr, rows, rows < T, tl.program_id(0) * BD, T, words, stream, BT, BD)
        o_x = (stream * T + rows)[:, None] * D + o_d[None, :]
        tl.store(bits_ptr + o_x, keeps(b_mask, BT, BD).to(tl.uint8), mask=m_x)
        tl.store(out_ptr + o_x, keep(tl.load(x_ptr + o_x, mask=m_x), b_mask, BT, BD), mask=m_x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("BD", [16, 32, 64])
def test_tiles_of_a_mask(BD: int, dtype: torch.dtype):
    """Each element's bit, and the element itself or zero, also at an edge that is no multiple of anything."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(-(2**31), 2**31, (2, 13, 3), generator=generator).to(DEVICE, torch.int32)
    x = torch.randn(2, 13, 70, generator=generator).to(DEVICE, dtype)
    bits = torch.full((2, 13, 70), 7, dtype=torch.uint8, device=DEVICE)
    out = torch.full_like(x, float("nan"))
    _masked[(-(-70 // BD),)](x, masks, bits, out, 13, 3, 70, BT=16, BD=BD)
    expected = unpacked(masks, 70)
    assert torch.equal(bits.cpu(), expected.to(torch.uint8))
    assert torch.equal(out.cpu(), torch.where(expected, x.cpu(), 0.0))
