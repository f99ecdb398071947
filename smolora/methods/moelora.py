"""MoELoRA of CoIN (Chen et al., NeurIPS 2024): every token mixes all experts by a softmax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..arguments import check_int
from ..config import MixtureConfig
from ..spec import Bank, Mixed
from .base import Decision, DropIn, Mixture, MixtureExperts, Prepared
from .released import load_released


@dataclass
class MoELoRAConfig(MixtureConfig, method="moelora"):
    """Configuration of MoELoRA.

    CoIN's released code gives r and alpha for all experts together: its r of 128 with 8 experts is an `r` of 16 here,
    and its alpha of 256 a `lora_alpha` of 32.

    Args:
        num_experts: number of experts.
        r, lora_alpha, lora_dropout, target_modules, exclude_modules, modules_to_save: as in `MixtureConfig`. The
            router sees x without dropout.
    """

    num_experts: int = field(default=8, metadata={"help": "number of experts"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("num_experts", self.num_experts)


class MoELoRAExperts(MixtureExperts):
    """One MoELoRA adapter on one linear layer: y = W x + b + s sum_e softmax(R x)_e B_e A_e x.

    Parameters (E experts):
        A (E, r, d) ~ N(0, 0.01^2), B (E, k, r) = 0, router (E, d) as `nn.Linear`.
    """

    config: MoELoRAConfig
    config_class = MoELoRAConfig
    A: Tensor
    B: Tensor
    router: Tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        E, r, d, k = self.config.num_experts, self.config.r, self.in_features, self.out_features
        return {"A": (E, r, d), "B": (E, k, r), "router": (E, d)}

    def prepare(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Prepared:
        """Check a call and translate it for the engine.

        Args:
            x: (B, S, d), or packed (T, d) or (1, T, d) with `cu_seqlens`.
            cu_seqlens: int32 (n + 1,), boundaries of packed sequences.

        Raises:
            TypeError, ValueError: see `MixtureExperts.prepare`.
        """
        how = {"mix": "softmax", "token_router": self.router}
        return Prepared(self.batch(x, cu_seqlens), [Bank(self.A, self.B)], how)

    def finish(self, x: Tensor, mixed: Mixed, decision: Decision | None = None) -> Tensor:
        # scores have T x E numbers, which no caller reads
        return super().finish(x, mixed._replace(scores=None), decision)

    def facts(self) -> dict[str, Any]:
        return {"experts": self.config.num_experts}


class FusedMoELoRA(DropIn, MoELoRAExperts):
    """A linear layer with a MoELoRA adapter, a drop-in for the `nn.Linear` it wraps."""

    def _released(self) -> dict[str, Tensor]:
        """Return the parameters under their released names, expert by expert."""
        names = {"lora_router": self.router}
        for letter in "AB":
            names |= {f"lora_{letter}.{i}": expert for i, expert in enumerate(self.get_parameter(letter).unbind(0))}
        return names

    def load_official_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a layer of CoIN's code: its live state dict, or the keys under one layer of a saved adapter.

        Args:
            state_dict: `lora_A.default.loraA.0.weight` and the like; the adapter's name may be missing, and the second
                name of an expert (`...loraA.0.mlp.weight`) is the same tensor again. The linear layer's own
                keys (`weight`, `bias`), if present, are loaded into the base.

        Raises:
            KeyError, ValueError: see `released.load_released`.
        """
        load_released(self._released(), dict(self.base_layer.named_parameters()), state_dict)

    def official_state_dict(self, adapter: str = "default") -> dict[str, Tensor]:
        """Return the adapter as CoIN's code names it, each expert under both of its names.

        Args:
            adapter: the adapter's name in the keys.
        """
        state = {}
        for name, tensor in self._released().items():
            kind, _, expert = name.partition(".")
            if not expert:
                state[f"{kind}.{adapter}.weight"] = tensor.detach().clone()
                continue
            for suffix in ("weight", "mlp.weight"):
                state[f"{kind}.{adapter}.lora{kind[-1]}.{expert}.{suffix}"] = tensor.detach().clone()
        return state


MOELORA = Mixture(
    "moelora",
    MoELoRAConfig,
    MoELoRAExperts,
    FusedMoELoRA,
    "MoELoRA cannot be merged into the base: the experts' weights depend on the token",
)
