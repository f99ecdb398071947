"""Measuring: interleaved repeats, a clock for each kind of device, memory, and the peaks of the machine."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from roofline import MachinePeaks

WARM_UP = 1  # untimed runs of every job; the check before has compiled what there is to compile
MAX_ROUNDS = 200
SLEEP = 5_000_000  # cycles of a GPU, 3 ms: longer than the host takes to queue a layer's forward and backward


@dataclass(frozen=True)
class Timing:
    """Milliseconds, one sample a round."""

    samples: tuple[float, ...]

    def summary(self) -> dict[str, float]:
        """Return median, 20th and 80th percentile, and the number of rounds."""
        ordered = sorted(self.samples)
        last = len(ordered) - 1
        return {
            "median": statistics.median(ordered),
            "p20": ordered[round(0.2 * last)],
            "p80": ordered[round(0.8 * last)],
            "rounds": len(ordered),
        }

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def minus(self, other: Timing) -> Timing:
        """Return the difference within each round: what slows a whole round down cancels."""
        return Timing(tuple(a - b for a, b in zip(self.samples, other.samples, strict=True)))

    def over(self, other: Timing) -> float:
        """Return the median of the ratios within each round."""
        return statistics.median(a / b for a, b in zip(self.samples, other.samples, strict=True))


@dataclass(frozen=True)
class Job:
    """Stages that are timed each and hand on what they return: a forward, then its backward."""

    name: str
    stages: tuple[Callable[[Any], Any], ...]


class CpuClock:
    """Wall time of a job's second run in a row. Nothing is evicted: activations outgrow a core's cache anyway.

    The first run settles the allocator. Without it a job pays for the one before: glibc gives what that one freed back
    to the system in the middle of this one, up to 28 ms of system time a layer without a single page fault of its own.
    """

    exposed = 0

    def sample(self, job: Job) -> list[float]:
        self._run(job)
        return self._run(job)

    @staticmethod
    def _run(job: Job) -> list[float]:
        state = None
        marks = [time.perf_counter()]
        for stage in job.stages:
            state = stage(state)
            marks.append(time.perf_counter())
        return marks

    def milliseconds(self, start: float, end: float) -> float:
        return (end - start) * 1e3

    def wait(self) -> None:
        """Do nothing: a CPU is done when its call returns."""


class CudaClock:
    """Device events around the stages, with an L2 cache that holds nothing of theirs when the first one starts.

    `exposed` counts the samples that began before the host had queued all of them, so that its launches are in them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.evict = torch.zeros(3 * max(l2, 32 << 20) // 4, dtype=torch.int32, device=device)
        self.exposed = 0

    def sample(self, job: Job) -> list[torch.cuda.Event]:
        state = None
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(job.stages) + 1)]
        self.evict.sum()  # reads: written lines would have to leave the cache at the cost of what is timed
        torch.cuda._sleep(SLEEP)  # the host queues what follows meanwhile, or its launches would be timed
        marks[0].record()
        for stage, mark in zip(job.stages, marks[1:], strict=True):
            state = stage(state)
            mark.record()
        self.exposed += marks[0].query()
        return marks

    def milliseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end)

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)


Clock = CpuClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def interleave(
    jobs: list[Job],
    clock: Clock,
    seconds: float,
    *,
    min_rounds: int = 5,
    rounds: int | None = None,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, list[Timing]]:
    """Time every job once a round, in an order that changes from round to round: drift and neighbours hit all alike.

    Args:
        jobs: what to time, each with the same number of stages.
        clock: of the device.
        seconds: aim for this long in all, but do at least `min_rounds`.
        rounds: this many instead.
        on_round: called with the number of rounds done.

    Returns:
        Per job a `Timing` of each stage, and last one of them all together.
    """
    for job in jobs:
        for _ in range(WARM_UP):
            clock.sample(job)
    clock.wait()
    order = random.Random(0)
    marks: dict[str, list[list]] = {job.name: [] for job in jobs}
    start, done, enough = time.perf_counter(), 0, False
    while not enough:
        for job in order.sample(jobs, len(jobs)):
            marks[job.name].append(clock.sample(job))
        clock.wait()
        done += 1
        on_round(done)
        spent = time.perf_counter() - start
        out_of_time = done >= min_rounds and spent * (done + 1) / done > seconds
        enough = done >= (rounds or MAX_ROUNDS) or (rounds is None and out_of_time)

    def timings(samples: list[list]) -> list[Timing]:
        last = len(samples[0]) - 1
        spans = [(i, i + 1) for i in range(last)] + [(0, last)]
        return [Timing(tuple(clock.milliseconds(taken[i], taken[j]) for taken in samples)) for i, j in spans]

    return {name: timings(samples) for name, samples in marks.items()}


def kept_for_backward(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Return the bytes that `forward` saves for backward: unique storages, without those of `parameters`."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()  # held until the sum is taken, so that no address is used twice
    total = sum(kept.values())
    del y
    return total


def peak(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak of memory that `run` allocates, in bytes; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture `step` in a CUDA graph; return its replay, and the tensor that every replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compilation and lazy handles stay out of the capture
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    return graph.replay, y


def measure_peaks(device: torch.device, dtype: torch.dtype, clock: Clock, seconds: float) -> MachinePeaks:
    """Measure the machine's peaks with torch's own copy and matrix product on random data."""
    cuda = device.type == "cuda"
    elements = (1 << 29 if cuda else 1 << 26) // dtype.itemsize
    m, n, k = (8192, 11008, 4096) if cuda else (1024, 2752, 1024)
    source, target = torch.randn(elements, device=device).to(dtype), torch.empty(elements, device=device, dtype=dtype)
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    c = torch.empty(m, n, device=device, dtype=dtype)
    jobs = [
        Job("copy", (lambda _: target.copy_(source),)),
        Job("product", (lambda _: torch.mm(a, b.T, out=c),)),
    ]
    measured = {name: timings[-1].median * 1e-3 for name, timings in interleave(jobs, clock, seconds).items()}
    return MachinePeaks(
        "measured", 2 * elements * dtype.itemsize / measured["copy"], 2 * m * n * k / measured["product"]
    )
