"""The tests of compiled kernels can fail: kernels with a fault in them are rejected."""

import pytest
import torch

from support.cases import plain
from support.ptx import mutants, worker

bfloat16, float16 = torch.bfloat16, torch.float16
ALL_KERNELS = plain.but(r=16, d=70, k=100, S=70, B=1, dropout=0.1, mask=True)  # no size is a multiple of its tile
MAIN = {"shrink_kernel", "fuse_expand_kernel", "grad_output_kernel", "grad_input_kernel"}


def check_noticed(which: str, arch: int, at_least: float, ends: bool = True, kernels: set[str] = MAIN) -> None:
    """Of all mutants at least this share is noticed, and some in each of the kernels named."""
    counts = worker.run(mutants.unnoticed, which, ALL_KERNELS, bfloat16, arch, ends)
    all_mutants, missed = sum(n for n, _ in counts.values()), [where for _, them in counts.values() for where in them]
    assert all_mutants and len(missed) <= (1 - at_least) * all_mutants, "\n".join([f"of {all_mutants}:", *missed])
    assert {name for name, (n, them) in counts.items() if len(them) < n} >= kernels


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.slow)])
def test_barriers(arch: int):
    """Each barrier left out in turn. Triton also sets some before a first use, after a last one, and on branches that
    these programs do not take."""
    check_noticed("barrier", arch, at_least=0.8)


def test_fences():
    """Each fence left out between what a warp stores and a wgmma reads. grad_input stores A before its loop, and shrink
    its ones, with two fences between that and any wgmma, of which one would do."""
    check_noticed("fence", 90, at_least=0.65, kernels={"shrink_kernel", "fuse_expand_kernel", "grad_output_kernel"})


@pytest.mark.parametrize("arch", [80, 90])
def test_waiting(arch: int):
    """Each wait for copies that leaves one group more under way. Behind a loop nothing is under way any more."""
    check_noticed("wait", arch, at_least=0.5)


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.slow)])
def test_masks(arch: int):
    """Each store without its mask. Some only keep threads from storing the same number again, or mask nothing here."""
    check_noticed("mask", arch, at_least=0.7, ends=False)


@pytest.mark.parametrize(
    "kernel",
    [
        "route_instruction_and_w_kernel",
        "reduce_split_k_kernel",
        "fuse_expand_kernel",
        "mix_backward_kernel",
        "reduce_dB_kernel",
        "grad_input_kernel",
    ],
)
def test_a_scale_that_is_off(kernel: str):
    """By 1%; in float16, since that is within what bfloat16 may round in so few numbers."""
    with pytest.raises(AssertionError, match="scale off by"):
        worker.run(mutants.with_scale, kernel, 1.01, ALL_KERNELS, float16, 80)
    if kernel == "fuse_expand_kernel":
        worker.run(mutants.with_scale, kernel, 1.0, ALL_KERNELS, float16, 80)


@pytest.mark.parametrize("dtype", [bfloat16, float16], ids=str)
def test_swapped_branches(dtype: torch.dtype):
    """Alpha for beta."""
    with pytest.raises(AssertionError, match="y: error"):
        worker.run(mutants.with_swapped_shares, ALL_KERNELS, dtype, 80)
