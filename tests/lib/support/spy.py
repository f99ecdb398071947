"""What the adapter layers of a tiny Llava got and gave, and what they should have given."""

from __future__ import annotations

import torch

from smolora.reference import smolora_forward
from smolora.tuner import MixtureLinear

PROJECTOR = "model.multi_modal_projector.linear_1"
GATE = "model.language_model.layers.0.mlp.gate_proj"


def layers_of(model):
    return {m.smolora_key: m for m in model.modules() if isinstance(m, MixtureLinear)}


class Spy:
    """Inputs and outputs of the adapter layers in every call, by layer."""

    def __init__(self, model):
        self.calls = {name: [] for name in layers_of(model)}
        self.handles = [
            layer.register_forward_hook(lambda m, a, y: self.calls[m.smolora_key].append((a[0].detach(), y.detach())))
            for layer in layers_of(model).values()
        ]

    def __enter__(self):
        return self.calls

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()


def expected(layer, x, instruction, route_mask=None, adapter="default"):
    """The layer's output by the paper's equations."""
    experts, base, c = layer.smolora_experts[adapter], layer.get_base_layer(), layer.smolora_experts[adapter].config
    return smolora_forward(
        x,
        base.weight,
        base.bias,
        experts.vu_A,
        experts.vu_B,
        experts.if_A,
        experts.if_B,
        experts.vu_router,
        experts.if_router,
        experts.vu_importance,
        experts.if_importance,
        instruction,
        scaling=c.scaling,
        top_k=c.top_k,
        fusion=c.fusion,
        route_mask=route_mask,
    ).detach()


def check(calls, model, instruction, image_instruction, route_mask):
    """Each layer's first call is what the reference gives for these routing inputs."""
    for name, layer in layers_of(model).items():
        if "projector" in name:
            if image_instruction is None:
                assert not calls[name]
                continue
            x, y = calls[name][0]
            want = expected(layer, x, image_instruction)
        else:
            x, y = calls[name][0]
            want = expected(layer, x, instruction, route_mask)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
        plain = layer.base_layer(x)
        assert (y - plain).abs().max() > 1e-2, f"{name}: the adapter does nothing"
