"""Parameters whose slices train one by one: branches, of which some are frozen, or routers and pairs of tasks.

A gradient of zero does not keep a slice, because weight decay and momentum still move it. These parameters keep every
slice (along dimension 0) whose gradient is exactly zero, bit for bit, under any `torch.optim.Optimizer`.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class SlicedParameter(nn.Parameter):
    """A parameter that an optimiser changes only in the slices with a nonzero gradient."""


_before: WeakKeyDictionary[torch.optim.Optimizer, list[tuple[Tensor, Tensor, Tensor]]] = WeakKeyDictionary()


@torch.no_grad()
def _remember(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Save the values before an optimiser's step, and which slices have a gradient."""
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(parameter, SlicedParameter) and parameter.grad is not None and parameter.numel():
                moves = (parameter.grad != 0).reshape(parameter.shape[0], -1).any(1)
                kept.append((parameter, moves.view(-1, *(1,) * (parameter.dim() - 1)), parameter.detach().clone()))
    _before[optimizer] = kept


@torch.no_grad()
def _restore(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Restore the slices without a gradient after the step."""
    for parameter, moves, value in _before.pop(optimizer, ()):
        parameter.copy_(torch.where(moves, parameter, value))


register_optimizer_step_pre_hook(_remember)
register_optimizer_step_post_hook(_restore)
