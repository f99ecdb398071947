"""The adapter layer that PEFT puts in a linear layer's place."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from ..config import SMoLoRAConfig
from ..layer import Decision, SMoLoRAExperts
from .call import Call
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
        device, dtype = place_of(self)
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

    def decided(self, call: Call, name: str) -> tuple[Tensor | None, ...] | None:
        """What an adapter decided in a call: routes, gates, logits, lead, boundaries; None if it did not run."""
        return getattr(call.routed, self._label(name), None)

    def decide(self, call: Call, name: str, last: tuple[Tensor | None, ...]) -> None:
        """Keep what an adapter decided in a call."""
        setattr(call.routed, self._label(name), last)

    def forget(self, call: Call) -> None:
        """Drop what was decided in a call."""
        for name in self.smolora_experts:
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
            if name in self.smolora_experts:
                self.smolora_experts[name].freeze()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the base's device. Not to its dtype, which would round float32 weights that were just loaded."""
        if device is None:
            device, _ = place_of(self)
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
        if self.disable_adapters or not self.active_in_layer():
            return self.base_layer(x, *args, **kwargs)
        try:
            return self._adapted(x)
        except (ValueError, TypeError, RuntimeError) as error:
            name_layer(error, self.smolora_key)
            raise

    def _adapted(self, x: Tensor) -> Tensor:
        call, names = self.smolora_context.current(), self.active_in_layer()
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
        experts, decision = self.smolora_experts[name], Decision()
        arguments = call.arguments(rows, bounds, experts.config, (self.smolora_key, name), self.takes_images)
        y = experts(rows, base=base, decision=decision, **arguments)
        self.decide(call, name, (*decision.last, bounds))
        return y

    def __repr__(self) -> str:
        return "smolora." + super().__repr__()


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
