"""How work is cut up for a device."""

import pytest

from smolora.launch import PART_BYTES, part_rounds


@pytest.mark.parametrize("chunks", [0, 1, 7, 190, 191, 8192])
@pytest.mark.parametrize("numbers", [0, 352256, PART_BYTES])  # gate/up of LLaVA-7B, r 16; and more than fits at once
def test_part_rounds(chunks: int, numbers: int):
    """Every chunk is in a round, in order; rounds are alike, and take no more memory than they may, or a chunk each."""
    rounds = part_rounds(chunks, numbers)
    assert [chunk for each in rounds for chunk in each] == list(range(chunks)) and len(rounds) >= 1
    longest = max(map(len, rounds))
    assert longest * numbers * 4 <= PART_BYTES or longest == 1
    assert longest == 1 or len(rounds) <= 2 * max(1, chunks * numbers * 4 / PART_BYTES)
