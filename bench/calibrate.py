"""Measure the machine figures that bench/throughput.py otherwise assumes: two minutes, once, on the first card.

    python bench/calibrate.py [--output bench/results/calibration]

Eight microkernels (bench/microkernels.cu) and a copy. Predictions made after it use what was measured, and say so.
Needs nvcc, and a card that bench/predict/machines.py has figures of; on any other it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cuda_report import find_nvcc
from predict.machines import CALIBRATIONS, CARDS, FIGURES, card_here
from report import environment

SOURCE = Path(__file__).with_name("microkernels.cu")
ROUNDS, UNROLL = 256, 8  # as in the source
REPEATS = 7  # the fastest counts for cycles and latencies, the median for rates


def compile_cubin(nvcc: str, arch: int) -> bytes:
    """Compile the microkernels for an architecture.

    Raises:
        RuntimeError: nvcc refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "out.cubin")
        name = f"sm_{arch}{'a' if arch >= 90 else ''}"
        command = [nvcc, "-cubin", f"-arch={name}", "-std=c++17", "-O3", "-o", cubin, SOURCE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{SOURCE.name} does not compile for {name}:\n{done.stderr[-3000:]}")
        return cubin.read_bytes()


class Kernels:
    """The microkernels, loaded into the current device's context and launched on its current stream."""

    def __init__(self, cubin: bytes) -> None:
        torch.cuda.current_stream()  # makes the context
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.module = ctypes.c_void_p()
        self._check("cuModuleLoadData", ctypes.byref(self.module), cubin)

    def _check(self, name: str, *arguments: Any) -> None:
        status = getattr(self.driver, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with CUDA error {status}")

    def launch(self, name: str, blocks: int, threads: int, *arguments: torch.Tensor | int, shared: int = 0) -> None:
        """Launch a kernel; tensors are passed as their addresses, numbers as 32-bit integers."""
        function = ctypes.c_void_p()
        self._check("cuModuleGetFunction", ctypes.byref(function), self.module, name.encode())
        values = [
            ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int32(a) for a in arguments
        ]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check("cuLaunchKernel", function, blocks, 1, 1, threads, 1, 1, shared, stream, addresses, None)


def seconds(run: Callable[[], object]) -> float:
    """Return the median time of a run on the device."""
    times = []
    for _ in range(REPEATS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times[1:])[REPEATS // 2]


def measure(kernels: Kernels, arch: int, processors: int) -> dict[str, float]:
    """Measure the figures of FIGURES that the microkernels give."""
    device = torch.device("cuda")
    ticks = torch.zeros(1, dtype=torch.int64, device=device)
    out = torch.zeros(1 << 20, dtype=torch.int64, device=device)

    def cycles(name: str, threads: int, *rest: Any, shared: int = 0, before: Callable[[], object] = int) -> float:
        found = []
        for _ in range(REPEATS):
            before()
            kernels.launch(name, 1, threads, ticks, out, *rest, shared=shared)
            found.append(ticks.item())
        return min(found)

    figures = {}
    warps = 8
    figures["imad_wide"] = cycles("imad_wide", 512, 3, ROUNDS) / (ROUNDS * UNROLL * 4)  # 4 warps a sub-partition
    moved = warps * 512 * ROUNDS * UNROLL  # bytes
    loading = moved / cycles("load_matrix", 32 * warps)
    storing = moved / cycles("store_shared", 32 * warps, shared=32 * warps * 16 * UNROLL)
    figures["data_path"] = min(loading, storing)
    figures["barrier_latency"] = cycles("barrier", 32 * warps) / ROUNDS

    def ring(words: int, stride: int) -> torch.Tensor:
        """Return a ring of places, `stride` numbers of 4 bytes apart."""
        places = torch.zeros(words, dtype=torch.int32, device=device)
        at = torch.arange(0, words, stride, device=device)
        places[at] = at.roll(-1).int()
        return places

    near, far = ring(1 << 18, 1 << 10), ring(1 << 28, 1 << 18)  # 1 MB; 1 GB, a load each MB
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    figures["l2_latency"] = cycles("chase", 1, near, ROUNDS) / ROUNDS
    figures["memory_latency"] = cycles("chase", 1, far, 0, before=flush.zero_) / ROUNDS
    if arch >= 90:
        groups = 4  # warpgroups at once
        each = {
            (columns, where): cycles(f"wgmma_{columns}_{where}", 128 * groups) / (groups * ROUNDS * UNROLL)
            for columns in (8, 64)
            for where in ("shared", "registers")
        }
        figures["wgmma_a_shared"] = each[8, "shared"] - 8 * 32 / figures["data_path"]
        figures["wgmma_columns"] = 64 / each[64, "registers"]
    rounds = 1 << 18
    spin = seconds(lambda: kernels.launch("imad_wide", processors, 512, ticks, out, 3, rounds))
    figures["clock"] = ticks.item() / spin
    words, rounds = 1 << 20, 32  # 16 MB
    reading = seconds(lambda: kernels.launch("read_l2", 2 * processors, 1024, out, flush, words, rounds))
    figures["l2"] = 16 * words * rounds / reading
    half = flush.numel() // 2
    figures["memory"] = 2 * half / seconds(lambda: flush[:half].copy_(flush[half:]))
    graph, launches = torch.cuda.CUDAGraph(), 200
    with torch.cuda.graph(graph):
        for _ in range(launches):
            kernels.launch("nothing", 1, 32)
    figures["launch"] = seconds(graph.replay) / launches
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CALIBRATIONS, help="folder of the file (default: %(default)s)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("calibrate: needs a CUDA GPU, and there is none", file=sys.stderr)
        return 1
    properties = torch.cuda.get_device_properties(0)
    name = card_here()
    if name is None:
        print(f"calibrate: skipped, bench/predict/machines.py has no figures of {properties.name}")
        return 0
    nvcc = find_nvcc()
    if nvcc is None:
        print("calibrate: skipped, there is no nvcc (set CUDA_HOME, or put it on PATH)")
        return 0
    arch = CARDS[name][0]
    figures = measure(Kernels(compile_cubin(nvcc, arch)), arch, properties.multi_processor_count)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(torch.device("cuda")), "figures": figures}, indent=1) + "\n")
    print(f"{'figure':<18}{'measured':>14}{'assumed':>14}  unit")
    for key, value in figures.items():
        print(f"{key:<18}{value:>14.5g}{FIGURES[key][CARDS[name][1]]:>14.5g}  {FIGURES[key][0]}")
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
