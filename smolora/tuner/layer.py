"""The adapter layer that PEFT puts in a linear layer's place."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from ..config import SMoLoRAConfig
from ..methods.smolora import SMoLoRAExperts
from .context import RoutingContext
from .together import decoded_together

NO_MERGE = (
    "SMoLoRA cannot be merged into the base: which experts a sample uses, and their shares alpha and beta, depend on "
    "the sample and the token, so no single weight equals base and adapter; keep the adapter, or unload() it"
)


class SMoLoRALayer(BaseTunerLayer):
    """What PEFT sees of an adapted layer: `smolora_experts`, one `SMoLoRAExperts` for each adapter by name."""

    adapter_layer_names = ("smolora_experts",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, context: RoutingContext, key: str, takes_images: bool) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.smolora_experts = nn.ModuleDict()
        self.smolora_context = context
        self.smolora_key = key
        self.takes_images = takes_images
        self.merged_adapters = []

    def update_layer(self, adapter_name: str, config: SMoLoRAConfig) -> None:
        """Add an adapter."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        experts = SMoLoRAExperts(
            self.in_features, self.out_features, config, device=device,
            dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        )  # fmt: skip
        experts.keep_alpha = True
        self.smolora_experts[adapter_name] = experts
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def active_in_layer(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.smolora_experts]

    def forget_routing(self) -> None:
        """Drop what the last forward decided."""
        for experts in self.smolora_experts.values():
            experts.forget_routing()

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
            if name in self.smolora_experts:
                self.smolora_experts[name].freeze()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the base's device. Not to its dtype, which would round float32 weights that were just loaded."""
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if adapter_name not in self.smolora_experts or device is None:
            return
        experts = self.smolora_experts[adapter_name]
        if not experts.vu_A.is_meta:
            experts.to(device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused.

        Raises:
            ValueError: always, with the reason.
        """
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        """Nothing to undo: nothing is ever merged."""


class SMoLoRALinear(nn.Module, SMoLoRALayer):
    """A linear layer of a model, possibly quantised, with SMoLoRA adapters."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SMoLoRAConfig,
        *,
        context: RoutingContext,
        key: str,
        takes_images: bool,
    ) -> None:
        super().__init__()
        SMoLoRALayer.__init__(self, base_layer, context, key, takes_images)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output plus that of each active adapter.

        Args:
            x: (B, S, d), or (images, patches, d) in an image branch.
        """
        names = [] if self.disable_adapters else self.active_in_layer()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        if len(names) == 1 and (y := decoded_together(self, names[0], x)) is not None:
            return y
        y = self.adapter_output(x, names[0], self.base_layer)
        for name in names[1:]:
            y = y + self.adapter_output(x, name)
        return y

    def adapter_output(self, x: Tensor, name: str, base: nn.Module | None = None) -> Tensor:
        """One adapter's output, with the base's if `base` is given."""
        return self.smolora_experts[name](x, base=base, **self.arguments(x, name))

    def arguments(self, x: Tensor, name: str) -> dict[str, Any]:
        """What the forward of an adapter's experts takes besides x and the base."""
        call, config = self.smolora_context.current(), self.smolora_experts[name].config
        return call.arguments(x, config, (self.smolora_key, name), self.takes_images)

    def __repr__(self) -> str:
        return "smolora." + super().__repr__()
