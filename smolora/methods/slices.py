"""Parameters whose slices train one by one: experts, of which some are frozen, or routers and pairs of tasks.

A gradient of zero does not keep a slice, because weight decay and momentum still move it. These parameters keep every
slice (along dimension 0) whose gradient is exactly zero, bit for bit, under any `torch.optim.Optimizer`.
"""

from __future__ import annotations

from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .checks import check_tensor


class SlicedParameter(nn.Parameter):
    """A parameter that an optimiser changes only in the slices with a nonzero gradient."""


def slices_with_gradient(parameter: Tensor) -> Tensor:
    """Return which slices of a parameter have a nonzero gradient, bool (slices, 1, ...) in its number of dimensions."""
    assert parameter.grad is not None
    # four times as fast on a CPU as any(); a NaN is the largest, and not 0
    moves = parameter.grad.reshape(parameter.shape[0], -1).abs().amax(1) != 0
    return moves.view(-1, *(1,) * (parameter.dim() - 1))


_before: WeakKeyDictionary[torch.optim.Optimizer, list[tuple[Tensor, Tensor, Tensor]]] = WeakKeyDictionary()


@torch.no_grad()
def _remember(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Save the values before an optimiser's step, and which slices have a gradient, or the numbers of those without."""
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(parameter, SlicedParameter) and parameter.grad is not None and parameter.numel():
                moves, value = slices_with_gradient(parameter), parameter.detach()
                if value.device.type == "cpu":  # reading the mask waits for no device: save what stays, and no more
                    stays = (~moves).flatten().nonzero()[:, 0]
                    kept.append((parameter, stays, value.index_select(0, stays)))
                else:
                    kept.append((parameter, moves, value.clone()))
    _before[optimizer] = kept


@torch.no_grad()
def _restore(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Restore the slices without a gradient after the step."""
    for parameter, slices, value in _before.pop(optimizer, ()):
        if slices.dtype == torch.bool:
            parameter.copy_(torch.where(slices, parameter, value))
        else:
            parameter.index_copy_(0, slices, value)


register_optimizer_step_pre_hook(_remember)
register_optimizer_step_post_hook(_restore)


class FreezesExperts(nn.Module):
    """Mixin of mixtures whose experts can be frozen one by one, for good.

    Which ones are is a buffer, bool (E,), saved with the state.
    """

    mask_name: ClassVar[str]  # of the buffer

    def _add_mask(self, num_experts: int, device: torch.device | None) -> None:
        self.register_buffer(self.mask_name, torch.zeros(num_experts, dtype=torch.bool, device=device))

    def _freeze(self, frozen: Tensor) -> None:
        """Freeze experts; those that are frozen already stay frozen.

        Raises:
            TypeError, ValueError: `frozen` is no mask of the experts.
        """
        mask: Tensor = getattr(self, self.mask_name)
        check_tensor("frozen", frozen, mask.device)
        if frozen is None or frozen.dtype != torch.bool or frozen.shape != mask.shape:
            got = None if frozen is None else f"{frozen.dtype} of {tuple(frozen.shape)}"
            raise ValueError(f"frozen must be bool of shape {tuple(mask.shape)}, got {got}")
        mask |= frozen
        self.__dict__.pop("_frozen_known", None)

    def _trained(self) -> Tensor | None:
        """Return the experts that are not frozen, bool (E,); None if none is.

        Whether any is frozen is cached, since reading it syncs on a GPU.
        """
        mask: Tensor = getattr(self, self.mask_name)
        if "_frozen_known" not in self.__dict__:
            self.__dict__["_frozen_known"] = bool(mask.any())
        return ~mask if self.__dict__["_frozen_known"] else None

    def _num_trained_experts(self) -> int:
        mask: Tensor = getattr(self, self.mask_name)
        return mask.shape[0] if mask.is_meta else int((~mask).sum())  # a mask without values freezes nothing

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.__dict__.pop("_frozen_known", None)
