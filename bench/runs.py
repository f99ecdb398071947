"""What the benches share: which device, shapes and peers a run measures, and what it leaves."""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tqdm import tqdm

import smolora
from accuracy import WrongResult
from peers import OURS
from report import Row
from shapes import PRESETS, Case
from timing import Clock, Job, Timing, interleave

CPU_TOKENS = (2, 128)  # batch and sequence to which a GPU's preset is cut on a CPU


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def unavailable(name: str, device: torch.device, dtype: str) -> str | None:
    """Why this peer cannot be measured here; None if it can."""
    if name == "peft_lora_fp32" and dtype == "float32":
        return "the same as peft_lora: the compute dtype is float32"
    if name.startswith("compiled") and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        return "torch.compile needs a C++ compiler on a CPU, and none was found"
    if name == "triton" and device.type == "cpu":
        return "Triton's interpreter on a CPU is no measurement"
    if name in OURS:
        return smolora.backend_info()["backends"][name]["reason"]
    return None


def choose_device(name: str) -> torch.device:
    """The device that `--device` asks for; auto takes a GPU where there is one."""
    on_gpu = torch.cuda.is_available() if name == "auto" else name == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU on this machine")
    return torch.device("cuda" if on_gpu else "cpu")


def choose_cases(
    preset: str, names: list[str] | None, changes: dict[str, Any], device: torch.device
) -> tuple[list[Case], str | None]:
    """The shapes that the flags ask for, and what a reader must know about them.

    Args:
        names: only these shapes of the preset.
        changes: fields of every `Case` to replace; with d or k in them, of the first one alone.
    """
    cases = [case for case in PRESETS[preset] if not names or case.name in names]
    if not cases:
        sys.exit(f"--case: no such shape; known: {', '.join(case.name for case in PRESETS[preset])}")
    if "d" in changes or "k" in changes:
        cases = [replace(cases[0], name="custom", ffn=0)]
    note = None
    if device.type == "cpu":
        note = "Measured on a CPU: these figures say nothing about a GPU."
        load, cores = os.getloadavg()[0], os.cpu_count()
        if load > cores / 2:
            note += f" Other programs are busy on it (load {load:.1f} on {cores} cores): expect wide spreads."
    if device.type == "cpu" and preset != "small":
        batch, seq = CPU_TOKENS
        note += (
            f" The preset {preset} is cut to {batch}x{seq} tokens (from {cases[0].batch}x{cases[0].seq}) in float32"
            f" (from {cases[0].dtype}), unless flags say otherwise."
        )
        cases = [replace(case, batch=batch, seq=seq, dtype="float32") for case in cases]
    return [replace(case, **changes) for case in cases], note


def progress(total: int) -> tqdm:
    """The bar of a run."""
    return tqdm(
        total=total,
        bar_format="{desc} {bar:20} {n_fmt}/{total_fmt} [{elapsed}]",
        miniters=0,
        mininterval=0.2 if sys.stderr.isatty() else 10,  # seconds: a log file gets a line now and then
    )


def free_memory(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass
class Run:
    """One invocation: what all measurements share, and what they leave."""

    device: torch.device
    clock: Clock
    names: list[str]
    group_seconds: float  # time for one interleaved group of repeats
    deadline: float  # of `time.perf_counter`
    rounds: int | None
    bar: tqdm
    environment: Row
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def drop(self, what: str, error: Exception) -> None:
        """Leave something out for a reason; unless it is the lack of memory, the run fails for it at its end."""
        if isinstance(error, torch.OutOfMemoryError):
            self.skipped[what] = "out of device memory"
            return
        self.skipped[what] = str(error) if isinstance(error, WrongResult) else f"{type(error).__name__}: {error}"
        self.failed.append(f"{what}: {self.skipped[what]}")

    def late(self, what: str) -> bool:
        """Whether the time budget is spent; what is then left out is said."""
        if time.perf_counter() < self.deadline:
            return False
        self.skipped[what] = "the time budget was spent"
        return True

    def say(self, what: str) -> None:
        self.bar.set_description(f"{what:<40}", refresh=False)
        self.bar.update(0)

    def time(self, what: str, jobs: list[Job], groups: int = 1) -> dict[str, list[Timing]]:
        """`interleave` within this run's budget, shown as a step of its progress."""
        self.say(what)
        timings = interleave(
            jobs,
            self.clock,
            groups * self.group_seconds,
            min_rounds=5 if groups > 1 else 3,
            rounds=self.rounds,
            on_round=lambda done: self.say(f"{what}, round {done}"),
        )
        self.bar.update(groups)
        return timings
