"""DoRA (arXiv:2402.09353): LoRA, and a trained length for each row of the weight."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .lora import LoRA, lora_layers


class DoRA(LoRA):
    """PEFT's DoRA: y = (m / n) (W x + s B A x) + b, where n are the lengths of the rows of W + s B A.

    m starts as the lengths of the rows of W. It is trained, without weight decay, and later stages go on with it as
    with A and B. n gets no gradient (section 4.3 of the paper).
    """

    name = "dora"
    variant = {"use_dora": True}  # noqa: RUF012
    undecayed = ("lora_magnitude_vector",)

    def start(self, base: nn.Module, previous: Path | None) -> nn.Module:
        model = super().start(base, previous)
        if previous is None:
            _start_from_the_rows_of_W(model)
        return model

    def memory(self, model: nn.Module) -> int:
        """In 16 bits, a copy of each adapted weight, which the second product of dropout keeps for the backward."""
        training, dropout = self.recipe.training, self.recipe.adapter_config().lora_dropout
        if not dropout or training.activation_checkpointing or self.recipe.model.dtype == "float32":
            return 0
        return sum(2 * layer.get_base_layer().weight.numel() for layer in lora_layers(model))


@torch.no_grad()
def _start_from_the_rows_of_W(model: nn.Module) -> None:
    """Set m to n as a forward computes it, in float32, so that a new adapter changes no bit.

    PEFT makes m in the base's data type. In 16 bits m / n would differ from 1 by rounding.
    """
    for layer in lora_layers(model):
        weight = layer.get_base_layer().weight
        for magnitude in layer.lora_magnitude_vector.values():
            m = magnitude.weight
            m.copy_(torch.linalg.norm(weight.to(m.dtype), dim=1))
