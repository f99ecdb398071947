"""DoRA (arXiv:2402.09353): LoRA, and a trained length for each row of the weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from .lora import LoRA


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


@torch.no_grad()
def _start_from_the_rows_of_W(model: nn.Module) -> None:
    """Set m to n as a forward computes it, in float32, so that a new adapter changes no bit.

    PEFT makes m in the base's data type. In 16 bits m / n would differ from 1 by rounding.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            weight: Any = layer.get_base_layer().weight
            for magnitude in layer.lora_magnitude_vector.values():
                m: Any = magnitude.weight
                m.copy_(torch.linalg.norm(weight.to(m.dtype), dim=1))
