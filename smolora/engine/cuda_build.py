"""The compiled CUDA C++ kernels of this installation, and the reasons why they may not run on this machine.

`cuda_passes` calls them. In tests `extension` is the emulation of the same sources on the CPU.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

try:
    extension: ModuleType | None = importlib.import_module("smolora._C")
    _missing = ""
except ModuleNotFoundError:  # which `from . import _C` would not raise
    extension = None
    _missing = (
        "this installation has no CUDA C++ kernels: pip install -e . builds them where there are nvcc and a card of "
        "compute capability 8.0 or newer, with FORCE_CUDA=1 where there is nvcc"
    )
except ImportError as error:  # built for another Python, or not at all well
    extension = None
    _missing = f"its compiled kernels do not load: {error}"


BUILD_LOG = Path(__file__).parents[1] / "_C.log"  # which setup.py leaves where it could not build the extension
REBUILD = "see to that and run pip install -e . again, with FORCE_CUDA=1 to see the compiler at work"


def driver_needed(runtime: int) -> str:
    """Return the oldest driver for kernels built with a CUDA version, given as 1000 major + 10 minor."""
    return {12: "525", 13: "580"}.get(runtime // 1000, f"for CUDA {runtime // 1000}")


def runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Tell whether a card can run kernels built for `architectures`, as in "80 90a 120+PTX"."""
    for name in architectures.split():
        number = name.removesuffix("+PTX")
        major, minor = divmod(int(number.removesuffix("a")), 10)
        if number.endswith("a"):
            fits = capability == (major, minor)
        else:
            fits = capability[0] == major and capability[1] >= minor
        if fits or (name.endswith("+PTX") and capability >= (major, minor)):
            return True
    return False


def build_failure() -> str | None:
    """Return why the build failed, such as a compiler's first error; None if it did not, or there was none."""
    if extension is not None or not BUILD_LOG.exists():
        return None
    return BUILD_LOG.read_text(encoding="utf-8").partition("\n")[0]


def unavailable_reason() -> str | None:
    """Return why the kernels cannot run on this machine; None if they can."""
    failure = build_failure()
    if failure is not None:
        return f"the CUDA C++ kernels could not be built: {failure} (more in {BUILD_LOG}); {REBUILD}"
    return _missing if extension is None else _reason_on_this_machine(extension)


@cache
def _reason_on_this_machine(built: Any) -> str | None:
    if built.emulated:
        return None
    needed = driver_needed(built.runtime_version)
    version = built.driver_version()
    if version == 0:
        return f"there is no NVIDIA driver; these kernels need {needed} or newer"
    if version // 1000 < built.runtime_version // 1000:
        supports = f"{version // 1000}.{version % 1000 // 10}"
        return f"the NVIDIA driver is for CUDA {supports}; these kernels need {needed} or newer"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    cards = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if not any(runs_on(card, built.architectures) for card in cards):
        names = ", ".join(f"{major}.{minor}" for major, minor in sorted(cards))
        if max(cards) < (8, 0):
            return f"the kernels need compute capability 8.0 or newer, and the cards have {names}"
        return (
            f"the kernels were built for {built.architectures}, not for compute capability {names}; "
            f"TORCH_CUDA_ARCH_LIST='{names}' pip install -e . builds them for it"
        )
    return None


def info() -> dict[str, Any]:
    """Return what `backend_info` says about this backend besides its availability."""
    facts: dict[str, Any] = {"version": None, "auto": "never: no measurement has shown yet where it beats Triton"}
    if extension is not None and not extension.emulated:
        runtime = extension.runtime_version
        facts["version"] = f"{runtime // 1000}.{runtime % 1000 // 10}"
        facts["driver"] = f"{driver_needed(runtime)} or newer"
        facts["architectures"] = extension.architectures
    failure = build_failure()
    if failure is not None:
        facts |= {"build_error": failure, "build_log": str(BUILD_LOG)}
    return facts
