"""Parameters of which some slices stay as they are: a frozen branch, an old task's router, another task's pair.

A gradient of zero does not keep a slice: an optimiser's weight decay and momentum still move it. Here a slice (along
dimension 0) whose gradient is exactly zero is left bit for bit as it is by every `torch.optim.Optimizer`.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class SlicedParameter(nn.Parameter):
    """A parameter whose slices along dimension 0 each train by themselves, or stay."""


_before: WeakKeyDictionary[torch.optim.Optimizer, list[tuple[Tensor, Tensor, Tensor]]] = WeakKeyDictionary()


@torch.no_grad()
def _remember(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Keep the values of the slices that no gradient reaches."""
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(parameter, SlicedParameter) and parameter.grad is not None and parameter.numel():
                moves = (parameter.grad != 0).reshape(parameter.shape[0], -1).any(1)
                kept.append((parameter, moves.view(-1, *(1,) * (parameter.dim() - 1)), parameter.detach().clone()))
    _before[optimizer] = kept


@torch.no_grad()
def _restore(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Give these slices their values back."""
    for parameter, moves, value in _before.pop(optimizer, ()):
        parameter.copy_(torch.where(moves, parameter, value))


register_optimizer_step_pre_hook(_remember)
register_optimizer_step_post_hook(_restore)
