"""Each pass by itself next to a cold copy of the same bytes: what share of the memory's speed it reaches.

    python bench/passes.py                            llava-7b on a GPU, small on a CPU
    python bench/passes.py --case gate/up --backends triton

A pass is called as a training step without a base calls it, at dropout 0, with float32 parameters and every gradient
of experts and importance vectors; the copy is torch's, and both start with nothing of theirs in the L2 cache. Before
anything is timed, every result of every pass must agree with float64.

Bytes of a pass are its operands and, for triton and cuda, its partial buffers; for torch, operands alone. Where there
is doubt the smaller number is taken, which asks for a faster pass:
- Operands are those of bench/roofline.py, each once: parameters in the compute dtype, although wider ones are read,
  and in route_shrink h of the chosen experts and nothing of the B that w is made of.
- Partial buffers are all that a call allocates and does not return (partial sums, packed weights), written and read,
  so twice; of route_shrink's columns the chosen experts' alone are read.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import report
from accuracy import LIMITS, WrongResult, relative
from peers import OURS
from recorded import RESULTS, RecordedPasses, named_results
from report import Row
from roofline import operand_bytes, partial_bytes
from runs import Run, bench_main, choose_cases, choose_device, free_memory, positive, unavailable
from shapes import PRESETS, SMoLoRACase
from smolora.engine import torch_passes
from smolora.engine.function import mixture_linear
from smolora.engine.ops import BACKENDS
from smolora.spec import Bank, Router, Tokens
from timing import Job
from workload import SCALING, TRAINED, draw_batch, draw_layer


class _Allocations(TorchDispatchMode):
    """The storages that come out of operators, by address; held, so that no address is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for address, tensor in _storages(results).items():
            self.made.setdefault(address, tensor)
        return results


def _storages(tree: Any) -> dict[int, Tensor]:
    """Return the tensors that have memory, one for each address."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.untyped_storage().nbytes()]
    return {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}


def allocated(function: Any, arguments: tuple) -> tuple[tuple, list[Tensor]]:
    """Run a pass; return its results, and the tensors that it allocated besides them."""
    with _Allocations() as allocations:
        results = function(*arguments)
    others = _storages((arguments, results)).keys()
    return results, [tensor for address, tensor in allocations.made.items() if address not in others]


def training_calls(case: SMoLoRACase, device: torch.device) -> dict[str, tuple]:
    """Record the arguments of each pass in a training step's forward and backward."""
    layer = draw_layer(case, device)
    batch = draw_batch(layer, case.batch, case.seq)
    adapter = {name: tensor.float().requires_grad_(name in TRAINED) for name, tensor in layer.adapter.items()}
    x, dy = batch.x.flatten(0, 1).requires_grad_(), batch.dy.flatten(0, 1)
    banks = [
        Bank(adapter[f"{kind}_A"], adapter[f"{kind}_B"], stream, adapter[f"{kind}_importance"])
        for stream, kind in enumerate(("vu", "if"))
    ]
    with RecordedPasses() as recorded:
        mixed = mixture_linear(
            x,
            banks,
            tokens=Tokens(case.batch),
            scaling=SCALING,
            backend="torch",
            mix="smolora",
            routers=[Router(adapter["vu_router"], True), Router(adapter["if_router"], False)],
            top_k=1,
            instruction=batch.instruction,
        )
        torch.autograd.grad(mixed.y, [x, *(adapter[name] for name in TRAINED)], dy)
    return {name: recorded.arguments[name] for name in RESULTS}


def in_float64(name: str, arguments: tuple) -> dict[str, Tensor]:
    """Run a pass on the same arguments in float64; return its results by name."""
    double = {dtype: torch.float64 for dtype in (torch.float32, torch.float16, torch.bfloat16)}

    def widen(argument: Any) -> Any:
        if isinstance(argument, list):
            return [widen(each) for each in argument]
        if isinstance(argument, Tensor):
            return argument.to(double.get(argument.dtype, argument.dtype))
        return double.get(argument, argument)

    return named_results(name, getattr(torch_passes, name)(*map(widen, arguments)))


def check_pass(what: str, results: dict[str, Tensor], expected: dict[str, Tensor], dtype: str) -> float:
    """Return the largest relative error of a pass's results.

    Raises:
        WrongResult: one is over its limit, or of another shape; whole numbers must be equal.
    """
    worst = 0.0
    for label, exact in expected.items():
        actual = results[label]
        if actual.shape != exact.shape:
            raise WrongResult(f"{what}: {label} is {tuple(actual.shape)}, not {tuple(exact.shape)}")
        if exact.is_floating_point():
            error, limit = relative(actual, exact), LIMITS[dtype]["grads" if label.startswith("d") else "y"]
        else:
            error, limit = (0.0 if torch.equal(actual, exact) else math.inf), 0.0
        if not error <= limit:
            raise WrongResult(f"{what}: relative error of {label} against float64 is {error:.2e}, over {limit:.0e}")
        worst = max(worst, error)
    return worst


def measure_case(run: Run, case: SMoLoRACase) -> None:
    """Measure every pass and backend on one shape."""
    if run.out_of_time(case.name):
        return
    calls = training_calls(case, run.device)
    rows, jobs = {}, []
    for name, arguments in calls.items():
        expected = in_float64(name, arguments)
        for backend in run.names:
            what = f"{name} of {backend}, {case.name}"
            run.set_status(f"checking {what}")
            try:
                function = getattr(BACKENDS[backend](), name)
                results, buffers = allocated(function, arguments)
                worst = check_pass(what, named_results(name, results), expected, case.dtype)
            except Exception as error:  # a kernel that does not compile raises anything: the others are measured
                run.record_failure(what, error)
                continue
            partial = None if backend == "torch" else partial_bytes(case, name, buffers)
            rows[name, backend] = {
                "case": case.name,
                "pass": name,
                "backend": backend,
                "shape": asdict(case),
                "tokens": case.tokens,
                "dtype": case.dtype,
                "weights_dtype": "float32",
                "bytes": operand_bytes(case, name) + (partial or 0),
                "partial_bytes": partial,
                "error": worst,
                **run.environment,
            }
            jobs.append(Job(f"{name} {backend}", (lambda _, f=function, a=arguments: f(*a),)))
            del results, buffers
        del expected
    if not rows:
        return
    size = max(row["bytes"] for row in rows.values()) // 2
    source, target = (torch.randint(256, (size,), dtype=torch.uint8, device=run.device) for _ in range(2))
    for (name, backend), row in rows.items():
        a, b = source[: row["bytes"] // 2], target[: row["bytes"] // 2]
        jobs.append(Job(f"{name} {backend} copy", (lambda _, a=a, b=b: b.copy_(a),)))
    timings = {job: stages[-1] for job, stages in run.time(f"{case.name}: timing", jobs).items()}
    for (name, backend), row in rows.items():
        own, copy = timings[f"{name} {backend}"], timings[f"{name} {backend} copy"]
        run.rows.append(row | {"ms": own.summary(), "copy_ms": copy.summary(), "share": copy.over(own)})


def table(rows: list[Row]) -> str:
    """Format a line a pass and backend; times in ms, median (20th-80th percentile)."""
    lines = [f"{'pass':<14}{'backend':<9}{'MB':>9}{'partial':>9}{'ms':>27}{'copy ms':>27}{'share':>8}{'error':>9}"]
    for row in rows:
        partial = "-" if row["partial_bytes"] is None else f"{row['partial_bytes'] / 1e6:.1f}"
        lines.append(
            f"{row['pass']:<14}{row['backend']:<9}{row['bytes'] / 1e6:>9.1f}{partial:>9}{report.spread(row['ms']):>27}"
            f"{report.spread(row['copy_ms']):>27}{row['share']:>8.1%}{row['error']:>9.1e}"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="shapes to measure (default: llava-7b on a GPU, else small)")
    parser.add_argument("--case", action="append", help="only this shape of the preset, e.g. 'gate/up'; repeatable")
    parser.add_argument("--backends", default=",".join(OURS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, help="repeats, instead of as many as the time budget allows")
    parser.add_argument("--time-budget", type=float, default=60.0, help="seconds for the run (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", type=Path, help="folder of the results (default: bench/results/<device>)")
    args = parser.parse_args(argv)
    args.backends = list(dict.fromkeys(args.backends.split(",")))
    unknown = set(args.backends) - set(OURS)
    if unknown:
        parser.error(f"--backends: {', '.join(sorted(unknown))} unknown; known: {', '.join(OURS)}")
    return args


def main(argv: list[str] | None = None) -> None:
    began = time.perf_counter()
    args = parse(argv)
    device = choose_device(args.device)
    preset = args.preset or ("llava-7b" if device.type == "cuda" else "small")
    cases, note = choose_cases(preset, args.case, {"dropout": 0.0}, device)
    skipped = {name: why for name in args.backends if (why := unavailable(name, device, cases[0].dtype))}

    def measure(run: Run) -> None:
        for case in cases:
            measure_case(run, case)
            free_memory(device)

    def show(run: Run, folder: Path) -> None:
        for case in cases:
            if rows := [row for row in run.rows if row["case"] == case.name]:
                print(f"\n{case.describe()}\n{table(rows)}")
        print(
            "\nMB: bytes counted, 'partial' those of buffers that are no result; share: time of their copy / own time"
        )

    bench_main(
        measure,
        show,
        stem=f"passes_{preset}",
        output=args.output,
        device=device,
        names=[name for name in args.backends if name not in skipped],
        skipped=skipped,
        steps=len(cases),
        group_seconds=args.time_budget / (2 * len(cases)),  # the rest: references, checks and compilation
        deadline=began + args.time_budget,
        rounds=args.rounds,
        note=note,
    )


if __name__ == "__main__":
    main()
