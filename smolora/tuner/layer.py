"""The adapters of one layer, as PEFT manages them: added, activated, frozen, moved."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from ..config import MixtureConfig
from ..methods.base import Mixture, MixtureExperts
from ..spec import Mixed
from .routing_inputs import RoutingInputs


class MixtureLayer(BaseTunerLayer):
    """An adapted layer with the experts of each adapter by name, in `<method>_experts`.

    Attributes:
        mixture: the method, of the class.
        smolora_key: the layer's name in the model.
        takes_images: whether its rows are images.
    """

    mixture: Mixture
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, key: str, takes_images: bool) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())
        self.in_features, self.out_features = self.sizes()
        setattr(self, f"{self.mixture.name}_experts", nn.ModuleDict())
        self.smolora_key = key
        self.takes_images = takes_images
        self.merged_adapters: list[str] = []

    def sizes(self) -> tuple[int, int]:
        """Return the sizes that the experts are made for: inputs and outputs."""
        return _get_in_out_features(self.get_base_layer())

    def placed(self) -> nn.Module:
        """Return the module whose device and dtype are the base's."""
        return self.get_base_layer()

    @property
    def experts(self) -> Any:  # an nn.ModuleDict, whose type cannot say of what
        """The experts of each adapter by name."""
        return getattr(self, f"{self.mixture.name}_experts")

    def update_layer(self, adapter_name: str, config: MixtureConfig) -> None:
        """Add an adapter, unless the configuration has none for this layer."""
        device, dtype = place_of(self)
        own = config.for_layer(self.smolora_key)
        if own is None:
            return
        experts_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.experts[adapter_name] = self.new_experts(own, device, experts_dtype)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def new_experts(self, config: MixtureConfig, device: torch.device | None, dtype: torch.dtype) -> MixtureExperts:
        """Make the experts of an adapter."""
        return self.mixture.experts(*self.sizes(), config, device=device, dtype=dtype)

    def active_in_layer(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.experts]

    def decision(self, routing: RoutingInputs, name: str) -> tuple[Mixed, Tensor | None] | None:
        """Return what an adapter decided, and the boundaries of packed rows; None if it did not run."""
        return getattr(routing.decisions, self._label(name), None)

    def record_decision(self, routing: RoutingInputs, name: str, decision: tuple[Mixed, Tensor | None]) -> None:
        """Record what an adapter decided."""
        if torch.compiler.is_compiling():
            routing.compiled = True
        setattr(routing.decisions, self._label(name), decision)

    def forget_decisions(self, routing: RoutingInputs) -> None:
        """Drop what the layer's adapters decided."""
        for name in self.experts:
            vars(routing.decisions).pop(self._label(name), None)

    def _label(self, name: str) -> str:
        """Return the attribute for an adapter of this layer; torch.compile accepts no dot in it."""
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
        """Freeze again what the configuration gives no gradient, after PEFT has unfrozen the whole adapter."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.experts:
                self.experts[name].freeze()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move to the base's device, but not to its dtype: that would round float32 weights that were just loaded."""
        if device is None:
            device, _ = place_of(self)
        if adapter_name not in self.experts or device is None:
            return
        experts = self.experts[adapter_name]
        if not any(parameter.is_meta for parameter in experts.parameters()):
            experts.to(device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge.

        Raises:
            ValueError: always, with the reason.
        """
        raise ValueError(self.mixture.no_merge)

    def unmerge(self) -> None:
        """Do nothing: nothing is ever merged."""


def place_of(layer: MixtureLayer) -> tuple[torch.device | None, torch.dtype | None]:
    """Return device and dtype for a layer's adapter: the base's, or the device that an offloaded base runs on."""
    base = layer.placed()
    device, dtype = layer._get_base_layer_device_and_dtype(base)
    hook = getattr(base, "_hf_hook", None)
    if device is not None and device.type == "meta" and hook is not None:
        devices = (getattr(h, "execution_device", None) for h in getattr(hook, "hooks", (hook,)))
        device = torch.device(next((d for d in devices if d is not None), "cpu"))
    return device, dtype
