"""Two adapted layers in one launch, where tokens are decoded one by one.

A launch costs more there than its work, and CUDA C++ has a kernel that serves several projections of x. A model calls
gate and up in turn, so the first call computes both outputs. The prefetched output is consumed at most once, by the
next adapted layer, and only if its inputs are unchanged. A layer that meets anything else (hooks, offloading, another
stream, gradients) computes its own output.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from ..backends import resolve_backend
from ..methods.base import Decision, compute_dtype, decode_layers, has_hooks, is_local, is_plain_linear
from ..spec import Mixed
from .context import RoutingContext
from .layer import MixtureLayer
from .routing_inputs import RoutingInputs
from .thread_state import InputsKey, Prefetched

SIBLINGS = {"gate_proj": "up_proj"}  # the layer that a model calls right after this one, with the same input


def sibling_of(context: RoutingContext, layer: MixtureLayer) -> MixtureLayer | None:
    """Return the layer that is called right after this one with the same input."""
    name = layer.smolora_key.rpartition(".")[2]
    if name not in SIBLINGS:
        return None
    return context.layers.get(layer.smolora_key.removesuffix(name) + SIBLINGS[name])


def inputs_key(layer: MixtureLayer, name: str, x: Tensor, routing: RoutingInputs) -> InputsKey | None:
    """Return what a layer's output depends on, or None if a call does more than one launch.

    Args:
        name: the layer's only active adapter.
    """
    experts, base, dtype = layer.experts[name], layer.base_layer, compute_dtype(x)
    if type(experts) is not layer.mixture.experts or has_hooks(layer) or has_hooks(experts) or _has_any_global_hook():
        return None
    if not is_plain_linear(base, dtype) or resolve_backend(x.device.type, dtype) != "cuda":
        return None
    device, parameters = x.device, experts._parameters.values()
    tensors = (x, base.weight, *(() if base.bias is None else (base.bias,)), *parameters)
    if not all(map(is_local, parameters)) or any(t.device != device or t.is_inference() for t in tensors):
        return None
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    versions = tuple([t._version for t in tensors])
    return InputsKey(tensors, versions, (layer, name, routing, dtype, experts.training, stream))


def try_fused_decode(
    context: RoutingContext, layer: MixtureLayer, name: str, x: Tensor, routing: RoutingInputs
) -> Tensor | None:
    """Return the output of a layer, base and adapter, where one launch for two layers gives it or has given it.

    Args:
        name: the layer's only active adapter.

    Returns:
        y, or None where the layer has to compute it.
    """
    if torch.compiler.is_compiling():
        return None
    thread = context.thread
    prefetched, thread.prefetched = thread.prefetched, None
    if torch.is_grad_enabled() or x.dim() != 3 or x.shape[1] != 1:
        return None
    if prefetched is not None and prefetched.key.same(inputs_key(layer, name, x, routing)):
        return _finish(layer, name, x, routing, prefetched.result)
    sibling = sibling_of(context, layer)
    if sibling is None or sibling.disable_adapters or sibling.active_in_layer() != [name]:
        return None
    keys = [inputs_key(each, name, x, routing) for each in (layer, sibling)]
    if keys[0] is None or keys[1] is None:
        return None
    each = [
        (
            one.experts[name],
            one.base_layer,
            routing.adapter_arguments(x, None, one.experts[name].config, (one.smolora_key, name), one.takes_images),
        )
        for one in (layer, sibling)
    ]
    results = decode_layers(x, each)
    if results is None:
        return None
    thread.prefetched = Prefetched(keys[1], results[1])
    return _finish(layer, name, x, routing, results[0])


def _finish(layer: MixtureLayer, name: str, x: Tensor, routing: RoutingInputs, result: Mixed) -> Tensor:
    decision = Decision()
    y = layer.experts[name].finish(x, result, decision)
    layer.record_decision(routing, name, (decision.last, None))
    return y
