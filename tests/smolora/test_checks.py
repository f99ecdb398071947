"""The checks can fail: wrong backends of every common kind are caught by them."""

import pytest
import torch

from cases import plain
from oracle import build, complaints, error, reference, run
from smolora import rank_space


def scaled(tensors: tuple, factor: float) -> tuple:
    return (tensors[0] * factor, *tensors[1:])


def wrong(name: str):
    """A wrong version of a pass, from the right one."""
    right = {n: getattr(rank_space, n) for n in ("route_shrink", "fuse_expand", "grad_output", "grad_input", "shares")}

    def zero_output(*a):
        return scaled(right["fuse_expand"](*a), 0.0)

    def scale_off(*a):
        return right["fuse_expand"](*a[:8], a[8] * 1.01, *a[9:])

    def swapped(lead, fusion):
        return right["shares"](-lead, fusion)

    def mask_ignored(*a):
        return right["route_shrink"](*a[:3], None, *a[4:])

    def expert_dropped(*a):
        h, w, routes, gates, *rest = right["route_shrink"](*a)
        return h * torch.tensor([1.0, 0.0])[:, None, None].to(h), w, routes, gates, *rest

    def wrong_expert(*a):
        h, w, routes, *rest = right["route_shrink"](*a)
        return h, w, (routes + 1) % 4, *rest

    def no_dropout(*a):
        return right["grad_input"](*a[:10], 0, *a[11:])

    def zero_dx(*a):
        return scaled(right["grad_input"](*a), 0.0)

    def delta_forgotten(*a):  # the score's gradient is not carried to A
        return right["grad_output"](*a[:2], a[2] * 0, *a[3:])

    return {
        "zero output": ("fuse_expand", zero_output), "scale off by 1%": ("fuse_expand", scale_off),
        "alpha and beta swapped": ("shares", swapped), "mask ignored": ("route_shrink", mask_ignored),
        "one expert dropped": ("route_shrink", expert_dropped), "wrong expert": ("route_shrink", wrong_expert),
        "backward without dropout": ("grad_input", no_dropout), "dx zero": ("grad_input", zero_dx),
        "delta forgotten": ("grad_output", delta_forgotten),
    }[name]  # fmt: skip


MUTANTS = (
    "zero output", "scale off by 1%", "alpha and beta swapped", "mask ignored", "one expert dropped", "wrong expert",
    "backward without dropout", "dx zero", "delta forgotten",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_rejected(mutant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    layer, batch = build(plain.but(mask=True, dropout=0.2, B=16, S=20, bias=False, spread=False), dtype)
    layer.base_layer.weight.zero_()  # the base's part of y would hide an error in the adapter's
    truth, eager = reference(layer, batch, torch.float64), reference(layer, batch, dtype)
    assert not complaints(run(layer, batch, "torch"), truth, eager, dtype)
    monkeypatch.setattr(rank_space, *wrong(mutant))
    assert complaints(run(layer, batch, "torch"), truth, eager, dtype)


def test_nan_is_an_error():
    assert error(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
