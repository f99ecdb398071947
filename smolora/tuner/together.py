"""Two layers in one launch: what a layer computes for the one beside it, which is called next with the same input.

Where tokens are decoded one by one, a launch costs more than the work in it, and CUDA C++ has one that serves several
projections of x. A model calls gate and up in turn: the first computes both outputs and leaves the other's behind. That
is for the next adapted layer that is called and for nobody else, once, and only if nothing it depends on has changed
since. In whatever else a layer may meet (hooks, offloading, another stream, a gradient) it computes its own.
"""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from ..backends import resolve_backend
from ..methods.base import Decision, compute_dtype, has_hooks, is_local, is_plain_linear
from ..methods.smolora import SMoLoRAExperts

if TYPE_CHECKING:
    from .call import Call
    from .layer import SMoLoRALayer

BESIDE = {"gate_proj": "up_proj"}  # the layer that a model calls right after one, with the same input


class State(NamedTuple):
    """What a layer's output depends on."""

    tensors: tuple[Tensor, ...]  # x and parameters
    versions: tuple[int, ...]  # theirs, which writing in place raises
    others: tuple[SMoLoRALayer, str, Call, torch.dtype, bool, torch.cuda.Stream | None]

    def same(self, other: State | None) -> bool:
        """Whether nothing has changed, so that the output would be the same."""
        return (
            other is not None
            and self.versions == other.versions
            and self.others == other.others
            and all(map(is_, self.tensors, other.tensors))
        )


class Ahead(NamedTuple):
    """What a layer would compute that has not been called yet."""

    state: State
    result: tuple[Tensor, ...]


def state_of(layer: SMoLoRALayer, name: str, x: Tensor, call: Call) -> State | None:
    """The state of a layer whose only active adapter is `name`; None unless one launch is all that a call would do."""
    experts, base, dtype = layer.smolora_experts[name], layer.base_layer, compute_dtype(x)
    if type(experts) is not SMoLoRAExperts or has_hooks(layer) or has_hooks(experts) or _has_any_global_hook():
        return None
    if not is_plain_linear(base, dtype) or resolve_backend(x.device.type, dtype) != "cuda":
        return None
    device, parameters = x.device, experts._parameters.values()
    tensors = (x, base.weight, *(() if base.bias is None else (base.bias,)), *parameters)
    if not all(map(is_local, parameters)) or any(t.device != device or t.is_inference() for t in tensors):
        return None
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    versions = tuple([t._version for t in tensors])
    return State(tensors, versions, (layer, name, call, dtype, experts.training, stream))


def decoded_together(layer: SMoLoRALayer, name: str, x: Tensor, call: Call) -> Tensor | None:
    """The layer's output, base and adapter `name`, if a launch for two layers gives it or has given it; else None."""
    if torch.compiler.is_compiling():
        return None
    context = layer.smolora_context
    ahead, context.here.ahead = context.here.ahead, None
    if torch.is_grad_enabled() or x.dim() != 3 or x.shape[1] != 1:
        return None
    if ahead is not None and ahead.state.same(state_of(layer, name, x, call)):
        return _finish(layer, name, x, call, ahead.result)
    other = context.beside(layer)
    if other is None or other.disable_adapters or other.active_in_layer() != [name]:
        return None
    states = [state_of(each, name, x, call) for each in (layer, other)]
    if states[0] is None or states[1] is None:
        return None
    each = [
        (
            one.smolora_experts[name],
            one.base_layer,
            call.arguments(x, None, one.smolora_experts[name].config, (one.smolora_key, name), one.takes_images),
        )
        for one in (layer, other)
    ]
    results = None
    if results is None:
        return None
    context.here.ahead = Ahead(states[1], results[1])
    return _finish(layer, name, x, call, results[0])


def _finish(layer: SMoLoRALayer, name: str, x: Tensor, call: Call, result: tuple[Tensor, ...]) -> Tensor:
    decision = Decision()
    y = layer.smolora_experts[name].finish(x, result, decision)
    layer.decide(call, name, (decision.last, None))
    return y
