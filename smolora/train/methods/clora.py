"""C-LoRA of Continual Diffusion (arXiv:2304.06027): a LoRA for each task on top of the earlier ones' frozen sum."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ...recipe import Recipe
from ...recipe.schema import SECTION, Number
from .adapter import NEW_PARAMETERS, baseline_rank
from .lora import LoRA, lora_layers
from .stage import StageWork

ADAPTER = "default"  # PEFT's name of the adapter that a stage trains
CHUNK = 2**22  # elements of a weight that the penalty forms at a time


@dataclass(frozen=True, config=SECTION)
class CLoRAOptions:
    """Options of C-LoRA.

    Args:
        weight: lambda, the weight of the penalty. The default is the best of a sweep on MiniCVIT. The paper's values do
            not transfer, since they depend on the size of the weights, and on whether the penalty is a sum or a mean.
    """

    weight: Annotated[Number, Field(ge=0)] = 100.0


class CLoRA(LoRA):
    """C-LoRA: W_t = W_0 + P + D, with P = sum of s B A of earlier tasks, frozen, and D = s B A new in each stage.

    The loss gets lambda * sum over layers of |P o D|_F^2: where earlier tasks changed a weight, a new change costs.
    Stages train without dropout on P, which is a part of the weight. What a stage saves is one LoRA for PEFT, whose
    rank is the sum of those so far.
    """

    name = "clora"
    only_sequential = True
    refused_add_ons = NEW_PARAMETERS
    options_class = CLoRAOptions
    options: CLoRAOptions

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._past: list[Past] = []  # of each layer, in the model's order
        self._penalty: Tensor | None = None  # of the last step

    def start(self, base: nn.Module, previous: Path | None) -> nn.Module:
        model: Any = super().start(base, previous)
        self._past, self._penalty = [], None
        if previous is not None:
            self._past = [Past(layer) for layer in lora_layers(model)]
            rank, alpha = baseline_rank(self.recipe)
            for layer in lora_layers(model):
                A, B = _factors(layer)
                _set_factors(layer, A.new_empty(rank, A.shape[1]), B.new_empty(B.shape[0], rank), alpha)
                layer.reset_lora_parameters(ADAPTER, True)
            _set_config(model, rank, alpha)
        return model

    def memory(self, model: nn.Module) -> int:
        """P of the last stage."""
        stages_before = self.recipe.num_task_ids - 1
        return sum(stages_before * 4 * factor.numel() for layer in lora_layers(model) for factor in _factors(layer))

    @torch.no_grad()
    def step_term(self, model: nn.Module, scale: float) -> None:
        """Add the gradient of the penalty."""
        weight = self.options.weight
        if not self._past or not weight:
            return
        values = []
        for past, layer in zip(self._past, lora_layers(model), strict=True):
            value, *gradients = penalty(past.A, past.B, *_factors(layer), past.scaling)
            values.append(value)
            for factor, gradient in zip(_factors(layer), gradients, strict=True):
                gradient *= scale * weight
                factor.grad = gradient if factor.grad is None else factor.grad.add_(gradient)
        self._penalty = weight * torch.stack(values).sum()

    def figures(self) -> dict[str, float]:
        """The penalty, as it counts in the loss."""
        return {} if self._penalty is None else {"penalty": float(self._penalty)}

    @torch.no_grad()
    def after_stage(self, model: Any, work: StageWork, folder: Path) -> None:
        """Join the earlier tasks' factors and the new ones to one LoRA."""
        if not self._past:
            return
        for past, layer in zip(self._past, lora_layers(model), strict=True):
            past.remove()
            A, B = _factors(layer)
            alpha = layer.scaling[ADAPTER] * (past.A.shape[0] + A.shape[0])
            _set_factors(layer, torch.cat([past.A, A]), torch.cat([past.B, B], 1), alpha)
        _set_config(model, layer.r[ADAPTER], alpha)
        self._past = []


class Past:
    """P = s B A of a layer, which is added to the base's output and does not train.

    Args:
        layer: its LoRA so far, of rank R.
    """

    def __init__(self, layer: LoraLayer) -> None:
        self.A, self.B = (factor.detach() for factor in _factors(layer))  # (R, d), (k, R)
        self.scaling = layer.scaling[ADAPTER]
        self._handle = layer.get_base_layer().register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        low_rank = nn.functional.linear(args[0].to(self.A.dtype), self.A)
        return output + (nn.functional.linear(low_rank, self.B) * self.scaling).to(output.dtype)

    def remove(self) -> None:
        """Take P away from the base's output."""
        self._handle.remove()


class Penalty(NamedTuple):
    """|P o D|_F^2 of a layer, and its gradients."""

    value: Tensor
    A: Tensor  # (r, d)
    B: Tensor  # (k, r)


def penalty(past_A: Tensor, past_B: Tensor, A: Tensor, B: Tensor, scaling: float) -> Penalty:
    """Return |P o D|_F^2 with P = s past_B past_A and D = s B A, and its gradients for A and B.

    With G = 2 P^2 o D these are s B^T G and s G A^T. Some rows of P, D and G exist at a time, in float32 or more.

    Args:
        past_A, past_B: (R, d) and (k, R).
        A, B: (r, d) and (k, r).
        scaling: s.
    """
    past_A, past_B, A, B = (
        factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in (past_A, past_B, A, B)
    )
    value, dA, dB = A.new_zeros((), dtype=torch.float64), torch.zeros_like(A), torch.empty_like(B)
    step = max(CHUNK // A.shape[1], 1)
    for first in range(0, B.shape[0], step):
        rows = slice(first, first + step)
        P = scaling * (past_B[rows] @ past_A)
        PD = P * (scaling * (B[rows] @ A))
        value += PD.square().sum()
        G = 2 * P * PD
        dB[rows] = scaling * (G @ A.mT)
        dA += scaling * (B[rows].mT @ G)
    return Penalty(value, dA, dB)


def _factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r, d) and B (k, r) of a layer."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def _set_factors(layer: Any, A: Tensor, B: Tensor, alpha: float) -> None:
    """Give a layer other factors, of another rank r."""
    down, up, rank = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], A.shape[0]
    down.weight, up.weight = nn.Parameter(A), nn.Parameter(B)
    down.out_features = up.in_features = layer.r[ADAPTER] = rank
    layer.lora_alpha[ADAPTER], layer.scaling[ADAPTER] = alpha, alpha / rank


def _set_config(model: Any, rank: int, alpha: float) -> None:
    """Give the configuration, which is saved, another rank."""
    config = model.peft_config[ADAPTER]
    config.r, config.lora_alpha = rank, alpha
