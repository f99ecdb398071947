"""MoELoRA (Chen et al., CoIN, NeurIPS 2024) as a PEFT method: experts of low rank, mixed for each token.

The same three passes as SMoLoRA's, in plain torch under autograd, since only the mix differs (there is no Triton for
it): shrink brings x into rank space with all experts' A and the router in one product, mix is the softmax in rank
space, expand is one product with all experts' B. Nothing of the output's size is made for an expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import register_peft_method, resolve_quantization_backend
from torch import Tensor, nn
from torch.nn.functional import linear

from ..config import register_peft_type
from .layer import name_layer, place_of
from .model import LinearTuner

MOELORA = register_peft_type("MOELORA")
NO_MERGE = "MoELoRA cannot be merged into the base: the experts' weights depend on the token"


@dataclass
class MoELoRAConfig(PeftConfig):
    """Configuration of MoELoRA.

    Args:
        r: rank of each expert.
        lora_alpha: the adapter's output is scaled by `lora_alpha / r`.
        lora_dropout: dropout on the adapter's input; the router sees all of it.
        num_experts: number of experts.
        target_modules: names of the linear layers to adapt, or a regular expression.
        exclude_modules: names to leave out, or a regular expression.
        modules_to_save: further modules to train and save.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    r: int = field(default=16, metadata={"help": "rank of each expert"})
    lora_alpha: float = field(default=32, metadata={"help": "the adapter's output is scaled by lora_alpha / r"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout on the adapter's input"})
    num_experts: int = field(default=8, metadata={"help": "number of experts"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "linear layers to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "linear layers to leave out"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "further modules to train and save"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MOELORA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        for name in ("r", "num_experts"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout!r}")
        if not math.isfinite(self.lora_alpha) or self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be a positive finite number, got {self.lora_alpha!r}")


class MoELoRAExperts(nn.Module):
    """The parameters of one layer, and what they add to its output.

    Args:
        in_features, out_features: d and k of the layer.
        config: of the adapter.
        device, dtype: of the parameters: `A` (E, r, d), `B` (E, k, r), `router` (E, d).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: MoELoRAConfig,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        E, r = config.num_experts, config.r
        self.scaling = config.lora_alpha / r
        self.dropout = nn.Dropout(config.lora_dropout)
        for name, shape in (("A", (E, r, in_features)), ("B", (E, out_features, r)), ("router", (E, in_features))):
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        bound = in_features**-0.5  # LoRA's and nn.Linear's own: uniform in +-1 / sqrt(inputs)
        nn.init.uniform_(self.A, -bound, bound)
        nn.init.zeros_(self.B)
        nn.init.uniform_(self.router, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> s sum over experts of softmax(router x)_e B_e A_e x, (..., k)."""
        A, B, router = (p.to(x.dtype) for p in (self.A, self.B, self.router))
        if self.training and self.dropout.p:
            h, z = linear(self.dropout(x), A.flatten(0, 1)), linear(x, router)
        else:
            h, z = linear(x, torch.cat([A.flatten(0, 1), router])).split([A.shape[0] * A.shape[1], A.shape[0]], -1)
        gates = torch.softmax(z, -1, dtype=torch.promote_types(z.dtype, torch.float32)).to(h.dtype) * self.scaling
        mixed = h.unflatten(-1, A.shape[:2]) * gates[..., None]
        return linear(mixed.flatten(-2), B.transpose(0, 1).flatten(1))


class MoELoRALinear(nn.Module, BaseTunerLayer):
    """A linear layer of a model with MoELoRA adapters."""

    adapter_layer_names = ("moelora_experts",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MoELoRAConfig, *, key: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.moelora_key = key
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.moelora_experts = nn.ModuleDict()
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: MoELoRAConfig) -> None:
        """Add an adapter."""
        device, dtype = place_of(self)
        self.moelora_experts[adapter_name] = MoELoRAExperts(
            self.in_features, self.out_features, config, device=device,
            dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        )  # fmt: skip
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output (..., k) plus that of each active adapter."""
        try:
            y = self.base_layer(x, *args, **kwargs)
            for name in () if self.disable_adapters else self.active_adapters:
                if name in self.moelora_experts:
                    y = y + self.moelora_experts[name](x).to(y.dtype)
            return y
        except (ValueError, TypeError, RuntimeError) as error:
            name_layer(error, self.moelora_key)
            raise

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused.

        Raises:
            ValueError: always, with the reason.
        """
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        """Nothing to undo: nothing is ever merged."""

    def __repr__(self) -> str:
        return "moelora." + super().__repr__()


class MoELoRAModel(LinearTuner):
    """A model with MoELoRA adapters; `peft.get_peft_model` makes it."""

    prefix = "moelora_"
    tuner_layer_cls = MoELoRALinear
    no_merge = NO_MERGE

    def new_layer(self, target: nn.Module, adapter_name: str, config: MoELoRAConfig, key: str) -> MoELoRALinear:
        return MoELoRALinear(target, adapter_name, config, key=key)


if MOELORA not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name="moelora", config_cls=MoELoRAConfig, model_cls=MoELoRAModel)
