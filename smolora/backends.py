"""The choice of a backend, and the reasons why others cannot run."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch

from .engine import compiled
from .engine import cuda_build as cuda

BACKENDS = ("auto", "torch", "triton", "cuda")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_warned: set[str] = set()


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_requested = _checked(os.environ.get("SMOLORA_BACKEND", "auto"), "the environment variable SMOLORA_BACKEND")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _unavailable_reason(backend: str) -> str | None:
    """Return why a backend cannot run on this machine; None if it can."""
    if backend == "triton":
        if not _HAS_TRITON:
            return "triton is not installed (pip install triton; it exists for Linux on x86-64)"
        if not torch.cuda.is_available() and not _interpreted():
            return "torch sees no CUDA device; with TRITON_INTERPRET=1 Triton's interpreter runs the kernels on the CPU"
    if backend == "cuda":
        return cuda.unavailable_reason()
    return None


def _unsupported_reason(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Return why a backend cannot take tensors of this device and dtype; None if it can."""
    if backend == "torch":
        return None
    reason = _unavailable_reason(backend)
    if reason is not None:
        return reason
    if dtype not in KERNEL_DTYPES:
        return f"its kernels take float32, float16 and bfloat16, not {dtype}"
    if backend == "cuda":
        if device_type != ("cpu" if cuda.extension and cuda.extension.emulated else "cuda"):
            return f"its kernels run on CUDA devices, not on {device_type!r}"
        return None
    if device_type == "cpu" and not _interpreted():
        return "x is on the CPU; with TRITON_INTERPRET=1 Triton's interpreter takes CPU tensors"
    if device_type == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter gets products of bfloat16 wrong; use float32 or float16 with it"
    if device_type not in ("cpu", "cuda"):
        return f"its kernels run on CUDA devices, not on {device_type!r}"
    return None


def resolve_backend(device_type: str, dtype: torch.dtype) -> str:
    """Return the backend for tensors of a device type and compute dtype.

    "auto" takes Triton on a CUDA device and torch on a CPU. If it has to fall back on a GPU, it warns once. It never
    takes CUDA C++, whose kernels have not been measured to be faster yet.

    Raises:
        RuntimeError: a backend was asked for by name and cannot run these tensors; the message says why.
    """
    if _requested != "auto":
        reason = _unsupported_reason(_requested, device_type, dtype)
        if reason is not None:
            raise RuntimeError(f"backend {_requested!r} cannot run: {reason}")
        return _requested
    if device_type == "cpu":
        return "torch"
    reason = _unsupported_reason("triton", device_type, dtype)
    if reason is None:
        return "triton"
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"smolora falls back to its slower torch backend: triton cannot run, {reason}", stacklevel=2)
    return "torch"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run layers with one backend inside a `with` block: "auto", "torch", "triton" or "cuda".

    A layer's backward runs with the backend of its forward.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend cannot run on this machine; nothing falls back.
    """
    global _requested
    reason = _unavailable_reason(_checked(name, "backend"))
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run: {reason}")
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before


def check_backend(name: str) -> None:
    """Check that a backend can run here, for programs that will use it later.

    Raises:
        ValueError: it cannot run, or no backend has that name.
    """
    reason = _unavailable_reason(_checked(name, "backend"))
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot run: {reason}")


def backend_info() -> dict[str, Any]:
    """Describe every backend: whether it can run, and if not, why.

    Returns:
        "requested": by `use_backend` or SMOLORA_BACKEND. "active": the backend for float32 tensors of each device type
        (None where the requested one cannot run). "backends": for each, whether it is "available", the "reason" if
        not, and the "version" of what it needs. Of torch, whether "dropout" masks on a CPU come from compiled code,
        as they do where the installation found a C++ compiler, or, the same ones several times slower, from torch. Of
        the CUDA kernels the "driver" and "architectures", when "auto" takes them, and where they could not be built the
        "build_error", such as the compiler's first, and the file "build_log" with all that it said.
    """
    backends = {}
    for name in BACKENDS[1:]:
        reason = _unavailable_reason(name)
        backends[name] = {"available": reason is None, "reason": reason}
    backends["torch"]["version"] = torch.__version__
    backends["torch"]["compiled"] = compiled.describe()
    backends["triton"]["version"] = metadata.version("triton") if _HAS_TRITON else None
    backends["triton"]["interpreted"] = _interpreted()
    backends["cuda"] |= cuda.info()
    active = {}
    for device_type in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        chosen = _requested
        if chosen == "auto":
            fits = device_type == "cuda" and _unsupported_reason("triton", device_type, torch.float32) is None
            chosen = "triton" if fits else "torch"
        active[device_type] = chosen if _unsupported_reason(chosen, device_type, torch.float32) is None else None
    return {"requested": _requested, "active": active, "backends": backends}
