"""The machine figures that predictions are made from, each with its source.

Figures marked "assumed" were not measured on the card. A calibration run (bench/calibrate.py) measures them once; its
file then takes their place, and reports no longer say "assumed".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

CALIBRATIONS = Path(__file__).parents[1] / "results/calibration"

GUIDE = "CUDA C++ programming guide"
SHEET = "data sheet"
ASSUMED = "assumed"
DISSECTION = "published microbenchmarks; assumed"

# name: (unit, source, H200, A100). Cycles of a pipe are those of one warp instruction on one sub-partition.
FIGURES: dict[str, tuple[str, str, float, float]] = {
    "processors": ("", SHEET, 132, 108),
    "clock": ("Hz", "boost clock under load; assumed", 1.755e9, 1.41e9),
    "memory": ("byte/s", "a copy's rate: measured on an H200; the same share of 2.0 TB/s on an A100", 4.3e12, 1.79e12),
    "l2": ("byte/s", "all multiprocessors, reads and writes each; assumed, the least certain", 5.5e12, 4.0e12),
    "l2_bytes": ("byte", SHEET, 50e6, 40e6),
    "shared_bytes": ("byte", GUIDE + ", a multiprocessor's shared memory", 228 * 1024, 164 * 1024),
    "block_reserve": ("byte", GUIDE + ", shared memory that the system takes of each block", 1024, 1024),
    "registers": ("", GUIDE + ", of a multiprocessor", 65536, 65536),
    "warps": ("", GUIDE + ", of a multiprocessor", 64, 64),
    "blocks": ("", GUIDE + ", of a multiprocessor", 32, 32),
    "data_path": ("byte/cycle", GUIDE + ", shared memory and L1 of a multiprocessor", 128, 128),
    "alu": ("cycles", GUIDE + ", 64 lanes a multiprocessor", 2, 2),
    "imad": ("cycles", GUIDE + ", 64 lanes a multiprocessor", 2, 2),
    "imad_wide": ("cycles", ASSUMED, 2, 2),
    "fp32": ("cycles", GUIDE + ", 128 lanes a multiprocessor (64 on sm_80)", 1, 2),
    "fp64": ("cycles", GUIDE + ", 64 lanes a multiprocessor (32 on sm_80)", 2, 4),
    "xu": ("cycles", GUIDE + ", 16 lanes a multiprocessor", 8, 8),
    "uniform": ("cycles", ASSUMED, 2, 2),
    "hmma": ("cycles", "16x8x16 at 62% of the dense rate on Hopper, all of it on sm_80; assumed", 6.4, 8),
    "wgmma_columns": ("columns/cycle", "dense rate of the data sheet", 2, 0),
    "wgmma_a_shared": ("cycles", DISSECTION + ": reading A of 64 x 16 from shared memory", 16, 0),
    "shared_latency": ("cycles", DISSECTION, 24, 24),
    "matrix_latency": ("cycles", DISSECTION + ": LDSM", 28, 28),
    "shuffle_latency": ("cycles", DISSECTION, 22, 22),
    "wgmma_latency": ("cycles", ASSUMED, 20, 0),
    "hmma_latency": ("cycles", DISSECTION, 24, 24),
    "xu_latency": ("cycles", DISSECTION, 20, 20),
    "l1_latency": ("cycles", DISSECTION, 34, 34),
    "l2_latency": ("cycles", DISSECTION, 280, 220),
    "memory_latency": ("cycles", DISSECTION, 620, 500),
    "constant_latency": ("cycles", ASSUMED, 30, 30),
    "uniform_latency": ("cycles", ASSUMED, 10, 10),
    "barrier_latency": ("cycles", DISSECTION, 14, 14),
    "fence_latency": ("cycles", ASSUMED, 16, 16),
    "grid_barrier": ("s", "published for cooperative groups; assumed", 1.3e-6, 1.3e-6),
    "launch": ("s", "start of a kernel after another in one stream or graph; assumed", 1.5e-6, 1.5e-6),
    "matrix_rate": ("FLOP/s", "bf16, large products: measured on an H200; the same share on an A100", 780e12, 246e12),
}
CARDS = {"h200": (90, 2), "a100": (80, 3)}  # architecture, and column of FIGURES


@dataclass(frozen=True)
class Machine:
    """A GPU: its architecture, and FIGURES with those that were measured put in."""

    name: str
    arch: int
    figures: Mapping[str, float]
    measured: frozenset[str] = field(default_factory=frozenset)

    def __getitem__(self, name: str) -> float:
        return self.figures[name]

    def seconds(self, cycles: float) -> float:
        return cycles / self["clock"]

    @property
    def memory_rate(self) -> float:
        """Bytes of device memory a cycle and multiprocessor."""
        return self["memory"] / self["processors"] / self["clock"]

    @property
    def l2_rate(self) -> float:
        """Bytes of L2 a cycle and multiprocessor."""
        return self["l2"] / self["processors"] / self["clock"]

    def basis(self) -> str:
        """Say what the figures rest on."""
        if not self.measured:
            return "machine figures assumed, none calibrated on a card"
        return f"machine figures calibrated on a card: {', '.join(sorted(self.measured))}; the others assumed"

    def resident_blocks(self, registers: int, warps: int, shared: int) -> dict[str, int]:
        """Return how many blocks fit a multiprocessor by each limit: registers, shared memory, warps and blocks."""
        per_warp = -(-registers * 32 // 256) * 256  # registers are handed out 256 at a time, to a sub-partition's warps
        return {
            "registers": int(self["registers"] / 4 // per_warp) * 4 // warps,
            "shared memory": int(self["shared_bytes"] // (shared + self["block_reserve"])),
            "warps": int(self["warps"]) // warps,
            "blocks": int(self["blocks"]),
        }


def card_here() -> str | None:
    """Return the name in CARDS of the GPU that torch sees, if there is one and it has figures."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_properties(0).name
    return next((card for card in CARDS if card.upper() in name), None)


def machine(name: str, calibrations: Path = CALIBRATIONS) -> Machine:
    """Return a card's figures, with those of its calibration run where there was one.

    Raises:
        ValueError: the calibration names a figure that is unknown, or that is not a positive number.
    """
    arch, column = CARDS[name]
    figures = {key: row[column] for key, row in FIGURES.items()}
    path = calibrations / f"{name}.json"
    measured = json.loads(path.read_text())["figures"] if path.exists() else {}
    for key, value in measured.items():
        if key not in figures or not value > 0:
            raise ValueError(f"{path}: {key} = {value!r} must be a positive number of a figure in FIGURES")
    return Machine(name, arch, figures | measured, frozenset(measured))
