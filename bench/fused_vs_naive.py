"""A drop-in layer beside what one would otherwise use: correctness first, then time and memory, all in one run.

    python bench/fused_vs_naive.py --quick                    the CPU's shape, two minutes
    python bench/fused_vs_naive.py --preset llava-7b          a LLaVA-1.5-7B's shapes, on a GPU
    python bench/fused_vs_naive.py --d 2048 --k 8192 --r 32 --batch 4 --seq 512 --dtype float16
    python bench/fused_vs_naive.py --method moelora --experts 8

Peers: linear (the frozen base alone), official (the released algorithm), gathered (chosen experts only),
compiled_gathered and compiled_rank_space (torch.compile), peft_lora (rank 2r, adapter in the compute dtype; _fp32:
PEFT's default), and smolora under its backends torch, triton and cuda. "overhead": time minus linear's, paired within
each round.
--method measures another method in the same way: linear, official, peft_lora of its active rank, and its own layer;
bench/methods.py says what official is of each, and what a batch is.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

import methods
import report
import roofline
from accuracy import Errors, WrongResult, check, check_step, expect, forward_backward
from peers import PEERS, Peer
from report import MODES, Row
from roofline import MachinePeaks
from runs import Run, bench_main, choose_cases, choose_device, free_memory, positive, unavailable
from shapes import ITEM_BYTES, METHODS, PRESETS, MixtureCase, Shape, SMoLoRACase
from timing import Job, Timing, capture, kept_for_backward, measure_peaks, peak
from workload import Batch, Layer, draw_batch, draw_layer

LAYER_GROUPS = 4
CHANGES = ("d", "k", "r", "batch", "seq", "dtype", "dropout")  # flags that replace what a preset has
NUMBERS = ("vu", "if_", "experts", "tasks", "active")  # flags that only some methods have
KINDS: dict[str, type[Layer]] = {"smolora": Layer, **methods.LAYERS}
SWEEP = (1 / 16, 1 / 4, 1, 2)  # of the case's sequence length


def checked(run: Run, case: Shape, peers: dict[str, Peer], batch: Batch) -> dict[str, Errors]:
    """Return the errors of every peer; drop from `peers`, with the reason, what is wrong, fails or lacks memory."""
    layer = next(iter(peers.values())).layer
    expected = {}
    errors = {}
    for name, peer in list(peers.items()):
        run.set_status(f"{case.name}, {batch.x.shape[0] * batch.x.shape[1]} tokens: checking {name}")
        if peer.formula not in expected:
            expected[peer.formula] = expect(peer.formula, layer, batch)
        try:
            errors[name] = check(name, peer, batch, expected[peer.formula])
        except Exception as error:  # a kernel that does not compile raises anything: the others are measured
            del peers[name]
            run.record_failure(f"{name} ({case.name}, T {batch.x.shape[0] * batch.x.shape[1]})", error)
    gc.collect()
    return errors


def layer_jobs(peers: dict[str, Peer], batch: Batch) -> list[Job]:
    """Make a job for each peer: a training forward, then its backward."""

    def job(name: str, peer: Peer) -> Job:
        live = replace(batch, x=batch.x.detach().requires_grad_())

        def forward(_: None) -> torch.Tensor:
            with peer.scope():
                return peer(live)

        def backward(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(y, [live.x, *peer.leaves.values()], batch.dy)

        return Job(name, (forward, backward))

    return [job(name, peer) for name, peer in peers.items()]


def row_head(run: Run, case: Shape, name: str, peer: Peer, batch: Batch, kind: str) -> Row:
    instances, seq = batch.x.shape[:2]
    return {
        "kind": kind,
        "method": case.method,
        "case": case.name,
        "peer": name,
        "tokens": instances * seq,
        "shape": {**asdict(replace(case, batch=instances, seq=seq))},
        "dtype": case.dtype,
        "weights_dtype": peer.weights_dtype,
        **run.environment,
    }


def measure_layer(run: Run, peaks: MachinePeaks, case: Shape, layer: Layer, peers: dict[str, Peer]) -> None:
    """Measure forward, backward and both; memory; and compare with `linear` and with the floor."""
    batch = draw_batch(layer, case.batch, case.seq)
    errors = checked(run, case, peers, batch)
    timings = run.time(f"{case.name}: timing", layer_jobs(peers, batch), LAYER_GROUPS, min_rounds=5)
    times = {mode: {name: timings[name][i] for name in peers} for i, mode in enumerate(MODES)}

    def over_linear(name: str, mode: str) -> float | None:
        return times[mode][name].over(times[mode]["linear"]) if "linear" in peers else None

    def overhead(name: str, mode: str) -> Timing | None:
        if name == "linear" or not {name, "linear"} <= peers.keys():
            return None
        return times[mode][name].minus(times[mode]["linear"])

    def official_over(name: str, mode: str) -> float | None:
        mine, theirs = overhead(name, mode), overhead("official", mode)
        return theirs.median / mine.median if theirs and mine and mine.median > 0 else None

    floors = {mode: seconds * 1e3 for mode, seconds in roofline.layer_seconds(case, peaks).items()}
    gemm = roofline.base(case)["base forward"].seconds(peaks) * 1e3
    given = [value for value in batch.call.values() if isinstance(value, torch.Tensor)]
    for name, peer in peers.items():
        live = replace(batch, x=batch.x.detach().requires_grad_())
        with peer.scope():
            kept = kept_for_backward(lambda: peer(live), [*peer.parameters(), *given])  # noqa: B023
        floor = {
            "method": floors,
            "linear": {mode: gemm * (2 if mode == "both" else 1) for mode in MODES},
            "lora": dict.fromkeys(MODES),
        }[peer.formula]
        run.rows.append(
            row_head(run, case, name, peer, batch, "layer")
            | {mode: times[mode][name].summary() for mode in MODES}
            | {
                "times_linear": {mode: over_linear(name, mode) for mode in MODES},
                "own_ms": {mode: (own := overhead(name, mode)) and own.summary() for mode in MODES},
                "official_own_over_own": {mode: official_over(name, mode) for mode in MODES},
                "floor_ms": floor,
                "of_floor": {mode: floor[mode] and floor[mode] / times[mode][name].median for mode in MODES},
                "kept_bytes": kept,
                "peak_bytes": peak(lambda: forward_backward(peer, batch), run.device),  # noqa: B023
                "error": asdict(errors[name]),
            }
        )


def measure_decode(run: Run, case: Shape, layer: Layer, peers: dict[str, Peer], sequences: int) -> None:
    """Measure one new token of each sequence, without autograd; on a GPU the replay of a captured graph."""
    batch = draw_batch(layer, sequences, 1)
    expected: dict[str, torch.Tensor] = {}
    jobs, errors = [], {}
    with torch.no_grad():
        for name, peer in peers.items():
            run.set_status(f"{case.name}, decoding {sequences}: checking {name}")
            peer.train(False)
            if peer.formula not in expected:
                with torch.enable_grad():
                    expected[peer.formula] = expect(peer.formula, layer, batch).y

            def step(peer: Peer = peer) -> torch.Tensor:
                with peer.scope():
                    return peer.step(batch)

            if run.device.type == "cuda":
                try:
                    replay, y = capture(step)
                except RuntimeError as error:
                    run.skipped[f"{name} (decode)"] = f"cannot be captured: {str(error).splitlines()[0]}"
                    torch.cuda.synchronize(run.device)
                    continue
                y.fill_(float("nan"))
                replay()
            else:
                replay, y = step, step()
            try:
                errors[name] = check_step(name, peer, y, expected[peer.formula])
            except WrongResult as error:
                run.record_failure(f"{name} ({case.name}, decode)", error)
                continue
            jobs.append(Job(name, (lambda _, replay=replay: replay(),)))
        timings = run.time(f"{case.name}: decoding {sequences}", jobs)
        times = {name: total for name, (_, total) in timings.items()}
    for name in times:
        peers[name].train(True)
        run.rows.append(
            row_head(run, case, name, peers[name], batch, "decode")
            | {
                "step": times[name].summary(),
                "graph": run.device.type == "cuda",
                "times_linear": times[name].over(times["linear"]) if "linear" in times else None,
                "error": asdict(errors[name]),
            }
        )


def measure_sweep(run: Run, case: Shape, layer: Layer, peers: dict[str, Peer], factors: tuple[float, ...]) -> None:
    """Measure forward + backward over token counts; the case's own count was measured before."""
    for seq in sorted({max(1, round(case.seq * factor)) for factor in factors}):
        tokens = case.batch * seq
        if seq == case.seq:
            for row in [row for row in run.rows if row["kind"] == "layer" and row["case"] == case.name]:
                head = ("method", "case", "peer", "tokens", "shape", "dtype", "weights_dtype")
                keys = (*head, *run.environment, "both", "error")
                run.rows.append({"kind": "sweep"} | {key: row[key] for key in keys})
        elif not run.out_of_time(f"sweep, {tokens} tokens"):
            batch = draw_batch(layer, case.batch, seq)
            here = dict(peers)
            errors = checked(run, case, here, batch)
            timings = run.time(f"{case.name}: {tokens} tokens", layer_jobs(here, batch))
            for name, peer in here.items():
                head = row_head(run, case, name, peer, batch, "sweep")
                run.rows.append(head | {"both": timings[name][-1].summary(), "error": asdict(errors[name])})


def measure_case(run: Run, peaks: MachinePeaks, case: Shape, decode: list[int], sweep: tuple[float, ...]) -> None:
    """Measure everything about one shape."""
    if run.out_of_time(case.name):
        return
    torch.compiler.reset()
    layer = draw_layer(case, run.device, kind=KINDS[case.method])
    peers = {name: known_peers(case.method)[name](layer) for name in run.names}
    measure_layer(run, peaks, case, layer, peers)
    for sequences in decode:
        if not run.out_of_time(f"{case.name}, decoding {sequences}"):
            measure_decode(run, case, layer, peers, sequences)
    if sweep:
        measure_sweep(run, case, layer, peers, sweep)
    del layer, peers
    free_memory(run.device)


def known_peers(method: str) -> dict[str, Callable[[Layer], Peer]]:
    """Return the peers of a method, its own layer among them."""
    return PEERS if method == "smolora" else methods.PEERS


def choose_peers(args: argparse.Namespace, device: torch.device, case: Shape) -> tuple[list[str], dict[str, str]]:
    """Return the names of the peers to measure, and why others are not."""
    known = known_peers(args.method)
    if args.peers:
        groups = {"compiled"} if args.method == "smolora" else set()
        wanted = [
            name for asked in args.peers.split(",") for name in known if asked == name or asked == name.split("_")[0]
        ]
        unknown = set(args.peers.split(",")) - set(known) - groups
        if unknown:
            sys.exit(f"--peers: {', '.join(sorted(unknown))} unknown; known: {', '.join([*groups, *known])}")
    else:
        wanted = list(known)
    skipped = {}
    if args.quick and not args.peers:
        for name in [name for name in wanted if name.startswith("compiled")]:
            skipped[name] = "left out by --quick: compiling takes longer than all the rest"
    for name in wanted:
        reason = unavailable(name, device, case.dtype)
        if name == "cuda" and isinstance(case, MixtureCase):
            reason = methods.cuda_refuses(case) or reason
        if name not in skipped and reason:
            skipped[name] = reason
    return [name for name in dict.fromkeys(wanted) if name not in skipped], skipped


def print_results(run: Run, cases: list[Shape]) -> None:
    """Print the tables, shape by shape."""
    for case in cases:
        rows = [row for row in run.rows if row["case"] == case.name]
        layers = [row for row in rows if row["kind"] == "layer"]
        decoded = [row for row in rows if row["kind"] == "decode"]
        if layers:
            print(f"\n{case.describe()}\n{report.layer_table(layers)}")
        if decoded:
            how = "replay of a captured graph" if run.device.type == "cuda" else "no graph"
            print(f"\n{case.name}, S = 1 ({how}; x: speed against linear)\n{report.decode_table(decoded)}")
    blocks = [row for row in run.rows if row["kind"] == "layer" and row["shape"]["ffn"]]
    if len({row["case"] for row in blocks}) > 1:
        print(f"\n{report.sum_table('FFN block: gate + up + down', blocks)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="smolora", help="default: %(default)s")
    parser.add_argument("--preset", choices=PRESETS, help="shapes to measure (default: small)")
    parser.add_argument("--case", action="append", help="only this shape of the preset, e.g. 'gate/up'; repeatable")
    parser.add_argument("--quick", action="store_true", help="the preset small, without torch.compile, in two minutes")
    for flag, what in {
        "d": "inputs",
        "k": "outputs",
        "r": "rank of an expert",
        "vu": "VU experts of smolora",
        "experts": "experts, or branches, of another method",
        "active": "experts that a sequence uses, of branchlora and routedlora",
        "tasks": "tasks of branchlora and lilora",
        "batch": "instances",
        "seq": "tokens of an instance",
    }.items():
        parser.add_argument(f"--{flag}", type=positive, help=what)
    parser.add_argument("--if", dest="if_", type=positive, help="IF experts of smolora")
    parser.add_argument("--dtype", choices=ITEM_BYTES)
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--peers", help="comma-separated; 'compiled' means both compiled peers")
    parser.add_argument("--decode", help="comma-separated numbers of sequences for the decode shape, or 'none'")
    parser.add_argument("--no-sweep", action="store_true", help="no sweep over token counts")
    parser.add_argument("--rounds", type=positive, help="repeats, instead of as many as the time budget allows")
    parser.add_argument("--time-budget", type=float, help="seconds for the run; what does not fit is named")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", type=Path, help="folder of the results (default: bench/results/<device>)")
    args = parser.parse_args(argv)
    if args.quick and args.preset not in (None, "small"):
        parser.error(f"--quick measures the preset small, not {args.preset}")
    for name in NUMBERS:
        if getattr(args, name) is not None and name not in METHODS[args.method]:
            parser.error(f"--{name.strip('_')} means nothing to --method {args.method}")
    args.numbers = {name: getattr(args, name) or default for name, default in METHODS[args.method].items()}
    if args.numbers.get("active", 0) > args.numbers.get("experts", 0):
        parser.error(f"--active must be at most --experts, {args.numbers['experts']}, got {args.numbers['active']}")
    return args


def of_method(case: SMoLoRACase, method: str, numbers: dict[str, int]) -> SMoLoRACase | MixtureCase:
    """Return a preset's shape for a method, with its numbers of experts and the like."""
    if method == "smolora":
        return replace(case, **numbers)
    common = {field.name: getattr(case, field.name) for field in fields(Shape)}
    return MixtureCase(**common, method=method, **numbers)


def main(argv: list[str] | None = None) -> None:
    began = time.perf_counter()
    args = parse(argv)
    device = choose_device(args.device)
    changes = {name: value for name in CHANGES if (value := getattr(args, name)) is not None}
    cases, note = choose_cases(args.preset or "small", args.case, changes, device)
    cases = [of_method(case, args.method, args.numbers) for case in cases]
    names, skipped = choose_peers(args, device, cases[0])
    if args.decode == "none":
        decode = []
    else:
        default = "1,8,64" if device.type == "cuda" else "1"
        decode = [int(n) for n in (args.decode or default).split(",")]
    sweep = () if args.no_sweep else SWEEP
    budget = args.time_budget or (90.0 if args.quick else 330.0)
    groups = len(cases) * (LAYER_GROUPS + len(decode)) + max(len(sweep) - 1, 0)
    stem = args.preset or ("small" if cases[0].name == "small" else "custom")
    if args.method != "smolora":
        stem = f"{args.method}_{stem}"

    def measure(run: Run) -> None:
        run.set_status("peaks of this machine")
        peaks = measure_peaks(device, getattr(torch, cases[0].dtype), run.clock, run.group_seconds / 2)
        run.facts["ceilings"] = {"bandwidth": peaks.bandwidth, "rate": peaks.rate}
        for case in cases:
            measure_case(run, peaks, case, decode, sweep if case is cases[0] else ())

    def show(run: Run, folder: Path) -> None:
        print_results(run, cases)
        peaks = MachinePeaks("measured", **run.facts["ceilings"])
        print(
            f"this machine: copy {peaks.bandwidth / 1e9:.1f} GB/s, "
            f"{cases[0].dtype} product {peaks.rate / 1e12:.2f} TFLOP/s; 'of floor' is the time that these two allow "
            "for the counted bytes and operations, over the time measured"
        )
        swept = [row for row in run.rows if row["kind"] == "sweep"]
        if swept:
            report.plot(folder / f"{stem}.png", swept, f"{run.environment['device']}, {cases[0].describe()}")

    bench_main(
        measure,
        show,
        stem=stem,
        output=args.output,
        device=device,
        names=names,
        skipped=skipped,
        steps=groups,
        group_seconds=budget / (3 * groups),  # the rest: references, checks, warm-up and compilation
        deadline=began + budget,
        rounds=args.rounds,
        note=note,
    )


if __name__ == "__main__":
    main()
