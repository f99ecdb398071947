"""What a backward pass has to compute, from the gradients that were asked for."""

import pytest

from smolora.common import Wanted, wanted

NOTHING = Wanted(p=False, c=False, vu_B=False, if_B=False, importance=False)


@pytest.mark.parametrize(
    ("fusion", "asked", "expected"),
    [
        ("adaptive", (), {}),
        ("adaptive", ("dh",), {"p": True}),
        ("adaptive", ("vu_B",), {"p": True, "c": True, "vu_B": True}),  # the score reaches B too
        ("adaptive", ("importance",), {"p": True, "c": True, "importance": True}),
        ("adaptive", ("gates",), {"p": True}),
        ("mean", ("vu_B", "importance"), {"vu_B": True}),  # no score, so no importance, and B needs no p
        ("vu", ("vu_B", "if_B"), {"vu_B": True}),  # nothing of a branch that is not in use
        ("if", ("vu_B", "importance"), {}),
    ],
)
def test_wanted(fusion: str, asked: tuple[str, ...], expected: dict[str, bool]):
    names = ("dh", "vu_B", "if_B", "importance", "gates")
    assert wanted(fusion, *(name in asked for name in names)) == NOTHING._replace(**expected)
