"""Computing the routers of an adapter from the samples of a task, with PEFT alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed

from ..arguments import check_int
from ..config import SMoLoRAConfig
from ..methods.routers import ExpertRouters, Moments, TaskExperts
from .arguments import check_image_to_sample, token_input
from .context import CONTEXT, RoutingContext
from .features import read_router_features
from .layer import MixtureLayer
from .model import MixtureModel
from .packing import boundaries


@torch.no_grad()
def fit_routers(
    model: Any, batches: Iterable[Mapping[str, Any]], task: int, adapter_name: str | None = None
) -> TaskExperts:
    """Add the samples of a task to an adapter's computed routers, and give the task its experts.

    Called before the task is trained, and before an optimiser is made, since new experts make parameters grow. It may
    be called again with further samples of a task, and for a new task years later: only sums over samples are kept, and
    the order of tasks, batches and processes changes no bit of them. Where `torch.distributed` runs, every process
    calls it with samples of its own.

    Args:
        model: a PEFT model with a SMoLoRA adapter whose `vu_router_kind` or `if_router_kind` is not "random".
        batches: arguments of the model's forward, batch by batch; those that the features do not need are ignored.
            With `labels` or a `prompt_mask`, answers are left out of what is averaged.
        task: its number, from 0.
        adapter_name: of the adapter; None: the active one.

    Returns:
        The task's experts. The configuration has the numbers of experts and tasks, so `save_pretrained` saves them.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has changed then.
    """
    tuner = model if isinstance(model, MixtureModel) else getattr(model, "base_model", None)
    if not isinstance(tuner, MixtureModel):
        raise TypeError(f"model must be a PEFT model with a SMoLoRA adapter, got {type(model).__name__}")
    check_int("task", task, least=0)
    name = tuner._one_adapter(adapter_name)
    config: Any = tuner.peft_config[name]
    if not isinstance(config, SMoLoRAConfig) or not config.computes_routes:
        raise ValueError(
            f"adapter_name must name a SMoLoRA adapter with vu_router_kind or if_router_kind 'prototype' or 'ridge', "
            f"got {name!r}"
        )
    selector = tuner.selector(name)
    assert isinstance(selector, ExpertRouters)  # of such a configuration
    modes = [(module, module.training) for module in tuner.modules()]
    tuner.eval()
    try:
        sums = _sums(tuner.model.__dict__[CONTEXT], name, selector, batches)
    finally:
        for module, training in modes:
            module.training = training
    selector.add(task, sums)
    chosen = selector.assign(task)
    _fit_layers(tuner, name, config, selector, task, chosen)
    return chosen


def _sums(
    context: RoutingContext, name: str, selector: ExpertRouters, batches: Iterable[Mapping[str, Any]]
) -> list[Moments]:
    """Return the sums of all samples, over all processes.

    Raises:
        TypeError, ValueError: a batch does not fit, or there is no sample.
    """
    total: list[Moments] | None = None
    for batch in batches:
        inputs = dict(batch)
        tokens = token_input(inputs)
        bounds = None if tokens is None else boundaries(inputs, *tokens.shape[:2])
        count = None if tokens is None else tokens.shape[0] if bounds is None else bounds.shape[0] - 1
        features = read_router_features(
            context,
            name,
            inputs,
            inputs.get("instruction_embeds"),
            count,
            reads=selector.reads,
            prompt_mask=inputs.get("prompt_mask"),
            image_to_sample=check_image_to_sample(inputs.get("image_to_sample"), count),
            bounds=bounds,
        )
        found = selector.moments(features)
        total = found if total is None else [_added(*pair) for pair in zip(total, found, strict=True)]
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        if total is None:  # a process may have no batch where others have some
            total = selector.no_moments()
        device: Any = context.model.device
        total = [Moments(*(_reduced(t, device) for t in each)) for each in total]
    if total is None or not any(bool(each.total.any()) for each in total):
        raise ValueError("batches must have a sample of the task or more, got none")
    return total


def _added(one: Moments, other: Moments) -> Moments:
    return Moments(*(a + b.to(a.device) for a, b in zip(one, other, strict=True)))


def _reduced(values: Tensor, device: torch.device) -> Tensor:
    """Return the sum of a tensor over all processes."""
    values = values.to(device)
    distributed.all_reduce(values)
    return values


def _fit_layers(
    tuner: MixtureModel,
    name: str,
    config: SMoLoRAConfig,
    selector: ExpertRouters,
    task: int,
    chosen: TaskExperts,
) -> None:
    """Let the layers grow to a task's experts, and freeze those that it does not train."""
    for branch, expert in zip(("vu", "if"), chosen, strict=True):
        if expert is not None:
            setattr(config, f"num_{branch}_experts", max(config.num_experts(branch), expert + 1))
    for layer in tuner.model.modules():
        if isinstance(layer, MixtureLayer) and name in layer.experts:
            experts: Any = layer.experts[name]
            experts.grow()
            for branch in ("vu", "if"):
                experts.freeze_experts(branch, ~selector.trained_experts(task, branch))
