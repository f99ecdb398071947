"""Eproj (arXiv:2311.16206): a copy of the projector for each task, beside a frozen language model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config import MixtureConfig, TaskConfig
from ..spec import Mixed
from .base import Decision, Mixture, MixtureExperts, compute_dtype
from .checks import check_task, check_x
from .selector import TaskSelector


@dataclass
class EprojConfig(TaskConfig, method="eproj"):
    """Configuration of Eproj.

    Args:
        num_tasks: number of tasks.
        instruction_dim, image_dim, keys: of the `TaskSelector`, as in `TaskConfig`.
        target_modules, exclude_modules, modules_to_save: as in `MixtureConfig`, but that `target_modules` name
            projectors.
        r, lora_alpha, lora_dropout: must be left out.

    Raises:
        ValueError: an argument is not as above.
    """

    takes: ClassVar[tuple[str, ...]] = ("task",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "lora_alpha", "lora_dropout"):
            if getattr(self, name) != getattr(MixtureConfig, name):
                raise ValueError(
                    f"{name} must be left out: a task of Eproj has a whole projector, got {getattr(self, name)!r}"
                )


def projector_linears(projector: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of a projector, in its order.

    Raises:
        TypeError: it has none, or is one itself.
    """
    linears = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    if not linears or linears[0] is projector:
        raise TypeError(f"a projector must be a module with linear layers in it, got {type(projector).__name__}")
    return linears


class EprojExperts(MixtureExperts):
    """A projector for each task: y = f_t(x), t the task of the image.

    Each starts as a copy of the base's projector, in float32, or in float64 over a float64 one. The base's own stays as
    it is.

    Args:
        projector: the base's, whose linear layers map (..., d) to (..., k).
        config: the adapter's configuration.
        device, dtype: of the copies.

    Attributes:
        projectors: f_t of each task t.

    Raises:
        TypeError: `projector` has no linear layers.
    """

    config: EprojConfig
    config_class = EprojConfig

    def __init__(
        self,
        projector: nn.Module,
        config: EprojConfig,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        linears = projector_linears(projector)
        super().__init__(linears[0].in_features, linears[-1].out_features, config, device=device, dtype=dtype)
        copies = (copy.deepcopy(projector).to(device, dtype) for _ in range(config.num_tasks))
        self.projectors = nn.ModuleList(copies)
        self.freeze()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return none: all parameters are the projectors'."""
        return {}

    def freeze(self) -> None:
        """Let all projectors train."""
        for projector in getattr(self, "projectors", ()):
            projector.requires_grad_(True)

    def forward(  # type: ignore[override]  # whole projectors are no low-rank experts, which the base class calls
        self,
        x: Tensor,
        task: int | Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        base: nn.Module | None = None,
        decision: Decision | None = None,
    ) -> Tensor:
        """Return the projected images.

        Images of one task go through its projector together. Which tasks there are is read from `task`, which waits for
        a GPU.

        Args:
            x: (images, patches, d).
            task: an int for all images, or int (images,).
            cu_seqlens: must be left out: packed images are not taken.
            base: the base's projector, which is not used.
            decision: takes what is decided, for callers that may run several forwards at a time.

        Returns:
            y (images, patches, k), computed in the autocast dtype, else in x's.

        Raises:
            TypeError, ValueError: an argument does not fit.
        """
        if cu_seqlens is not None:
            raise ValueError("x must be (images, patches, d): a projector for each task takes no images in one row")
        device = next(self.parameters()).device
        images = check_x(x, self.in_features, None, device)
        task = check_task(task, images, self.config.num_tasks, device)
        if isinstance(task, int):
            task = torch.full((images,), task, device=device)
        present = task.unique().tolist()
        if len(present) == 1:
            y = self._project(present[0], x)
        else:
            y = x.new_zeros((*x.shape[:-1], self.out_features), dtype=compute_dtype(x))
            for each in present:
                rows = (task == each).nonzero().flatten()
                y = y.index_copy(0, rows, self._project(each, x.index_select(0, rows)))
        return self.finish(x, Mixed(y, task.int().view(-1, 1, 1), None, None, None), decision)

    def _project(self, task: int, x: Tensor) -> Tensor:
        """Return f_t(x), with products in the dtype that the base's projector computes in."""
        dtype = compute_dtype(x)
        own = next(self.projectors[task].parameters()).dtype
        with torch.autocast(x.device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            return self.projectors[task](x.to(own if dtype.itemsize > 2 else dtype)).to(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tasks={self.config.num_tasks}"


class FusedEproj(EprojExperts):
    """A projector with a copy of it for each task, a drop-in for the module that it wraps.

    Args:
        projector: the module; its parameters are frozen.
        config: the adapter's configuration.

    Attributes:
        base_layer: `projector`.

    Raises:
        TypeError: `projector` has no linear layers, or `config` is no `EprojConfig`.
    """

    def __init__(self, projector: nn.Module, config: EprojConfig) -> None:
        if not isinstance(config, EprojConfig):
            raise TypeError(f"config must be an EprojConfig, got {type(config).__name__}")
        weight = projector_linears(projector)[0].weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        super().__init__(projector, config, device=weight.device, dtype=dtype)
        self.base_layer = projector.requires_grad_(False)


EPROJ = Mixture(
    "eproj",
    EprojConfig,
    EprojExperts,
    FusedEproj,
    "Eproj cannot be merged into the base: the projector depends on the task",
    target="projector",
    selector=TaskSelector.of_adapter,
)
