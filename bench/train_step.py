"""A training step of a whole LLaVA: tokens a second and memory, with and without activation checkpointing.

    python bench/train_step.py                        the CPU's model, two minutes on two quiet cores
    python bench/train_step.py --preset llava-7b      a LLaVA-1.5-7B's shapes with random weights, on a GPU

A step is forward, backward and AdamW's update. Peers: none (the frozen model; gradients reach the projector's output,
as they must with any adapter in the projector), peft_lora (PEFT's LoRA of rank 2r, its weights in the compute dtype;
_fp32: PEFT's default), official (the released algorithm) and smolora, this package's PEFT tuner. All adapt the FFN's
and the projector's linear layers and share one frozen base. Before anything is timed, smolora and official must agree
on a small float32 model on the same device, logits and gradients.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

import report
from report import Row
from runs import Run, bench_main, busy_note, free_memory
from timing import Job, kept_for_backward, peak
from whole_model import (
    PRESETS,
    ModelShape,
    chosen_peers,
    device_for,
    flags,
    make_base,
    shared_copy,
    targets,
    with_lora,
    with_official,
    with_smolora,
)
from workload import INSTRUCTION_DIM, TRAINED

MIB, GIB = 2**20, 2**30
AGREEMENT = 1e-3  # of smolora and official in float32, relative to what the adapter changes


def make_batch(shape: ModelShape, device: torch.device) -> dict[str, Tensor]:
    """Draw inputs of a forward with a loss on the last quarter of the text, and embeddings of instructions."""
    generator = torch.Generator(device).manual_seed(1)

    def tokens(count: int) -> Tensor:
        size = (shape.batch, count)
        return torch.randint(3, shape.vocabulary - 1, size, generator=generator, device=device)

    image = torch.full((shape.batch, shape.image_tokens), shape.vocabulary - 1, device=device)
    ids = torch.cat([tokens(shape.text // 4), image, tokens(shape.text - shape.text // 4)], 1)
    labels = ids.clone()
    labels[:, : -max(1, shape.text // 4)] = -100
    size = (shape.batch, 3, shape.image, shape.image)
    return {
        "input_ids": ids,
        "labels": labels,
        "pixel_values": torch.randn(size, generator=generator, device=device).to(getattr(torch, shape.dtype)),
        "instruction_embeds": torch.randn(shape.batch, INSTRUCTION_DIM, generator=generator, device=device),
    }


# ---- the peers


class TrainedModel:
    """A model with an adapter, its optimiser, and one batch."""

    def __init__(self, module: nn.Module, batch: dict[str, Tensor]) -> None:
        self.module, self.batch = module, batch
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, 1e-4, fused=True) if self.trained else None

    def forward(self) -> Tensor:
        """Return the loss."""
        return self.module(**self.batch).loss

    def step(self) -> None:
        self.forward().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def own_bytes(self) -> int:
        """Return the bytes of trained weights and of the optimiser's state."""
        state = [] if self.optimizer is None else [v for s in self.optimizer.state.values() for v in s.values()]
        return sum(t.numel() * t.element_size() for t in [*self.trained, *state] if isinstance(t, Tensor))


def without_embeds(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "instruction_embeds"}


def without_adapter(shape: ModelShape, base: nn.Module, batch: dict[str, Tensor]) -> TrainedModel:
    module = shared_copy(base)
    module.model.multi_modal_projector.register_forward_hook(lambda _, args, out: out.detach().requires_grad_())
    return TrainedModel(module, without_embeds(batch))


def peft_lora(
    shape: ModelShape, base: nn.Module, batch: dict[str, Tensor], float32_adapter: bool = False
) -> TrainedModel:
    return TrainedModel(with_lora(shape, base, float32_adapter), without_embeds(batch))


def fused(shape: ModelShape, base: nn.Module, batch: dict[str, Tensor]) -> TrainedModel:
    return TrainedModel(with_smolora(shape, base, route_over="all"), batch)


def released(shape: ModelShape, base: nn.Module, batch: dict[str, Tensor]) -> TrainedModel:
    return TrainedModel(with_official(shape, base, batch["instruction_embeds"]), without_embeds(batch))


PEERS: dict[str, Callable[[ModelShape, nn.Module, dict[str, Tensor]], TrainedModel]] = {
    "none": without_adapter,
    "peft_lora": peft_lora,
    "peft_lora_fp32": partial(peft_lora, float32_adapter=True),
    "official": released,
    "smolora": fused,
}


# ---- do they agree?


def check(device: torch.device) -> float:
    """Return the error of smolora against the released algorithm, relative to what the adapter changes.

    Logits and gradients are compared, in float32 on a small model.

    Raises:
        SystemExit: it is over AGREEMENT, so there is nothing to time.
    """
    shape = PRESETS["check"]
    base, batch = make_base(shape, device), make_batch(shape, device)
    ours, theirs = fused(shape, base, batch), released(shape, base, batch)
    with torch.no_grad():
        plain = base(**without_embeds(batch)).logits
    logits = [model.module(**model.batch).logits for model in (ours, theirs)]
    errors = [((logits[0] - logits[1]).norm() / (logits[1] - plain).norm()).item()]
    for model in (ours, theirs):
        model.forward().backward()
    for name in targets(base):
        experts = ours.module.get_submodule(f"base_model.model.{name}").smolora_experts["default"]
        adapter = theirs.module.get_submodule(name).adapter
        for kind in TRAINED:
            mine, right = getattr(experts, kind).grad, adapter[kind].grad
            errors.append(((mine - right).norm() / right.norm().clamp_min(1e-12)).item())
    worst = max(errors)
    if not worst <= AGREEMENT:
        sys.exit(f"refused to time a wrong result: smolora is {worst:.1e} from the released algorithm in float32")
    return worst


# ---- measuring


def checkpointing(model: TrainedModel, on: bool) -> None:
    """Turn activation checkpointing on or off."""
    base = model.module.get_base_model() if isinstance(model.module, PeftModel) else model.module
    name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"  # the former name
    if on:
        getattr(base, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(base, f"{name}_checkpointing_disable")()


def measure(run: Run, shape: ModelShape) -> None:
    """Measure a row for each peer, without and with activation checkpointing."""
    base, batch = make_base(shape, run.device), make_batch(shape, run.device)
    base_bytes = sum(p.numel() * p.element_size() for p in base.parameters())
    models = {name: PEERS[name](shape, base, batch) for name in run.names}
    for on in (False, True):
        how = f"{'with' if on else 'without'} checkpointing"
        fits: dict[str, int | None] = {}
        for name, model in models.items():
            checkpointing(model, on)
            try:
                model.step()  # makes the optimiser's state
                fits[name] = peak(model.step, run.device)
            except torch.OutOfMemoryError as error:
                run.record_failure(f"{name}, {how}", error)
                model.module.zero_grad()
            free_memory(run.device)
        jobs = [Job(name, (lambda _, model=models[name]: model.step(),)) for name in fits]
        timings = {name: t[-1] for name, t in run.time(f"{how}: timing", jobs, min_rounds=5).items()}
        for name, rise in fits.items():
            model = models[name]
            kept = kept_for_backward(model.forward, [*base.parameters(), *model.module.parameters()])
            run.rows.append(
                {
                    "peer": name,
                    "checkpointing": on,
                    "shape": asdict(shape),
                    "tokens": shape.batch * shape.tokens,
                    "step_ms": timings[name].summary(),
                    "tokens_per_second": shape.batch * shape.tokens / timings[name].median * 1e3,
                    "over": {other: timings[name].over(timings[other]) for other in fits if other != name},
                    "trained": sum(p.numel() for p in model.trained),
                    "kept_bytes": kept,
                    "peak_bytes": None if rise is None else base_bytes + model.own_bytes() + rise,
                    **run.environment,
                }
            )


def table(rows: list[Row]) -> str:
    """Format a line a peer; times in ms, median (20th-80th percentile)."""
    lines = [
        f"{'peer':<16}{'checkpointing':<15}{'step ms':>27}{'tokens/s':>11}{'of none':>9}{'/ official':>12}"
        f"{'kept MiB':>10}{'peak GiB':>10}"
    ]
    for row in rows:
        same = [r for r in rows if r["checkpointing"] == row["checkpointing"]]
        rate = {r["peer"]: r["tokens_per_second"] for r in same}
        spread, mine = report.spread(row["step_ms"]), row["tokens_per_second"]
        gain = f"{mine / rate['official']:.2f}x" if "official" in rate else "-"
        of_none = f"{mine / rate['none']:.2f}" if "none" in rate else "-"
        top = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.2f}"
        lines.append(
            f"{row['peer']:<16}{'on' if row['checkpointing'] else 'off':<15}{spread:>27}{mine:>11.1f}{of_none:>9}"
            f"{gain:>12}{row['kept_bytes'] / MIB:>10.1f}{top:>10}"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = flags(__doc__, "model and batch", PEERS, 90.0)
    args = parser.parse_args(argv)
    args.peers = chosen_peers(parser, args.peers, PEERS)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    shape = PRESETS[args.preset]
    device = device_for(args.device, shape)
    names = args.peers
    if shape.dtype == "float32" and "peft_lora" in names and "peft_lora_fp32" in names:
        names.remove("peft_lora_fp32")  # the same

    def measure_all(run: Run) -> None:
        run.facts["agreement"] = check(device)
        measure(run, shape)

    def show(run: Run, folder: Path) -> None:
        agreement = run.facts["agreement"]
        print(f"\nsmolora and the released algorithm agree to {agreement:.1e} in float32 (logits, gradients)")
        print(f"\n{shape.name}: {shape.batch} x {shape.tokens} tokens, {shape.dtype}, dropout {shape.dropout:g}")
        print(table(run.rows))

    bench_main(
        measure_all,
        show,
        stem=f"train_step_{shape.name}",
        output=args.output,
        device=device,
        names=names,
        skipped={},
        steps=2,
        group_seconds=args.seconds / 2,
        note=busy_note(device),
    )


if __name__ == "__main__":
    main()
