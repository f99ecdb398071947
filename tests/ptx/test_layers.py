"""Forward and backward as compiled for a card, in bfloat16 and float16, against float64.

Bounds are those of every backend. Each launch is free of races, of accesses out of bounds and of reads of what nobody
wrote; `support.ptx` says how that is known, and what is not looked for.
"""

import pytest
import torch

from support.cases import OPTIONS, RANKS, SHAPES, plain
from support.mixtures import MIX_OPTIONS, MIX_SHAPES, MixCase
from support.mixtures import plain as weighted
from support.mixtures import smolora as fused
from support.oracle import Case
from support.ptx import layers, worker

bfloat16, float16 = torch.bfloat16, torch.float16

# every mix, and of ranks, masks, dropout and layouts what differs most in code
FEW = [
    (90, bfloat16, plain.but(r=16, d=70, k=300, S=70, B=1, dropout=0.1, mask=True)),  # wgmma, several blocks of k
    (80, float16, plain.but(r=16, d=70, k=300, S=70, B=1, dropout=0.1, mask=True)),
    (80, bfloat16, plain.but(lengths=(40, 0, 90, 7), mask=True, top_k=2, r=12, d=41, k=57)),  # packed, one is empty
    (90, float16, plain.but(r=4, S=1, d=41, k=57)),  # decoding
    (80, bfloat16, plain.but(S=0, dropout=0.1)),
    (90, bfloat16, plain.but(r=64, S=20, B=2, router_grad="straight_through")),  # several column blocks
    (80, bfloat16, weighted.but(weights="token", mask=True, threshold=26, d=41, k=57)),
    (90, float16, weighted.but(empty=True, shared=True, threshold=26, frozen=True)),  # one h for all slots
    (80, bfloat16, weighted.but(mix="softmax", K=0, threshold=64)),  # a router that reads every token
    (90, bfloat16, fused.but(shared=True, K=2, gate_grad="chosen", lengths=(5, 0, 17, 1))),
    (80, bfloat16, fused.but(own=True, frozen=True, routed=False, K=2, E=(3, 5), threshold=64)),  # I of each expert
]

ALL = [*(case.but(r=12) for case in OPTIONS), *SHAPES, *RANKS, *MIX_OPTIONS, *MIX_SHAPES]


def name(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize(("arch", "dtype", "case"), FEW, ids=name)
def test_against_float64(arch: int, dtype: torch.dtype, case: Case | MixCase):
    """The programs of each launch give the same bits from first to last and in an order of chance."""
    worker.run(layers.check, case, dtype, arch, ("forward", "shuffled"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=name)
@pytest.mark.parametrize("dtype", [bfloat16, float16], ids=name)
@pytest.mark.parametrize("arch", [80, 90])
def test_all_cases(arch: int, dtype: torch.dtype, case: Case | MixCase):
    """All cases of all mixes, the programs in every order."""
    worker.run(layers.check, case, dtype, arch, layers.ORDERS)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*OPTIONS[4:8], *SHAPES[11:19], *MIX_OPTIONS[9:12]], ids=name)
def test_on_a_large_card(case: Case | MixCase):
    """More processors give more splits of d and k and smaller chunks of tokens."""
    worker.run(layers.check, case, bfloat16, 80, layers.ORDERS, processors=108)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("case", [plain.but(r=16, dropout=0.1), plain.but(r=64, S=65, B=2)], ids=name)
def test_float32(arch: int, case: Case):
    worker.run(layers.check, case, torch.float32, arch, layers.ORDERS)
