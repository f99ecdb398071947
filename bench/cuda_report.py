"""Compile every CUDA C++ kernel for every architecture, on any machine with nvcc, and report what came out.

    python bench/cuda_report.py [--arch 90a ...] [--files decode ...] [--json FILE]

Registers, stack and spills come from ptxas, instruction counts from the disassembly (SASS). Exits with 1 if a kernel
spills or has a stack, takes more registers than a block can have, or lacks the instructions it is written for:
tensor cores in the products of 16-bit types, loads and copies of 16 bytes in all products and in decoding.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from static_report import print_faults, print_rows

ROOT = Path(__file__).parents[1]
FILES = tuple(sorted(path.stem for path in ROOT.glob("csrc/*.cu")))
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
PRODUCTS = {"shrink_kernel": 128, "expand_kernel": 128, "outer_kernel": 256}  # threads of a block
THREADS = {**PRODUCTS, "decode_kernel": 256}
COUNTED = {
    "spills": r"\b(?:LDL|STL)\b",
    "tensor_core": r"\bHMMA\b",
    "wide": r"\b(?:LDG\.E[.\w]*\.128|LDGSTS\.E[.\w]*\.128|STG\.E[.\w]*\.128)",
}


@dataclass(frozen=True)
class Row:
    """What one compiled kernel takes and has."""

    arch: str
    file: str
    kernel: str
    types: str
    registers: int
    stack: int
    spill_bytes: int
    static_shared: int
    spills: int
    tensor_core: int
    wide: int

    def __str__(self) -> str:
        return self.types

    def faults(self) -> list[str]:
        """Return what is wrong with the compiled kernel."""
        found = []
        if self.spills or self.stack or self.spill_bytes:
            found.append(f"{self.spills} spill instructions, {self.stack} bytes of stack")
        if self.registers * THREADS.get(self.kernel, 128) > 65536:
            found.append(f"{self.registers} registers a thread do not fit a block")
        if self.kernel in PRODUCTS and "float" not in self.types and not self.tensor_core:
            found.append("no tensor-core instruction")
        element_by_element = self.kernel == "decode_kernel" and self.types.endswith(" 0")
        if self.kernel in THREADS and not self.wide and not element_by_element:
            found.append("no access of 16 bytes")
        return found


def find_nvcc() -> str | None:
    """Find nvcc in CUDA_HOME, on PATH or in /usr/local/cuda."""
    from shutil import which

    home = os.environ.get("CUDA_HOME")
    return which("nvcc", path=f"{home}/bin") if home else which("nvcc") or which("/usr/local/cuda/bin/nvcc")


def find_nvdisasm() -> str:
    """Return the disassembler in Triton's package."""
    return str(Path(find_spec("triton").origin).parent / "backends/nvidia/bin/nvdisasm")


def supported(nvcc: str, architectures: Iterable[str]) -> list[str]:
    """Return those of the architectures that an nvcc knows."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return [arch for arch in architectures if f"sm_{arch.removesuffix('a')}" in known.split()]


def split_name(mangled: str) -> tuple[str, str]:
    """Return a kernel's name and its template arguments from its mangled name: "shrink_kernel", "bf16 5"."""
    name = next(m[1] for m in re.finditer(r"\d+([a-z_]+_kernel)", mangled))
    arguments = mangled.split(name, 1)[1].split("EEv")[0].split("Ev")[0]
    types = [("bf16", "nv_bfloat16"), ("fp16", "6__half"), ("float", "If")]
    found = [short for short, mark in types if mark in arguments][:1]
    mixes = [mix for mix in ("Smolora", "Weighted") if mix in arguments]
    return name, " ".join([*found, *mixes, *re.findall(r"L[ib](\d+)E", arguments + "E")])


def compile_file(nvcc: str, arch: str, file: str) -> list[Row]:
    """Compile one file for an architecture and read the cubin back."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "out.cubin")
        command = [nvcc, "-cubin", f"-arch=sm_{arch}", "-std=c++17", "-O3", "-Xptxas", "-v", "-o", cubin]
        done = subprocess.run([*command, ROOT / f"csrc/{file}.cu"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{file}.cu does not compile for sm_{arch}:\n{done.stderr[-3000:]}")
        sass = subprocess.run([find_nvdisasm(), cubin], capture_output=True, text=True, check=True).stdout
    counts: dict[str, dict[str, int]] = {}
    kernel = ""
    for line in sass.splitlines():
        section = re.match(r"\s*\.section\s+\.text\.(\S+?),", line)
        if section:
            kernel = section[1]
            counts[kernel] = dict.fromkeys(COUNTED, 0)
        elif kernel and "/*" in line:
            for kind, pattern in COUNTED.items():
                counts[kernel][kind] += bool(re.search(pattern, line))
    rows = []
    for block in re.split(r"Compiling entry function", done.stderr)[1:]:
        mangled = re.search(r"'(\S+)'", block)[1]
        number = lambda pattern, block=block: int((re.search(pattern, block) or [0, 0])[1])  # noqa: E731
        name, types = split_name(mangled)
        rows.append(
            Row(
                arch=arch,
                file=file,
                kernel=name,
                types=types,
                registers=number(r"Used (\d+) registers"),
                stack=number(r"(\d+) bytes stack frame"),
                spill_bytes=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
                static_shared=number(r"(\d+) bytes smem"),
                **counts[mangled],
            )
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--files", nargs="+", choices=FILES, default=FILES)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda_report: not compiled, there is no nvcc (set CUDA_HOME, or put it on PATH)")
        return 0
    jobs = [(arch, file) for arch in supported(nvcc, arguments.arch) for file in arguments.files]
    bar = tqdm(total=len(jobs), desc="compiling", unit="file", disable=not sys.stderr.isatty())

    def work(job: tuple[str, str]) -> list[Row]:
        found = compile_file(nvcc, *job)
        bar.update()
        return found

    with ThreadPoolExecutor(arguments.workers) as pool, bar:
        rows = [row for found in pool.map(work, jobs) for row in found]
    print_rows(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    left_out = [arch for arch in arguments.arch if arch not in {row.arch for row in rows}]
    if left_out:
        print(f"this nvcc does not know sm_{', sm_'.join(left_out)}")
    return print_faults(rows, nvcc)


if __name__ == "__main__":
    sys.exit(main())
