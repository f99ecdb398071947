"""Gradients of a model, and the bound within which two ways to compute them agree."""

from __future__ import annotations

import torch
from torch import Tensor


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return copies of the gradients by parameter."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-5, atol: float = 1e-12
) -> None:
    """Compare gradients, relative to the largest of each parameter; some must not be zero."""
    assert got.keys() == want.keys()
    assert any(grad.any() for grad in want.values())
    for name, grad in want.items():
        assert (got[name] - grad).abs().max() <= rtol * grad.abs().max() + atol, name
