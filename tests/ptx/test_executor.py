"""The executor of PTX itself: it computes what instructions say, and finds the faults that are planted."""

import itertools

import pytest
import torch

from support.oracle import error
from support.ptx import planted, worker

ARCHITECTURES = [80, 90]

FAULTS = {
    "turned": {"race: global read of another warp's write, no barrier"},
    "shifted": {"race: global write over another warp's read, no barrier"},
    "strided": {"race: two programs of a launch write a byte"},
    "neighbour": {
        "race: a program reads what another of the launch wrote",
        "race: a program writes what another of the launch reads",
    },
    "outside": {"global access out of bounds"},
    "never_written": {"global read of what nobody wrote"},
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name: str):
    """Each is named, and the same kernel without it has none."""
    assert worker.run(planted.faults_of, name, False, 80) == sorted(FAULTS[name])
    assert worker.run(planted.faults_of, name, True, 80) == []


def test_integers():
    """Division rounds to zero as in C; shifts keep or drop the sign; sums of a block and its maximum."""
    a, b, out = worker.run(planted.integers, 80)
    a, b = a.long(), b.long()
    unsigned = a % 2**32
    expected = [
        torch.div(a, b, rounding_mode="trunc"),
        a - torch.div(a, b, rounding_mode="trunc") * b,
        a * b,
        (a >> 3) ^ (b.int() << 5).long(),
        torch.tensor([x * y >> 32 for x, y in zip(unsigned.tolist(), (b % 2**32).tolist(), strict=True)]),
        unsigned >> 7,
        torch.minimum(a, b).clamp(min=-5),
        a.sum().expand_as(a),
        a.max().expand_as(a),
    ]
    for row, (got, right) in enumerate(zip(out, expected, strict=True)):
        assert torch.equal(got, right), row


def products() -> list:
    """All combinations of four options of two values: half of them, with every three together, and the rest slow."""
    options = (ARCHITECTURES, (torch.bfloat16, torch.float16), ((64, 64), (16, 32)), (False, True))
    made = []
    for which in itertools.product((0, 1), repeat=4):
        arch, dtype, (M, N), transposed = (values[i] for values, i in zip(options, which, strict=True))
        marks = [pytest.mark.slow] * (sum(which) % 2)
        name = f"{arch}-{dtype}-{M}-{N}-{transposed}"
        made.append(pytest.param(arch, dtype, M, N, transposed, marks=marks, id=name))
    return made


@pytest.mark.parametrize(("arch", "dtype", "M", "N", "transposed"), products())
def test_products(arch: int, dtype: torch.dtype, M: int, N: int, transposed: bool):
    """mma.sync and wgmma, their operands in every order, fetched by cp.async; k is no multiple of a step."""
    a, b, c = worker.run(planted.product, arch, dtype, M, N, 88, transposed)
    assert error(c, a.double() @ b.double()) < 1e-6
