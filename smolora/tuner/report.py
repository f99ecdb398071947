"""A report of the routing in a whole model."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from ..methods.routers import ExpertRouters
from .linear import MixtureLinear
from .routing_inputs import RoutingInputs


class LayerRouting(TypedDict):
    """The routing of one layer over n rows of S tokens; a branch that the fusion leaves out has None."""

    adapter: str
    rows: str  # "samples", or "images" in an image branch: n images of S patches
    vu_experts: Tensor | None  # chosen experts, int32 (n,), or (n, top_k) with top_k above 1
    if_experts: Tensor | None
    vu_gates: Tensor | None  # their weights (n, top_k)
    if_gates: Tensor | None
    vu_logits: Tensor | None  # router outputs (n, M); None where an earlier forward's routes were kept
    if_logits: Tensor | None  # (n, N)
    alpha: Tensor  # the VU branch's share (n, S)
    beta: Tensor  # the IF branch's share (n, S), 1 - alpha
    valid: Tensor | None  # bool (n, S), the tokens that are no padding; None if all are
    cu_seqlens: Tensor | None  # int32 (n + 1,), of rows that are packed: what is (n, S) above is (T,) then
    tasks: Tensor | None  # int64 (n,), the task of each row, given or found; None unless routers are computed
    margins: Tensor | None  # (n, 2), by how much the best (VU, IF) expert's score is above the second's, where found
    task_experts: Tensor | None  # int64 (T, 2), the (VU, IF) experts of each task; -1 for none


def routing_report(model: nn.Module, adapter: str | None = None) -> dict[str, LayerRouting]:
    """Report which experts each layer chose for the last batch, and how it fused the branches.

    Args:
        model: with SMoLoRA adapters, from `get_peft_model` or injected.
        adapter: which one; may be left out where one is active.

    Returns:
        the routing of each layer by its name in the base model, in the model's order. Layers that the last forward did
        not run are left out, such as a projector's if the batch had no image. After `generate()`, text layers report
        its last step.

    Raises:
        ValueError: the model has no such adapter, or several are active and none is named.
        RuntimeError: there was no forward with it yet.
    """
    layers = [
        module for module in model.modules() if isinstance(module, MixtureLinear) and module.mixture.name == "smolora"
    ]
    active = {name for layer in layers for name in layer.active_in_layer()}
    if not layers or (adapter is None and not active):
        raise ValueError(f"model must have an active SMoLoRA adapter, {type(model).__name__} has none")
    if adapter is None:
        if len(active) > 1:
            raise ValueError(f"adapter must be named, several are active: {sorted(active)}")
        (adapter,) = active
    elif not any(adapter in layer.experts for layer in layers):
        raise ValueError(f"adapter must be one of the model's, got {adapter!r}")
    report: dict[str, LayerRouting] = {}
    routing = layers[0].smolora_context.last
    for layer in layers if routing is not None else ():
        decision = layer.decision(routing, adapter) if adapter in layer.experts else None
        if decision is None:
            continue
        last, bounds = decision
        found = layer.experts[adapter].routing(last)
        shape = (last.ids.shape[0] if bounds is None else 1, -1)
        alpha, beta = (share.view(shape) if bounds is None else share.flatten() for share in (found.alpha, found.beta))
        valid = None if layer.takes_images else routing.valid
        report[layer.smolora_key] = LayerRouting(
            adapter=adapter,
            rows="images" if layer.takes_images else "samples",
            vu_experts=found.routes[0],
            if_experts=found.routes[1],
            vu_gates=found.gates[0],
            if_gates=found.gates[1],
            vu_logits=found.logits[0],
            if_logits=found.logits[1],
            alpha=alpha,
            beta=beta,
            valid=valid if valid is None or bounds is None else valid.flatten(),
            cu_seqlens=bounds,
            **_of_tasks(model, routing, layer, adapter, last.ids.shape[0]),
        )
    if not report:
        raise RuntimeError("routing_report() needs a forward of the model first")
    return report


def _of_tasks(
    model: nn.Module, routing: RoutingInputs, layer: MixtureLinear, adapter: str, rows: int
) -> dict[str, Any]:
    """Return the entries of a layer that computed routers have; None where they are random."""
    config = layer.experts[adapter].config
    if not config.computes_routes:
        return {"tasks": None, "margins": None, "task_experts": None}
    selectors = {id(m): m for m in model.modules() if isinstance(m, ExpertRouters) and m.config is config}
    (routers,) = selectors.values()
    margins = routing.by_row("margins", rows, layer.takes_images)
    if margins is not None:
        margins = margins[:, layer.experts[adapter].router_row if margins.shape[1] > 1 else 0]
    return {
        "tasks": routing.by_row("task", rows, layer.takes_images),
        "margins": margins,
        "task_experts": torch.stack([routers.vu_experts, routers.if_experts], 1),
    }
