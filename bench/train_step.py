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
import gc
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm

import report
from problem import INSTRUCTION_DIM, TRAINED
from report import Row
from timing import Job, clock_for, interleave, kept_for_backward, peak
from whole_model import (
    PRESETS,
    Shape,
    chosen_peers,
    device_for,
    flags,
    make_base,
    say_if_busy,
    shared_copy,
    targets,
    with_lora,
    with_official,
    with_smolora,
)

MIB, GIB = 2**20, 2**30
AGREEMENT = 1e-3  # of smolora and official in float32, relative to what the adapter changes


def make_batch(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """Inputs of a forward with loss on the last quarter of the text, and embeddings of the samples' instructions."""
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


class Peer:
    """A model with an adapter, its optimiser, and one batch."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self.model, self.batch = model, batch
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, 1e-4, fused=True) if self.trained else None

    def forward(self) -> Tensor:
        """The loss."""
        return self.model(**self.batch).loss

    def step(self) -> None:
        self.forward().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def own_bytes(self) -> int:
        """Trained weights and the optimiser's state."""
        state = [] if self.optimizer is None else [v for s in self.optimizer.state.values() for v in s.values()]
        return sum(t.numel() * t.element_size() for t in [*self.trained, *state] if isinstance(t, Tensor))


def without_embeds(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "instruction_embeds"}


def without_adapter(shape: Shape, base: nn.Module, batch: dict[str, Tensor]) -> Peer:
    model = shared_copy(base)
    model.model.multi_modal_projector.register_forward_hook(lambda _, args, out: out.detach().requires_grad_())
    return Peer(model, without_embeds(batch))


def peft_lora(shape: Shape, base: nn.Module, batch: dict[str, Tensor], float32_adapter: bool = False) -> Peer:
    return Peer(with_lora(shape, base, float32_adapter), without_embeds(batch))


def fused(shape: Shape, base: nn.Module, batch: dict[str, Tensor]) -> Peer:
    return Peer(with_smolora(shape, base, route_over="all"), batch)


def released(shape: Shape, base: nn.Module, batch: dict[str, Tensor]) -> Peer:
    return Peer(with_official(shape, base, batch["instruction_embeds"]), without_embeds(batch))


PEERS: dict[str, Callable[[Shape, nn.Module, dict[str, Tensor]], Peer]] = {
    "none": without_adapter,
    "peft_lora": peft_lora,
    "peft_lora_fp32": partial(peft_lora, float32_adapter=True),
    "official": released,
    "smolora": fused,
}


# ---- do they agree?


def check(device: torch.device) -> float:
    """How far smolora is from the released algorithm, relative to what the adapter changes: logits and gradients.

    Raises:
        SystemExit: further than AGREEMENT, so there is nothing to time.
    """
    shape = PRESETS["check"]
    base, batch = make_base(shape, device), make_batch(shape, device)
    ours, theirs = fused(shape, base, batch), released(shape, base, batch)
    with torch.no_grad():
        plain = base(**without_embeds(batch)).logits
    logits = [peer.model(**peer.batch).logits for peer in (ours, theirs)]
    errors = [((logits[0] - logits[1]).norm() / (logits[1] - plain).norm()).item()]
    for peer in (ours, theirs):
        peer.forward().backward()
    for name in targets(base):
        experts = ours.model.get_submodule(f"base_model.model.{name}").smolora_experts["default"]
        adapter = theirs.model.get_submodule(name).adapter
        for kind in TRAINED:
            mine, right = getattr(experts, kind).grad, adapter[kind].grad
            errors.append(((mine - right).norm() / right.norm().clamp_min(1e-12)).item())
    worst = max(errors)
    if not worst <= AGREEMENT:
        sys.exit(f"refused to time a wrong result: smolora is {worst:.1e} from the released algorithm in float32")
    return worst


# ---- measuring


def checkpointing(peer: Peer, on: bool) -> None:
    """Turn activation checkpointing on or off."""
    model = peer.model.get_base_model() if isinstance(peer.model, PeftModel) else peer.model
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # the former name
    if on:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_checkpointing_disable")()


def measure(
    shape: Shape, names: list[str], device: torch.device, seconds: float, environment: Row
) -> tuple[list[Row], dict[str, str]]:
    """A row for each peer, without and with activation checkpointing; and what could not be measured."""
    base, batch = make_base(shape, device), make_batch(shape, device)
    base_bytes = sum(p.numel() * p.element_size() for p in base.parameters())
    peers = {name: PEERS[name](shape, base, batch) for name in names}
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    with tqdm(total=2, desc="steps timed", unit="setting", bar_format="{desc} {bar:20} {n_fmt}/{total_fmt}") as bar:
        for on in (False, True):
            fits: dict[str, int | None] = {}
            for name, peer in peers.items():
                checkpointing(peer, on)
                try:
                    peer.step()  # makes the optimiser's state
                    fits[name] = peak(peer.step, device)
                except torch.OutOfMemoryError:
                    skipped[f"{name}, {'with' if on else 'without'} checkpointing"] = "out of device memory"
                    peer.model.zero_grad()
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            jobs = [Job(name, (lambda _, peer=peers[name]: peer.step(),)) for name in fits]
            timings = {name: t[-1] for name, t in interleave(jobs, clock_for(device), seconds / 2).items()}
            for name, rise in fits.items():
                peer = peers[name]
                rows.append(
                    {
                        "peer": name,
                        "checkpointing": on,
                        "shape": asdict(shape),
                        "tokens": shape.batch * shape.tokens,
                        "step_ms": timings[name].summary(),
                        "tokens_per_second": shape.batch * shape.tokens / timings[name].median * 1e3,
                        "over": {other: timings[name].over(timings[other]) for other in fits if other != name},
                        "trained": sum(p.numel() for p in peer.trained),
                        "kept_bytes": kept_for_backward(peer.forward, [*base.parameters(), *peer.model.parameters()]),
                        "peak_bytes": None if rise is None else base_bytes + peer.own_bytes() + rise,
                        **environment,
                    }
                )
            bar.update()
    return rows, skipped


def table(rows: list[Row]) -> str:
    """A line a peer; times in ms, median (20th-80th percentile)."""
    lines = [
        f"{'peer':<16}{'checkpointing':<15}{'step ms':>27}{'tokens/s':>11}{'of none':>9}{'/ official':>12}"
        f"{'kept MiB':>10}{'peak GiB':>10}"
    ]
    for row in rows:
        same = [r for r in rows if r["checkpointing"] == row["checkpointing"]]
        rate = {r["peer"]: r["tokens_per_second"] for r in same}
        t, mine = row["step_ms"], row["tokens_per_second"]
        spread = f"{t['median']:.4g} ({t['p20']:.4g}-{t['p80']:.4g})"
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
    environment = report.environment(device)
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    say_if_busy(device)
    error = check(device)
    print(f"smolora and the released algorithm agree to {error:.1e} in float32 (logits, gradients)")
    rows, skipped = measure(shape, names, device, args.seconds, environment)
    print(f"\n{shape.name}: {shape.batch} x {shape.tokens} tokens, {shape.dtype}, dropout {shape.dropout:g}")
    print(table(rows))
    for what, why in skipped.items():
        print(f"not measured: {what}: {why}")
    path = report.results_folder(args.output, environment) / f"train_step_{shape.name}.json"
    content = {"environment": environment, "agreement": error, "not_measured": skipped, "rows": rows}
    report.write_json(path, content)
    print(f"rows: {path}")


if __name__ == "__main__":
    main()
