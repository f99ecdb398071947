"""The optional module `smolora._cpu`, and how tensors reach it: as addresses, of float32 or float64 in plain memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

try:
    module: ModuleType | None = importlib.import_module("smolora._cpu")
except ImportError:  # no C++ compiler where smolora was built
    module = None

TYPES = {torch.float32: "float", torch.float64: "double"}


def describe() -> str:
    """Say whether there is compiled code for a CPU, and for which of its vectors."""
    return "no: slower on a CPU" if module is None else f"yes, for vectors of {module.widest()} bytes"


def function(name: str, dtype: torch.dtype) -> Callable:
    """Return the compiled function for tensors of a dtype."""
    return getattr(module, f"{name}_{TYPES[dtype]}")


def is_plain(t: Tensor) -> bool:
    """Whether compiled code can read a tensor: on the CPU, contiguous, no subclass with data elsewhere."""
    return t.device.type == "cpu" and t.is_contiguous()


def address(t: Tensor | None) -> int:
    """Return the address of a tensor's data, 0 for None or for an empty tensor."""
    return 0 if t is None or not t.numel() else t.data_ptr()
