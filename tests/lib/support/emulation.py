"""The CUDA C++ sources, compiled by g++ against tests/csrc/emulator: thread blocks on the CPU."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[3]
EMULATOR = ROOT / "tests/csrc/emulator"
SOURCES = [*sorted(ROOT.glob("csrc/*.cu")), EMULATOR / "emulate.cpp", ROOT / "csrc/bindings.cpp"]
HEADERS = [*sorted(ROOT.glob("csrc/**/*.h")), *sorted(ROOT.glob("csrc/**/*.cuh")), *sorted(EMULATOR.glob("*.h"))]
OPTIONS = ["-O1", "-std=c++17", "-fPIC", "-DSMOLORA_EMULATE"]


def compile_all(folder: Path) -> Path:
    """The module, from objects that are made anew only where a source has changed."""
    import pybind11  # for what is emulated alone: tests on a GPU go without

    compiler = os.environ.get("CXX", "g++")
    includes = [
        f"-I{ROOT / 'csrc'}",
        f"-I{EMULATOR}",
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_path('include')}",
    ]
    command = [compiler, *OPTIONS, "-DSMOLORA_MODULE=smolora_emulated", *includes, "-x", "c++"]
    headers = b"".join(path.read_bytes() for path in HEADERS)

    def compile_one(source: Path) -> Path:
        key = hashlib.sha256(headers + source.read_bytes() + "\0".join(command).encode()).hexdigest()[:16]
        out = folder / f"{source.stem}-{key}.o"
        if not out.exists():
            part = out.with_suffix(".part")
            done = subprocess.run([*command, "-c", source, "-o", part], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{source.name} does not compile for the emulation:\n{done.stderr[-4000:]}")
            part.rename(out)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    key = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:16]
    module = folder / f"smolora_emulated-{key}.so"
    if not module.exists():
        part = module.with_suffix(".part")
        subprocess.run([compiler, "-shared", *objects, "-o", part], check=True)
        part.rename(module)
    return module


@cache
def load() -> ModuleType:
    """The emulated extension; processes that ask for it at a time wait for the first to compile it."""
    folder = ROOT / "build/emulation"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        module = compile_all(folder)
    spec = importlib.util.spec_from_file_location("smolora_emulated", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
