"""What computed routers cost: a training step and a decode step of a whole LLaVA, against random routers.

    python bench/routers.py                        the CPU's model
    python bench/routers.py --preset llava-7b      a LLaVA-1.5-7B's shapes with random weights, on a GPU

Peers are kinds of routers: random (the paper), prototype and ridge, the latter two with importance vectors of each
expert, fitted on as many tasks as there are experts. A training step is forward, backward and AdamW's update; with
computed routers it is told the task, as the trainer does. A decode step keeps the routes of its prompt; on a GPU it is
the replay of a captured graph. The routers work once a prompt, which is not timed here. Before anything is timed, the
logits and gradients of each peer must be the released algorithm's in float32 on a small model: with computed routers,
those of the released algorithm with the task's experts alone.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import report
import smolora
from accuracy import WrongResult
from decode_step import Decoder, Text
from report import Row
from runs import Run, bench_main, busy_note, free_memory
from timing import Job, Timing, capture
from train_step import AGREEMENT, TrainedModel, fused, make_batch, released, without_embeds
from whole_model import PRESETS, ModelShape, chosen_peers, device_for, flags, make_base, targets, with_smolora
from workload import TRAINED

ROUTERS = ("random", "prototype", "ridge")
PROMPT = 128  # tokens before the decode step
SEQUENCES = 8


def with_routers(kind: str, shape: ModelShape, base: nn.Module, batch: dict[str, Tensor]) -> tuple[nn.Module, int]:
    """Put SMoLoRA with computed routers on the base, and return it with the task that it trains, its last.

    The routers are fitted on a batch for each expert: the same pictures and text, and instructions of the task's own.
    """
    model = with_smolora(shape, base, vu_router_kind=kind, if_router_kind=kind, importance="expert")
    for task in range(shape.experts):
        own = torch.zeros_like(batch["instruction_embeds"])
        own[:, task] = 1.0
        smolora.fit_routers(model, [{**batch, "instruction_embeds": own}], task)
    return model, shape.experts - 1


def trained(kind: str, shape: ModelShape, base: nn.Module, batch: dict[str, Tensor]) -> TrainedModel:
    """Return the peer whose routers are of a kind, and its batch."""
    if kind == "random":
        return fused(shape, base, batch)
    model, task = with_routers(kind, shape, base, batch)
    task_ids = torch.full((shape.batch,), task, device=batch["input_ids"].device)
    return TrainedModel(model, {**batch, "task_ids": task_ids})


# ---- is it right?


def check(kind: str, device: torch.device) -> float:
    """Return the largest relative error of a peer's logits and gradients in float32 on a small model.

    Raises:
        WrongResult: it is over AGREEMENT.
    """
    shape = PRESETS["check"]
    base, batch = make_base(shape, device), make_batch(shape, device)
    ours, theirs = trained(kind, shape, base, batch), released(shape, base, batch)
    chosen = slice(None) if kind == "random" else slice(shape.experts - 1, shape.experts)
    for name in targets(base):
        keep_experts(theirs.module.get_submodule(name).adapter, chosen)
    with torch.no_grad():
        plain = base(**without_embeds(batch)).logits
    logits = [model.module(**model.batch).logits for model in (ours, theirs)]
    errors = [((logits[0] - logits[1]).norm() / (logits[1] - plain).norm()).item()]
    for model in (ours, theirs):
        model.forward().backward()
    for name in targets(base):
        experts = ours.module.get_submodule(f"base_model.model.{name}").smolora_experts["default"]
        adapter = theirs.module.get_submodule(name).adapter
        for weight in TRAINED:
            mine, right = getattr(experts, weight).grad[chosen], adapter[weight].grad
            errors.append(((mine - right).norm() / right.norm().clamp_min(1e-12)).item())
    if not max(errors) <= AGREEMENT:
        raise WrongResult(f"{kind} is {max(errors):.1e} from the released algorithm in float32")
    return max(errors)


def keep_experts(adapter: nn.ParameterDict, chosen: slice) -> None:
    """Leave these experts of each branch; where it is one, the released algorithm chooses it for every sample."""
    for name, values in adapter.items():
        if not name.endswith("importance"):
            adapter[name] = nn.Parameter(values[chosen].detach().clone(), values.requires_grad)


# ---- measuring


def measure(run: Run, shape: ModelShape) -> None:
    """Measure a row for each peer."""
    errors: dict[str, float] = {}
    for kind in run.names:
        run.set_status(f"checking {kind}")
        try:
            errors[kind] = check(kind, run.device)
        except Exception as error:  # a kernel that does not compile raises anything: the others are measured
            run.record_failure(kind, error)
    base = make_base(shape, run.device)
    steps = {"train": train_jobs(run, shape, base, list(errors))}
    free_memory(run.device)
    steps["decode"] = decode_jobs(run, shape, base, list(errors))
    for kind in errors:
        for step, timings in steps.items():
            run.rows.append(
                {
                    "peer": kind,
                    "step": step,
                    "shape": asdict(shape),
                    "sequences": shape.batch if step == "train" else SEQUENCES,
                    "step_ms": timings[kind].summary(),
                    "of_random": timings[kind].over(timings["random"]) if "random" in timings else None,
                    "error_small": errors[kind],
                    **run.environment,
                }
            )


def train_jobs(run: Run, shape: ModelShape, base: nn.Module, kinds: list[str]) -> dict[str, Timing]:
    """Time training steps."""
    batch = make_batch(shape, run.device)
    jobs = []
    for kind in kinds:
        model = trained(kind, shape, base.train(), batch)
        model.module.train()
        model.step()  # makes the optimiser's state
        jobs.append(Job(kind, (lambda _, model=model: model.step(),)))
    return {name: timings[-1] for name, timings in run.time("training: timing", jobs, min_rounds=5).items()}


@torch.no_grad()
def decode_jobs(run: Run, shape: ModelShape, base: nn.Module, kinds: list[str]) -> dict[str, Timing]:
    """Time decode steps."""
    shape = replace(shape, dropout=0.0)
    batch, text = make_batch(shape, run.device), Text.draw(shape, SEQUENCES, PROMPT, run.device)
    jobs = []
    for kind in kinds:
        model: Any = with_smolora(shape, base) if kind == "random" else with_routers(kind, shape, base, batch)[0]
        decoder = Decoder(model, text)
        step = decoder.step if run.device.type == "cpu" else capture(decoder.step)[0]
        jobs.append(Job(kind, (lambda _, d=decoder: d.rewind(), lambda _, step=step: step())))
    return {name: timings[1] for name, timings in run.time("decoding: timing", jobs, min_rounds=5).items()}


def table(rows: list[Row]) -> str:
    """Format a line a peer and step; times in ms, median (20th-80th percentile)."""
    lines = [f"{'step':<9}{'routers':<12}{'ms':>27}{'of random':>11}{'error':>10}"]
    for row in sorted(rows, key=lambda row: row["step"] == "decode"):
        ratio = "-" if row["of_random"] is None else f"{row['of_random']:.3f}"
        spread = report.spread(row["step_ms"])
        lines.append(f"{row['step']:<9}{row['peer']:<12}{spread:>27}{ratio:>11}{row['error_small']:>10.0e}")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = flags(__doc__, "model and batch", ROUTERS, 60.0)
    args = parser.parse_args(argv)
    args.peers = chosen_peers(parser, args.peers, ROUTERS)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    shape = PRESETS[args.preset]
    device = device_for(args.device, shape)

    def show(run: Run, folder: Path) -> None:
        print(f"\n{shape.name}: training {shape.batch} x {shape.tokens} tokens, one token of {SEQUENCES} sequences")
        print(table(run.rows))

    bench_main(
        partial(measure, shape=shape),
        show,
        stem=f"routers_{shape.name}",
        output=args.output,
        device=device,
        names=args.peers,
        skipped={},
        steps=2,
        group_seconds=args.seconds / 2,
        note=busy_note(device),
    )


if __name__ == "__main__":
    main()
