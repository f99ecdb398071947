"""The importance of parameters for a task, and the pull back to where they were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...data.prompts import IGNORED_LABEL
from ...methods.slices import SlicedParameter, slices_with_gradient
from .stage import in_eval_mode

Tensors = dict[str, Tensor]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a stage trains, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def squared_gradients(
    model: nn.Module, groups: Iterable[Sequence[Mapping[str, Any]]], per_token: bool = False
) -> Tensors:
    """Sum the squares of the gradients of groups of samples.

    Of groups of one sample, with -log p(y | x) as the loss, the mean is the diagonal of the empirical Fisher
    information.

    Args:
        model: the model, used in eval mode.
        groups: the batches of each group, arguments of the model's forward.
        per_token: a group's loss is the mean of -log p over the tokens of its answers; otherwise the sum.

    Returns:
        float32 sums, by name and in the shape of each parameter that trains. No gradient counts as 0.
    """
    parameters = trained(model)
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    with in_eval_mode(model), torch.enable_grad():
        for batches in groups:
            of_group: Tensors = {}
            tokens = 0
            for batch in batches:
                count = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())  # the first token is predicted by nothing
                loss = model(**batch).loss * count
                found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                for name, gradient in zip(parameters, found, strict=True):
                    if gradient is not None:
                        before = of_group.get(name)
                        of_group[name] = gradient.float() if before is None else before + gradient
                tokens += count
            for name, gradient in of_group.items():
                sums[name] += (gradient / tokens if per_token else gradient).square()
    return sums


def joined(past: tuple[Tensors, Tensors] | None, fisher: Tensors, values: Tensors) -> tuple[Tensors, Tensors]:
    """Add a task to the two tensors that stand for all tasks so far.

    For tasks k with F_k and theta_k, the sum of F_k (theta - theta_k)^2 is F (theta - a)^2 plus a constant, with F the
    sum of F_k and a the mean of theta_k weighted by F_k. Where F is 0, a is the newest theta_k.

    Args:
        past: F and a of the tasks before; None if there are none. Parameters that are not in `fisher` stay.
        fisher: F_k of the new task, by parameter.
        values: theta_k of the new task.

    Returns:
        F and a, float32.
    """
    importance, anchor = ({**part} for part in past) if past is not None else ({}, {})
    for name, new in fisher.items():
        value = values[name].detach().float()
        if name not in importance:
            importance[name], anchor[name] = new, value.clone()
            continue
        total = importance[name] + new
        share = torch.where(total > 0, new / total, 1.0)
        importance[name], anchor[name] = total, anchor[name].lerp(value, share)
    return importance, anchor


@torch.no_grad()
def add_pull(parameters: Mapping[str, Tensor], importance: Tensors, anchor: Tensors, weight: float) -> Tensor:
    """Add the gradient of weight / 2 * sum F (theta - a)^2 to the gradients that are there.

    A parameter without a gradient, or a slice of a `SlicedParameter` whose gradient is exactly zero, is not trained in
    this step and stays as it is.

    Args:
        parameters: theta by name, with their gradients.
        importance, anchor: F and a by name, float32; parameters that they lack are not pulled.
        weight: of the penalty.

    Returns:
        sum F (theta - a)^2 over what was pulled.
    """
    total = torch.zeros(())
    for name, parameter in parameters.items():
        if parameter.grad is None or name not in importance:
            continue
        drift = parameter.float() - anchor[name]
        pull = importance[name] * drift
        if isinstance(parameter, SlicedParameter):
            pull = pull * slices_with_gradient(parameter)
        parameter.grad.add_(pull, alpha=weight)
        total = total.to(pull.device) + (pull * drift).sum()
    return total
