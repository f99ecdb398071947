"""Compile every Triton kernel with every tile for every architecture, on any machine, and report what came out.

    python bench/kernel_report.py [--arch 90 ...] [--json FILE]

The launchers themselves are run on tensors without data while launches are recorded, so what is compiled is what a
training step or a decode step would launch. Registers, stack and spills come from the cubin, shared memory from the
compiler, instruction counts from the disassembly (SASS).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: these are the compiled kernels

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from smolora.kernels import passes, tiles

ARCHITECTURES = (80, 90, 100, 120)
# shared memory that one block may use, in bytes (CUDA programming guide, compute capabilities)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
DOTS = ("shrink_kernel", "fuse_expand_kernel", "grad_output_kernel", "grad_input_kernel")


@dataclass(frozen=True)
class Setting:
    """A layer and how it is used; the kernels' variants follow from it."""

    r: int = 16
    dtype: torch.dtype = torch.bfloat16
    top_k: int = 1
    threshold: int = 13
    masked: bool = False
    packed: bool = False
    training: bool = True
    d: int = 4096
    k: int = 11008
    tokens: int = 8192
    instances: int = 8

    def __str__(self) -> str:
        options = [f"r={self.r}", str(self.dtype)[6:], f"top_k={self.top_k}", f"dropout={self.threshold}/256"]
        options += [name for name in ("masked", "packed") if getattr(self, name)]
        return " ".join(options + ([] if self.training else ["decode"]))


def settings() -> list[Setting]:
    """What is compiled: all tiles by rank and dtype, then the variants of one layer."""
    tiles_of = [Setting(r=r, dtype=dtype) for r in (16, 32, 64, 128) for dtype in (torch.bfloat16, torch.float32)]
    plain = Setting()
    variants = [
        replace(plain, threshold=0), replace(plain, masked=True), replace(plain, packed=True), replace(plain, top_k=2),
        replace(plain, dtype=torch.float16), replace(plain, r=12), replace(plain, training=False, threshold=0, tokens=8),
    ]  # fmt: skip
    return tiles_of + variants


@dataclass(frozen=True)
class Launch:
    """One kernel with the arguments that decide its code."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    warps: int
    stages: int


def record(run: Callable[[], Any]) -> list[tuple[JITFunction, Launch]]:
    """The launches that `run` makes, in place of making them."""
    launches: list[tuple[JITFunction, Launch]] = []

    def launcher(kernel: JITFunction, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int = 4, num_stages: int = 3, **constexprs: Any) -> None:
            signature, fixed, divisible = [], dict(constexprs), []
            for i, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=False)):
                if isinstance(value, torch.Tensor):
                    kind = TYPES[value.dtype]
                    divisible.append(i)
                elif isinstance(value, float):
                    kind = "fp32"
                else:
                    kind = "i32"
                    if not parameter.do_not_specialize and value == 1:
                        kind, fixed[parameter.name] = "constexpr", 1
                    elif not parameter.do_not_specialize and value % 16 == 0:
                        divisible.append(i)
                signature.append((parameter.name, kind))
            signature += [(name, "constexpr") for name in constexprs]
            key = Launch(
                kernel.__name__, tuple(signature), tuple(fixed.items()), tuple(divisible), num_warps, num_stages
            )
            launches.append((kernel, key))

        return launch

    with mock.patch.object(JITFunction, "__getitem__", launcher):
        run()
    return launches


def run_layer(s: Setting) -> None:
    """One forward, and backward if training, through the launchers, with tensors that have shapes and no memory."""
    with torch.device("meta"):
        M = N = 4
        x = torch.empty(s.tokens, s.d, dtype=s.dtype)
        g = torch.empty(s.tokens, s.k, dtype=s.dtype)
        cu = torch.empty(s.instances + 1, dtype=torch.int32) if s.packed else None
        mask = torch.empty(s.tokens, dtype=torch.bool) if s.masked else None
        seed = torch.empty(1, dtype=torch.int64)
        A, B = torch.empty(M, s.r, s.d), torch.empty(M, s.k, s.r)
        router, router_if, importance = torch.empty(M, s.d), torch.empty(N, 384), torch.empty(s.k)
        given = None if s.training else torch.empty(s.instances, 2, s.top_k, dtype=torch.int32)
        gates = None if s.training else torch.empty(s.instances, 2, s.top_k)
        learns = s.top_k > 1
        h, w, routes, gates, _, mean = passes.route_shrink(
            x, s.instances, cu, mask, torch.empty(s.instances, 384), given, gates, A, A, B, B, router, router_if,
            importance, importance, seed, s.threshold, s.top_k, 2.0, "adaptive", learns,
        )  # fmt: skip
        _, lead = passes.fuse_expand(
            h,
            w,
            routes,
            gates,
            B,
            B,
            s.instances,
            cu,
            2.0,
            "adaptive",
            s.dtype,
            None,
            None,
            torch.empty(s.k, dtype=s.dtype),
        )
        if s.training:
            dh, *_ = passes.grad_output(
                g, h, w, routes, gates, lead, B, B, importance, importance, s.instances, cu, 2.0, "adaptive",
                True, True, True, True, learns,
            )  # fmt: skip
            passes.grad_input(
                x, dh, routes, A, A, s.instances, cu, mask, mean if learns else None, seed, s.threshold, "adaptive",
                s.dtype, True, True, True, None, None,
            )  # fmt: skip


def launches_for(arch: int) -> dict[Launch, tuple[str, str]]:
    """Every distinct launch on an architecture, with the setting it first came from and its kernel's module."""
    found: dict[Launch, tuple[str, str]] = {}
    card = tiles.Card((arch // 10, arch % 10))
    for s in settings():
        with mock.patch.object(tiles, "card_of", lambda device: card):
            for kernel, launch in record(lambda s=s: run_layer(s)):
                found.setdefault(launch, (str(s), kernel.fn.__module__))
    return found


@dataclass(frozen=True)
class Row:
    """What one compiled kernel takes and has."""

    arch: int
    kernel: str
    setting: str
    tile: str
    warps: int
    stages: int
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_core: int
    fma: int
    wide_loads: int

    def faults(self) -> list[str]:
        """What a kernel must not have."""
        found = []
        if self.spills or self.stack:
            found.append(f"{self.spills} spill instructions, {self.stack} bytes of stack")
        if self.shared > SHARED_MEMORY[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, above the card's {SHARED_MEMORY[self.arch]}")
        if self.kernel in DOTS and "float32" not in self.setting and not self.tensor_core:
            found.append("no tensor-core instruction")
        return found


def compile_one(task: tuple[int, Launch, str, str]) -> Row:
    """Compile a launch for an architecture and read the cubin back."""
    arch, launch, setting, module = task
    kernel = getattr(sys.modules.get(module) or __import__(module, fromlist=["_"]), launch.kernel)
    attributes = {(i,): [["tt.divisibility", 16]] for i in launch.divisible}
    source = ASTSource(
        fn=kernel, signature=dict(launch.signature), constexprs=dict(launch.constexprs), attrs=attributes
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": launch.warps, "num_stages": launch.stages}
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        dump = lambda flag: subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage, sass = dump("--dump-resource-usage"), dump("-sass")
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    count = lambda pattern: len(re.findall(pattern, sass))  # noqa: E731
    constants = dict(launch.constexprs)
    tile = " ".join(f"{n}={constants[n]}" for n in ("BT", "BD", "BK", "BC", "BV", "BI") if n in constants)
    return Row(
        arch, launch.kernel, setting, tile, launch.warps, launch.stages, used["REG"], used["STACK"],
        count(r"\b(?:LDL|STL)\b"), compiled.metadata.shared, count(r"\b(?:HGMMA|HMMA|UTCHMMA|UTCQMMA|QMMA|UTCMMA)\b"),
        count(r"\bFFMA"), count(r"\b(?:LDG\.E[.\w]*\.128|LDGSTS\.E[.\w]*\.128|UBLKCP|UTMALDG)"),
    )  # fmt: skip


def report(architectures: Iterable[int], workers: int) -> list[Row]:
    """All rows, compiled in `workers` processes."""
    tasks = []
    for arch in architectures:
        tasks += [(arch, launch, *origin) for launch, origin in launches_for(arch).items()]
    with ProcessPoolExecutor(workers) as pool:
        return list(tqdm(pool.map(compile_one, tasks), total=len(tasks), desc="compiling", unit="kernel"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    rows = report(arguments.arch, arguments.workers)
    columns = ("arch", "kernel", "tile", "warps", "stages", "registers", "stack", "spills", "shared", "tensor_core", "fma",
               "wide_loads", "setting")  # fmt: skip
    cells = [columns] + [tuple(str(getattr(row, c)) for c in columns) for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if arguments.json:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"versions": versions, "rows": [asdict(row) for row in rows]}, indent=1))
    bad = [(row, row.faults()) for row in rows if row.faults()]
    for row, faults in bad:
        print(f"FAULT sm_{row.arch} {row.kernel} [{row.tile}] {row.setting}: {'; '.join(faults)}")
    print(f"{len(rows)} kernels compiled with Triton {triton.__version__}, {len(bad)} with faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
