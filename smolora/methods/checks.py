"""Checks of a layer's arguments: every error names the argument, its value and what was expected."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..engine.ops import CHECK_ENVIRONMENT


def reads_values(tensor: Tensor) -> bool:
    """Return whether a tensor's values may be read: it is on the CPU, or SMOLORA_CHECK=1 accepts the sync."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get(CHECK_ENVIRONMENT) == "1"


def check_tensor(name: str, value: Tensor | None, device: torch.device) -> None:
    """Check that an argument, if given, is a tensor on the device of x.

    Raises:
        TypeError, ValueError: it is not.
    """
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.device != device:
        raise ValueError(f"{name} must be on x's device {device}, got {value.device}")


def check_x(x: Tensor, in_features: int, cu_seqlens: Tensor | None, device: torch.device) -> int:
    """Check x (B, S, d), or packed (T, d) or (1, T, d); return the number of sequences.

    Raises:
        TypeError, ValueError: x or `cu_seqlens` does not fit.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating point tensor, got {got}")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must have {in_features} inputs in its last dimension, got shape {tuple(x.shape)}")
    check_tensor("cu_seqlens", cu_seqlens, x.device)
    if device != x.device:
        raise ValueError(f"the layer's parameters must be on x's device {x.device}, got {device}")
    if cu_seqlens is None:
        if x.dim() != 3:
            raise ValueError(
                f"x must be (B, S, {in_features}), or packed (T, {in_features}) with cu_seqlens, "
                f"got shape {tuple(x.shape)}"
            )
        return x.shape[0]
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens must be int32 of shape (n + 1,), got {cu_seqlens.dtype} of {tuple(cu_seqlens.shape)}"
        )
    if x.dim() != 2 and not (x.dim() == 3 and x.shape[0] == 1):
        raise ValueError(f"x must be (T, d) or (1, T, d) when cu_seqlens packs it, got shape {tuple(x.shape)}")
    return cu_seqlens.shape[0] - 1


def check_route_mask(route_mask: Tensor | None, x: Tensor) -> None:
    """Check a mask of tokens.

    Raises:
        TypeError, ValueError: it is not bool of x's shape without d, on its device.
    """
    check_tensor("route_mask", route_mask, x.device)
    if route_mask is not None and (route_mask.dtype != torch.bool or route_mask.shape != x.shape[:-1]):
        raise ValueError(
            f"route_mask must be bool of shape {tuple(x.shape[:-1])}, "
            f"got {route_mask.dtype} of {tuple(route_mask.shape)}"
        )


def check_ids(
    name: str,
    ids: Tensor | None,
    shapes: tuple[tuple[int | str, ...], ...],
    device: torch.device,
    *,
    below: int,
    least: int = 0,
    what: str = "an expert",
) -> Tensor:
    """Check ids of experts, branches or tasks; return them clamped to what int32 holds.

    Args:
        shapes: the allowed ones; a string in a shape stands for any size.
        below, least: the range [least, below) of an id.
        what: the thing that an id names, for messages.

    Raises:
        TypeError, ValueError: they do not fit.
    """
    expected = " or ".join(f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})" for shape in shapes)
    if not isinstance(ids, Tensor) or not any(
        ids.dim() == len(shape) and all(isinstance(b, str) or a == b for a, b in zip(ids.shape, shape, strict=True))
        for shape in shapes
    ):
        got = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else repr(ids)
        raise ValueError(f"{name} must be a tensor of shape {expected}, got {got}")
    if ids.device != device:
        raise ValueError(f"{name} must be on {device}, got {ids.device}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {ids.dtype}")
    if reads_values(ids) and ids.numel() and not bool(((ids >= least) & (ids < below)).all()):
        raise ValueError(f"{name} must name {what}, {least} to {below - 1}, got {ids.tolist()}")
    return ids.clamp(-1, 2**31 - 1)  # a wrong id must not wrap into a valid int32


def check_task(task: int | Tensor, num_seqs: int, num_tasks: int, device: torch.device) -> int | Tensor:
    """Check the task of a batch or of each sequence: an int, or int (n,).

    Raises:
        TypeError, ValueError: it is not an int or int (n,), or the adapter has no such task.
    """
    if isinstance(task, Tensor) and task.dim() == 0 and reads_values(task):
        task = int(task)
    if isinstance(task, int) and not isinstance(task, bool):
        if not 0 <= task < num_tasks:
            raise ValueError(f"task must name a task of the adapter, 0 to {num_tasks - 1}, got {task}")
        return task
    if not isinstance(task, Tensor):
        raise TypeError(f"task must be an int, or an int tensor of shape ({num_seqs},), got {task!r}")
    return check_ids("task", task, ((num_seqs,),), device, below=num_tasks, what="a task of the adapter").long()
