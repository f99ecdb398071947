"""The checks can fail: wrong backends of every common kind are caught by them."""

import inspect
from collections.abc import Callable

import pytest
import torch

from smolora.engine import mixes, torch_passes
from support.cases import plain
from support.oracle import build, complaints, error, reference, run

pytestmark = pytest.mark.usefixtures("without_compiled_code")


def altered(function: Callable, **changes: Callable) -> Callable:
    """A function that changes some of its arguments, by name, before it is right."""
    signature = inspect.signature(function)

    def wrong(*arguments):
        bound = signature.bind(*arguments)
        for name, change in changes.items():
            bound.arguments[name] = change(bound.arguments[name])
        return function(*bound.args)

    return wrong


def first(function: Callable, change: Callable) -> Callable:
    """A function whose first result is changed."""

    def wrong(*arguments):
        value, *rest = function(*arguments)
        return change(value), *rest

    return wrong


def wrong(name: str) -> tuple[object, str, Callable]:
    """Where a pass or a step of it lies, and a wrong version of it."""
    p = torch_passes

    def wrong_expert(*arguments):
        h, w, ids, *rest = route_shrink(*arguments)
        return h, w, (ids + 1) % 4, *rest

    route_shrink = p.route_shrink
    drop = torch.tensor([1.0, 0.0])[:, None, None]
    return {
        "zero output": (p, "fuse_expand", first(p.fuse_expand, lambda y: y * 0.0)),
        "scale off by 1%": (p, "fuse_expand", altered(p.fuse_expand, scaling=lambda s: s * 1.01)),
        "alpha and beta swapped": (mixes, "shares", altered(mixes.shares, fusion_logit=lambda z: -z)),
        "mask ignored": (p, "route_shrink", altered(p.route_shrink, route_mask=lambda m: None)),
        "one expert dropped": (p, "route_shrink", first(p.route_shrink, lambda h: h * drop.to(h))),
        "wrong expert": (p, "route_shrink", wrong_expert),
        "backward without dropout": (p, "grad_input", altered(p.grad_input, threshold=lambda t: 0)),
        "dx zero": (p, "grad_input", first(p.grad_input, lambda dx: dx * 0.0)),
        "delta forgotten": (p, "grad_output", altered(p.grad_output, w=lambda w: w * 0)),  # not carried to A
    }[name]


MUTANTS = (
    "zero output",
    "scale off by 1%",
    "alpha and beta swapped",
    "mask ignored",
    "one expert dropped",
    "wrong expert",
    "backward without dropout",
    "dx zero",
    "delta forgotten",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_rejected(mutant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    layer, batch = build(plain.but(mask=True, dropout=0.2, B=16, S=20, bias=False, spread=False), dtype)
    layer.base_layer.weight.zero_()  # the base's part of y would hide an error in the adapter's
    truth, eager = reference(layer, batch, torch.float64), reference(layer, batch, dtype)
    assert not complaints(run(layer, batch, "torch"), truth, eager, dtype)
    monkeypatch.setattr(*wrong(mutant))
    assert complaints(run(layer, batch, "torch"), truth, eager, dtype)


def test_nan_is_an_error():
    assert error(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
