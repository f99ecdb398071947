"""Parameters whose slices an optimiser leaves alone where the gradient is exactly zero."""

from __future__ import annotations

import pytest
import torch

from smolora.methods.slices import SlicedParameter, slices_with_gradient


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_slices_without_a_gradient_keep_every_bit(device: str):
    """Under weight decay and momentum; the smallest number, an infinity and a NaN are gradients, and -0 is none."""
    parameter = SlicedParameter(torch.randn(6, 3, 5, device=device))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=0.5)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # gives all slices momentum
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    for row, value in enumerate((1.0, 0.0, 1e-45, -0.0, torch.inf, torch.nan)):
        parameter.grad[row, 1, 2] = value
    moves = [True, False, True, False, True, True]
    assert slices_with_gradient(parameter).flatten().tolist() == moves
    optimizer.step()
    changed = (parameter.view(torch.int32) != before.view(torch.int32)).flatten(1).any(1)
    assert changed.tolist() == moves
