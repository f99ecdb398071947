"""Moving the experts of a RoutedLoRA adapter between the layers of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..methods.routedlora import RoutedLoRAConfig, RoutedLoRAExperts
from .layer import MixtureLayer


@torch.no_grad()
def place_experts(
    model: nn.Module,
    placement: Mapping[str, Sequence[int]],
    adapter_name: str = "default",
    *,
    generator: torch.Generator | None = None,
) -> None:
    """Change which experts each layer of a model has.

    An expert that a layer had before keeps its values there, and stays frozen if it was. A new one starts with A
    Kaiming-uniform, as D-MoLE's do, and B = 0, so that it changes no output yet.

    Args:
        model: a PEFT model with a RoutedLoRA adapter. Its configuration takes over the placement.
        placement: the experts of each layer, by the layer's name in the base model.
        adapter_name: of the adapter.
        generator: of the new experts' values, on the CPU.

    Raises:
        ValueError: the adapter is no RoutedLoRA, or the placement names a layer or an expert that it does not have.
    """
    config: Any = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, RoutedLoRAConfig):
        raise ValueError(f"adapter_name must name a RoutedLoRA adapter of the model, got {adapter_name!r}")
    layers = {
        m.smolora_key: m for m in model.modules() if isinstance(m, MixtureLayer) and m.mixture.name == "routedlora"
    }
    new = {key: sorted(experts) for key, experts in placement.items() if experts}
    changed = RoutedLoRAConfig(num_experts=config.num_experts, placement=new)  # checks it before anything changes
    changed.check_layers(layers)
    config.placement = new
    for key, layer in layers.items():
        old = dict(layer.experts.items()).get(adapter_name)
        if old is not None and old.expert_ids == new.get(key):
            continue
        if old is not None:
            del layer.experts[adapter_name]
        layer.update_layer(adapter_name, config)
        if adapter_name in layer.experts:
            _fill(layer.experts[adapter_name], old, generator)


def _fill(experts: RoutedLoRAExperts, old: RoutedLoRAExperts | None, generator: torch.Generator | None) -> None:
    """Copy the experts that a layer had, and initialise the others."""
    frozen = torch.zeros_like(experts.frozen_experts)
    bound = experts.in_features**-0.5  # Kaiming with a = sqrt(5)
    for slot, expert in enumerate(experts.expert_ids):
        if old is not None and expert in old.expert_ids:
            before = old.expert_ids.index(expert)
            experts.A[slot] = old.A[before]
            experts.B[slot] = old.B[before]
            frozen[slot] = old.frozen_experts[before]
        else:
            start = torch.empty(experts.A.shape[1:], dtype=experts.A.dtype)
            experts.A[slot] = start.uniform_(-bound, bound, generator=generator)
    experts.freeze_experts(frozen)
