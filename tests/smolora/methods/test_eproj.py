"""Eproj's projectors by themselves: copies of the base's, each for the images of its task."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import smolora

D, H, K = 6, 10, 8
TASKS = torch.tensor([2, 0, 2, 1])


def projector(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, K)).to(dtype)


def adapted(dtype: torch.dtype = torch.float64, tasks: int = 4) -> smolora.FusedEproj:
    """Projectors with values of their own, as after training."""
    layer = smolora.FusedEproj(projector(dtype), smolora.EprojConfig(num_tasks=tasks))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in layer.projectors.parameters():
            parameter.add_(torch.randn_like(parameter))
    return layer


def images(count: int = 4, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(count, 3, D, dtype=dtype)


@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_one_equals_the_base_bit_for_bit(dtype, mixed):
    base, x = projector(dtype), images(dtype=dtype)
    layer = smolora.FusedEproj(base, smolora.EprojConfig(num_tasks=3))
    assert {p.dtype for p in layer.projectors.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        y = layer(x, 1)
        assert torch.equal(y, base(x)) and y.dtype == base(x).dtype
        torch.testing.assert_close(layer(x, TASKS), y)  # smaller products may round otherwise


def test_each_image_goes_through_its_tasks_projector():
    """By the equation of the projector, image by image; gradients reach x and the tasks of the batch alone."""
    layer, x = adapted(), images().requires_grad_()
    y = layer(x, TASKS)
    weights = [[p.detach().clone().requires_grad_() for p in each.parameters()] for each in layer.projectors]
    x2 = x.detach().clone().requires_grad_()
    rows = []
    for image, task in zip(x2, TASKS.tolist(), strict=True):
        W1, b1, W2, b2 = weights[task]
        rows.append(nn.functional.gelu(image @ W1.T + b1) @ W2.T + b2)
    expected = torch.stack(rows)
    torch.testing.assert_close(y, expected)
    assert (y - projector(torch.float64)(x)).abs().max() > 0.1
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    torch.testing.assert_close(x.grad, x2.grad)
    for task, each in enumerate(layer.projectors):
        for found, wanted in zip(each.parameters(), weights[task], strict=True):
            if task == 3:
                assert found.grad is None
            else:
                assert wanted.grad.any()
                torch.testing.assert_close(found.grad, wanted.grad)


def test_a_batch_equals_one_by_one():
    layer, x = adapted(), images()
    together = layer(x, TASKS)
    for i, task in enumerate(TASKS.tolist()):
        torch.testing.assert_close(layer(x[i : i + 1], task)[0], together[i])
        torch.testing.assert_close(layer(x[i : i + 1], TASKS[i : i + 1])[0], together[i])


def test_the_base_is_frozen_and_kept():
    base = projector()
    before = copy.deepcopy(base.state_dict())
    layer = smolora.FusedEproj(base, smolora.EprojConfig(num_tasks=2))
    assert not any(p.requires_grad for p in layer.base_layer.parameters())
    assert all(p.requires_grad for p in layer.projectors.parameters())
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1.0)
    layer(images(dtype=torch.float32), 1).sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in layer.projectors[0].state_dict().items())
    assert not all(torch.equal(value, before[name]) for name, value in layer.projectors[1].state_dict().items())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: smolora.FusedEproj(nn.GELU(), smolora.EprojConfig()),
            TypeError,
            "must be a module with linear .*GELU",
        ),
        (lambda: smolora.FusedEproj(nn.Linear(2, 2), smolora.EprojConfig()), TypeError, "must be a module with linear"),
        (
            lambda: smolora.FusedEproj(projector(), smolora.LiLoRAConfig()),
            TypeError,
            "must be an EprojConfig, got LiLo",
        ),
        (lambda: smolora.EprojConfig(r=8), ValueError, "r must be left out: a task of Eproj has .*got 8"),
        (lambda: smolora.EprojConfig(lora_dropout=0.0), ValueError, "lora_dropout must be left out"),
        (lambda: adapted()(images(), 4), ValueError, "task must name a task of the adapter, 0 to 3, got 4"),
        (lambda: adapted()(images(), torch.tensor([0])), ValueError, r"task must be a tensor of shape \(4,\)"),
        (lambda: adapted()(images()[..., :-1], 0), ValueError, "x must have 6 inputs"),
        (
            lambda: adapted()(images()[0], 0, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32)),
            ValueError,
            "takes no images in one row",
        ),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
