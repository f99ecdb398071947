"""The linear layer that PEFT puts in a base layer's place."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from ..config import MixtureConfig
from ..methods.base import Decision
from .context import RoutingContext
from .decode_fusion import try_fused_decode
from .layer import MixtureLayer
from .routing_inputs import RoutingInputs


class MixtureLinear(nn.Module, MixtureLayer):
    """A linear layer of a model, possibly quantised, with adapters of one method.

    Attributes:
        smolora_context: shared with the model; None for a method that treats all samples alike.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MixtureConfig,
        *,
        context: RoutingContext | None,
        key: str,
        takes_images: bool,
    ) -> None:
        super().__init__()
        MixtureLayer.__init__(self, base_layer, key, takes_images)
        self.smolora_context = context
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    @classmethod
    def check_target(cls, base: nn.Module, key: str) -> None:
        """Check that a module can get adapters.

        Raises:
            TypeError: it cannot; the message has its name `key`.
        """
        backend = resolve_quantization_backend(base)
        if not isinstance(base, nn.Linear) and (backend is None or backend.layer_type != "linear"):
            raise TypeError(
                f"target_modules must name linear layers (torch.nn.Linear, possibly quantised), but {key} is "
                f"{type(base).__name__}"
            )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base's output plus that of each active adapter.

        Args:
            x: (B, S, d), or (images, patches, d) in an image branch.
        """
        if self.disable_adapters or not self.active_in_layer():
            return self.base_layer(x, *args, **kwargs)
        try:
            return self._adapted(x, *args, **kwargs)
        except (ValueError, TypeError, RuntimeError) as error:
            name_layer(error, self.smolora_key)
            raise

    def _adapted(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self.active_in_layer()
        if self.smolora_context is None:  # every token by itself
            rows = x.reshape(1, -1, x.shape[-1])
            y = self.experts[names[0]](rows, base=self.base_layer)
            for name in names[1:]:
                y = y + self.experts[name](rows)
            return y.view(*x.shape[:-1], self.out_features)
        routing = self.smolora_context.current()
        if routing.is_off:
            return self.base_layer(x, *args, **kwargs)
        rows, bounds = routing.arrange(x, self.takes_images)
        if len(names) == 1 and bounds is None:
            y = try_fused_decode(self.smolora_context, self, names[0], rows, routing)
            if y is not None:
                return y.view(*x.shape[:-1], self.out_features)
        y = self._output(routing, rows, bounds, names[0], self.base_layer)
        if not torch.compiler.is_compiling() and y.grad_fn is not None:
            y.grad_fn.metadata["smolora_routing"] = routing  # alive as long as a backward may recompute the layer
        for name in names[1:]:
            y = y + self._output(routing, rows, bounds, name)
        return y.view(*x.shape[:-1], self.out_features)

    def _output(
        self, routing: RoutingInputs, rows: Tensor, bounds: Tensor | None, name: str, base: nn.Module | None = None
    ) -> Tensor:
        """Return one adapter's output, plus the base's if `base` is given."""
        experts, decision = self.experts[name], Decision()
        arguments = routing.adapter_arguments(rows, bounds, experts.config, (self.smolora_key, name), self.takes_images)
        y = experts(rows, base=base, decision=decision, **arguments)
        self.record_decision(routing, name, (decision.last, bounds))
        return y

    def __repr__(self) -> str:
        return f"{self.mixture.name}.{super().__repr__()}"


def name_layer(error: Exception, key: str) -> None:
    """Prefix the message of an error with the name of the layer that raised it."""
    if error.args and isinstance(error.args[0], str):
        error.args = (f"{key}: {error.args[0]}", *error.args[1:])
