"""The adapter layer that PEFT puts in a linear layer's place."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from ..config import MixtureConfig
from ..methods.base import Decision, Mixture
from ..spec import Mixed
from .call import Call
from .context import RoutingContext
from .together import decoded_together


class MixtureLayer(BaseTunerLayer):
    """What PEFT sees of an adapted layer: the experts of each adapter by name, in `<method>_experts`.

    Attributes:
        mixture: the method, of the class.
        smolora_context: shared with the model; None for a method that treats all samples alike.
        smolora_key: the layer's name in the model.
        takes_images: whether its rows are images.
    """

    mixture: Mixture
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, context: RoutingContext | None, key: str, takes_images: bool) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        setattr(self, f"{self.mixture.name}_experts", nn.ModuleDict())
        self.smolora_context = context
        self.smolora_key = key
        self.takes_images = takes_images
        self.merged_adapters = []

    @property
    def experts(self) -> nn.ModuleDict:
        """The experts of each adapter by name."""
        return getattr(self, f"{self.mixture.name}_experts")

    def update_layer(self, adapter_name: str, config: MixtureConfig) -> None:
        """Add an adapter."""
        device, dtype = place_of(self)
        experts = self.mixture.experts(
            self.in_features,
            self.out_features,
            config,
            device=device,
            dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        )
        self.experts[adapter_name] = experts
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def active_in_layer(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.experts]

    def decided(self, call: Call, name: str) -> tuple[Mixed, Tensor | None] | None:
        """What an adapter decided in a call, and the boundaries of packed rows; None if it did not run."""
        return getattr(call.routed, self._label(name), None)

    def decide(self, call: Call, name: str, last: tuple[Mixed, Tensor | None]) -> None:
        """Keep what an adapter decided in a call."""
        if torch.compiler.is_compiling():
            call.compiled = True
        setattr(call.routed, self._label(name), last)

    def forget(self, call: Call) -> None:
        """Drop what was decided in a call."""
        for name in self.experts:
            vars(call.routed).pop(self._label(name), None)

    def _label(self, name: str) -> str:
        """An attribute for an adapter of this layer; torch.compile takes none with a dot."""
        return f"{self.smolora_key} {name}".replace(".", "/")

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        if not inference_mode:
            self._refreeze(adapter_names)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        if requires_grad:
            self._refreeze(adapter_names)

    def _refreeze(self, adapter_names: str | list[str]) -> None:
        """Freeze again what the configuration gives no gradient: PEFT lets all of an adapter train."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.experts:
                self.experts[name].freeze()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the base's device. Not to its dtype, which would round float32 weights that were just loaded."""
        if device is None:
            device, _ = place_of(self)
        if adapter_name not in self.experts or device is None:
            return
        experts = self.experts[adapter_name]
        if not any(parameter.is_meta for parameter in experts.parameters()):
            experts.to(device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused.

        Raises:
            ValueError: always, with the reason.
        """
        raise ValueError(self.mixture.no_merge)

    def unmerge(self) -> None:
        """Nothing to undo: nothing is ever merged."""


class MixtureLinear(nn.Module, MixtureLayer):
    """A linear layer of a model, possibly quantised, with adapters of one method."""

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
        MixtureLayer.__init__(self, base_layer, context, key, takes_images)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output plus that of each active adapter.

        Args:
            x: (B, S, d), or (images, patches, d) in an image branch.
        """
        if self.disable_adapters or not self.active_in_layer():
            return self.base_layer(x, *args, **kwargs)
        try:
            return self._adapted(x)
        except (ValueError, TypeError, RuntimeError) as error:
            name_layer(error, self.smolora_key)
            raise

    def _adapted(self, x: Tensor) -> Tensor:
        names = self.active_in_layer()
        if self.smolora_context is None:  # every token by itself
            rows = x.reshape(1, -1, x.shape[-1])
            y = self.experts[names[0]](rows, base=self.base_layer)
            for name in names[1:]:
                y = y + self.experts[name](rows)
            return y.view(*x.shape[:-1], self.out_features)
        call = self.smolora_context.current()
        rows, bounds = call.arrange(x, self.takes_images)
        if len(names) == 1 and bounds is None and (y := decoded_together(self, names[0], rows, call)) is not None:
            return y.view(*x.shape[:-1], self.out_features)
        y = self._output(call, rows, bounds, names[0], self.base_layer)
        if not torch.compiler.is_compiling() and y.grad_fn is not None:
            y.grad_fn.metadata["smolora_call"] = call  # which lives as long as a backward may recompute the layer
        for name in names[1:]:
            y = y + self._output(call, rows, bounds, name)
        return y.view(*x.shape[:-1], self.out_features)

    def _output(
        self, call: Call, rows: Tensor, bounds: Tensor | None, name: str, base: nn.Module | None = None
    ) -> Tensor:
        """One adapter's output, with the base's if `base` is given."""
        experts, decision = self.experts[name], Decision()
        arguments = call.arguments(rows, bounds, experts.config, (self.smolora_key, name), self.takes_images)
        y = experts(rows, base=base, decision=decision, **arguments)
        self.decide(call, name, (decision.last, bounds))
        return y

    def __repr__(self) -> str:
        return f"{self.mixture.name}.{super().__repr__()}"


def layer_class(mixture: Mixture) -> type[MixtureLinear]:
    """Make the adapter layer of a method, such as `SMoLoRALinear`."""
    attributes = {
        "__doc__": f"A linear layer of a model, possibly quantised, with {mixture.title} adapters.",
        "mixture": mixture,
        "adapter_layer_names": (f"{mixture.name}_experts",),
    }
    return type(f"{mixture.title}Linear", (MixtureLinear,), attributes)


def place_of(layer: BaseTunerLayer) -> tuple[torch.device | None, torch.dtype | None]:
    """Where and in which dtype the adapter of a layer lies: as the base, or where an offloaded base runs."""
    base = layer.get_base_layer()
    device, dtype = layer._get_base_layer_device_and_dtype(base)
    hook = getattr(base, "_hf_hook", None)
    if device is not None and device.type == "meta" and hook is not None:
        devices = (getattr(h, "execution_device", None) for h in getattr(hook, "hooks", (hook,)))
        device = torch.device(next((d for d in devices if d is not None), "cpu"))
    return device, dtype


def name_layer(error: Exception, key: str) -> None:
    """Put a layer's name before the message of an error that a model's forward raises in it."""
    if error.args and isinstance(error.args[0], str):
        error.args = (f"{key}: {error.args[0]}", *error.args[1:])
