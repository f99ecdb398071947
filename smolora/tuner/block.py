"""What PEFT puts in the place of a feed-forward block or a projector, and the losses that blocks keep."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..config import MixtureConfig
from ..methods.base import Mixture, MixtureExperts
from ..methods.eproj import EprojExperts, projector_linears
from ..methods.moecl import MoECLExperts, block_sizes
from .layer import MixtureLayer
from .linear import MixtureLinear


class MixtureBlock(MixtureLinear):
    """A feed-forward block of a model, whose layers may be quantised, with adapters of one method.

    As `MixtureLinear`, but that only one adapter can be active: the block is not linear, so outputs of several do not
    add up.
    """

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        self.out_features = self.in_features  # d of the block; `sizes` has the intermediate size, for the experts

    @classmethod
    def check_target(cls, base: nn.Module, key: str) -> None:
        try:
            block_sizes(base)
        except TypeError as error:
            raise TypeError(f"target_modules must name feed-forward blocks, but {key}: {error}") from error

    def sizes(self) -> tuple[int, int]:
        return block_sizes(super().placed())

    def placed(self) -> nn.Module:
        gate: Any = super().placed().get_submodule("gate_proj")
        return gate.get_base_layer() if isinstance(gate, BaseTunerLayer) else gate

    def _adapted(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self.active_in_layer()
        if len(names) > 1:
            raise ValueError(
                f"one {self.mixture.title} adapter can be active at a time, since outputs of several do not add up, "
                f"got {names}"
            )
        return super()._adapted(x, *args, **kwargs)


class MixtureProjector(MixtureBlock):
    """A projector of a model, with one for each task. As for `MixtureBlock`, only one adapter can be active."""

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        _, self.out_features = self.sizes()

    @classmethod
    def check_target(cls, base: nn.Module, key: str) -> None:
        try:
            projector_linears(base)
        except TypeError as error:
            raise TypeError(f"target_modules must name projectors, but {key}: {error}") from error

    def sizes(self) -> tuple[int, int]:
        linears = projector_linears(MixtureLayer.placed(self))
        return linears[0].in_features, linears[-1].out_features

    def placed(self) -> nn.Module:
        return projector_linears(MixtureLayer.placed(self))[0]

    def new_experts(self, config: MixtureConfig, device: torch.device | None, dtype: torch.dtype) -> MixtureExperts:
        return EprojExperts(MixtureLayer.placed(self), config, device=device, dtype=dtype)


def layer_class(mixture: Mixture) -> type[MixtureLinear]:
    """Make the adapter layer of a method, such as `SMoLoRALinear`."""
    kind, what = {
        "linear": (MixtureLinear, "A linear layer of a model, possibly quantised,"),
        "block": (MixtureBlock, "A feed-forward block of a model"),
        "projector": (MixtureProjector, "A projector of a model"),
    }[mixture.target]
    attributes = {
        "__doc__": f"{what} with {mixture.title} adapters.",
        "mixture": mixture,
        "adapter_layer_names": (f"{mixture.name}_experts",),
    }
    return type(f"{mixture.title}{kind.__name__.removeprefix('Mixture')}", (kind,), attributes)


def discriminator_loss(model: nn.Module) -> Tensor:
    """Return w times the mean loss of MoE-CL's discriminators in the last forward in training mode, once.

    It is added to a training loss: discriminators then lower it, and what is upstream of them gets the gradient
    reversed (see `MoECLExperts.discriminator_loss`).

    Args:
        model: with an active MoE-CL adapter whose `discriminator_weight` is not 0.

    Raises:
        ValueError: it has none.
        RuntimeError: there was no forward in training mode since the last call.
    """
    experts: list[MoECLExperts] = [
        layer.experts[name]
        for layer in model.modules()
        if isinstance(layer, MixtureLayer) and layer.mixture.name == "moecl" and not layer.disable_adapters
        for name in layer.active_in_layer()
    ]
    losses = [e.config.discriminator_weight * e.discriminator_loss() for e in experts if e.config.discriminator_weight]
    if not losses:
        raise ValueError(
            f"model must have an active MoE-CL adapter with discriminators, {type(model).__name__} has none"
        )
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
