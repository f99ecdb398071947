"""What the benchmarks share: device, shapes and peers of a run, and the one `bench_main`."""

from __future__ import annotations

import argparse
import gc
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import report
import smolora
from accuracy import WrongResult
from peers import OURS
from report import Row
from shapes import PRESETS, SMoLoRACase
from smolora.io.files import write_json
from timing import Clock, Job, Timing, clock_for, interleave

CPU_TOKENS = (2, 128)  # batch and sequence to which a GPU's preset is cut on a CPU


def positive(text: str) -> int:
    """Parse a positive integer, as argparse wants it."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def unavailable(name: str, device: torch.device, dtype: str) -> str | None:
    """Return why a peer cannot be measured here; None if it can."""
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
    """Return the device that `--device` asks for; auto takes a GPU where there is one."""
    on_gpu = torch.cuda.is_available() if name == "auto" else name == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU on this machine")
    return torch.device("cuda" if on_gpu else "cpu")


def choose_cases(
    preset: str, names: list[str] | None, changes: dict[str, Any], device: torch.device
) -> tuple[list[SMoLoRACase], str | None]:
    """Return the shapes that the flags ask for, and a note on them for the reader.

    Args:
        names: only these shapes of the preset.
        changes: fields of every `SMoLoRACase` to replace; with d or k in them, of the first one alone.
    """
    cases = [case for case in PRESETS[preset] if not names or case.name in names]
    if not cases:
        sys.exit(f"--case: no such shape; known: {', '.join(case.name for case in PRESETS[preset])}")
    if "d" in changes or "k" in changes:
        cases = [replace(cases[0], name="custom", ffn=0)]
    note = None
    if device.type == "cpu":
        note = "Measured on a CPU: these figures say nothing about a GPU."
        if busy := busy_note(device):
            note += f" {busy}"
    if device.type == "cpu" and preset != "small":
        batch, seq = CPU_TOKENS
        note += (
            f" The preset {preset} is cut to {batch}x{seq} tokens (from {cases[0].batch}x{cases[0].seq}) in float32"
            f" (from {cases[0].dtype}), unless flags say otherwise."
        )
        cases = [replace(case, batch=batch, seq=seq, dtype="float32") for case in cases]
    return [replace(case, **changes) for case in cases], note


def busy_note(device: torch.device) -> str | None:
    """Return a warning if other programs are busy on the CPU that is measured; None if not."""
    load, cores = os.getloadavg()[0], os.cpu_count()
    if device.type != "cpu" or load <= cores / 2:
        return None
    return f"Other programs are busy (load {load:.1f} on {cores} cores): expect wide spreads, and trust ratios alone."


def progress(total: int) -> tqdm:
    """Return the progress bar of a run."""
    return tqdm(
        total=total,
        bar_format="{desc} {bar:20} {n_fmt}/{total_fmt} [{elapsed}]",
        miniters=0,
        mininterval=0.2 if sys.stderr.isatty() else 10,  # seconds: a log file gets a line now and then
    )


def free_memory(device: torch.device) -> None:
    """Collect garbage, and return cached device memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass
class Run:
    """One invocation of a benchmark: what its measurements share, and their results."""

    device: torch.device
    clock: Clock
    names: list[str]
    group_seconds: float  # for one interleaved group of repeats
    deadline: float  # of `time.perf_counter`
    rounds: int | None
    bar: tqdm
    environment: Row
    rows: list[Row] = field(default_factory=list)
    facts: Row = field(default_factory=dict)  # what the JSON file has besides the rows
    skipped: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def record_failure(self, what: str, error: Exception) -> None:
        """Leave something out of the results. The run fails for it at its end, unless memory was all that it lacked."""
        if isinstance(error, torch.OutOfMemoryError):
            self.skipped[what] = "out of device memory"
            return
        self.skipped[what] = str(error) if isinstance(error, WrongResult) else f"{type(error).__name__}: {error}"
        self.failed.append(f"{what}: {self.skipped[what]}")

    def out_of_time(self, what: str) -> bool:
        """Tell whether the time budget is spent, and if so, note that `what` is left out."""
        if time.perf_counter() < self.deadline:
            return False
        self.skipped[what] = "the time budget was spent"
        return True

    def set_status(self, what: str) -> None:
        self.bar.set_description(f"{what:<40}", refresh=False)
        self.bar.update(0)

    def time(self, what: str, jobs: list[Job], groups: int = 1, min_rounds: int = 3) -> dict[str, list[Timing]]:
        """Call `interleave` within this run's budget; `groups` steps of its progress."""
        self.set_status(what)
        timings = interleave(
            jobs,
            self.clock,
            groups * self.group_seconds,
            min_rounds=min_rounds,
            rounds=self.rounds,
            on_round=lambda done: self.set_status(f"{what}, round {done}"),
        )
        self.bar.update(groups)
        return timings


def bench_main(
    measure: Callable[[Run], None],
    show: Callable[[Run, Path], None],
    *,
    stem: str,
    output: Path | None,
    device: torch.device,
    names: list[str],
    skipped: dict[str, str],
    steps: int,
    group_seconds: float,
    deadline: float = math.inf,
    rounds: int | None = None,
    note: str | None = None,
) -> None:
    """Run a benchmark: print the machine, measure, write the rows as JSON, print the results.

    Args:
        measure: fills the run's rows and facts.
        show: prints the results, and may write more files into the folder.
        stem: the JSON file's name without its suffix.
        output: folder of the results; None: bench/results/<device>.
        names, skipped: peers to measure, and why others are not.
        steps: of the progress bar.
        group_seconds, deadline, rounds: see `Run`.
        note: printed first, for the reader of the figures.

    Raises:
        SystemExit: something that was to be measured is wrong or failed; everything else was measured and written.
    """
    began = time.perf_counter()
    environment = report.environment(device)
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    if note:
        print(note)
    torch.manual_seed(0)
    with progress(steps) as bar:
        run = Run(device, clock_for(device), names, group_seconds, deadline, rounds, bar, environment, skipped=skipped)
        measure(run)
    folder = report.results_folder(output, environment)
    content = {
        "environment": environment,
        **run.facts,
        "note": note,
        "seconds": time.perf_counter() - began,
        "exposed_samples": run.clock.exposed,
        "not_measured": run.skipped,
        "rows": run.rows,
    }
    write_json(folder / f"{stem}.json", content)
    show(run, folder)
    for what, why in run.skipped.items():
        print(f"not measured: {what}: {why}")
    if run.clock.exposed:
        print(f"{run.clock.exposed} samples began before the host had queued all of their launches, which are in them")
    print(f"rows: {folder / stem}.json")
    if run.failed:
        sys.exit("refused to time what is wrong or fails. " + "; ".join(run.failed))
