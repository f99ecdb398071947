"""Trip counts that are declared, and those that a loop's own range gives."""

from __future__ import annotations

import ast

import pytest

from predict.trips import TRIPS, Arguments, of_range

ARGUMENTS = Arguments(
    {"chunks": 16, "GROUP": 8, "seq_len": 1024, "chunk_size": 512, "BT": 64, "d": 4096, "BD": 64}, (128, 2)
)


@pytest.mark.parametrize(
    ("loop", "trips"),
    [
        ("range(chunks)", 16),
        ("range(0, chunks, GROUP)", 2),
        ("range(0, 5, 2)", 3),
        ("range(start, chunks)", None),  # of the program alone
        ("range(0, chunks + 1)", None),
        ("tl.static_range(4)", None),
    ],
)
def test_trips_of_a_range(loop: str, trips: int | None):
    (statement,) = ast.parse(f"for i in {loop}:\n    pass").body
    assert of_range(statement, ARGUMENTS) == trips


def test_declared_trips():
    assert TRIPS["shrink_kernel"]["c"](ARGUMENTS) == 4096 // 64 // 2  # two programs share d
    assert TRIPS["grad_output_kernel"]["t"](ARGUMENTS) == 512 // 64
    with pytest.raises(AttributeError, match="split_k"):
        ARGUMENTS.split_k  # noqa: B018
