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
import copy
import gc
import os
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import report
import smolora
from peers import TRAINED, official
from problem import INSTRUCTION_DIM, SCALING
from report import Row
from runs import choose_device
from smolora.tuner.model import DEFAULT_TARGETS
from timing import Job, clock_for, interleave, kept_for_backward, peak

MIB, GIB = 2**20, 2**30
AGREEMENT = 1e-3  # of smolora and official in float32, relative to what the adapter changes


@dataclass(frozen=True)
class Shape:
    """A LLaVA and a batch: `batch` samples of one image and `text` tokens each."""

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    vocabulary: int
    vision_hidden: int
    vision_layers: int
    image: int
    patch: int
    batch: int
    text: int
    dtype: str
    r: int = 16
    experts: int = 4  # of either branch
    dropout: float = 0.05

    @property
    def image_tokens(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Of one sample."""
        return self.image_tokens + self.text


PRESETS = {
    "llava-7b": Shape("llava-7b", 4096, 11008, 32, 32, 32064, 1024, 24, 336, 14, batch=8, text=128, dtype="bfloat16"),
    # the same proportions: FFN 2.69 times the hidden size, vision a quarter of it, 4.5 image tokens to one of text
    "small": Shape("small", 512, 1376, 2, 8, 2048, 128, 2, 168, 14, batch=4, text=32, dtype="float32"),
    "check": Shape("check", 64, 176, 2, 4, 128, 32, 2, 56, 14, batch=3, text=8, dtype="float32", r=4, dropout=0.0),
}


def make_base(shape: Shape, device: torch.device) -> LlavaForConditionalGeneration:
    """The frozen model, with random weights made on the device."""
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_hidden, intermediate_size=4 * shape.vision_hidden,
        num_hidden_layers=shape.vision_layers, num_attention_heads=max(1, shape.vision_hidden // 64),
        image_size=shape.image, patch_size=shape.patch,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=shape.vocabulary - 1, vision_feature_layer=-2,
        image_seq_length=shape.image_tokens,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=getattr(torch, shape.dtype))
    return model.requires_grad_(False).train()


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


def shared_copy(base: nn.Module) -> nn.Module:
    """The same model again, on the same tensors."""
    return copy.deepcopy(base, {id(t): t for t in [*base.parameters(), *base.buffers()]})


def without_embeds(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "instruction_embeds"}


def without_adapter(shape: Shape, base: nn.Module, batch: dict[str, Tensor]) -> Peer:
    model = shared_copy(base)
    model.model.multi_modal_projector.register_forward_hook(lambda _, args, out: out.detach().requires_grad_())
    return Peer(model, without_embeds(batch))


def peft_lora(shape: Shape, base: nn.Module, batch: dict[str, Tensor], float32_adapter: bool = False) -> Peer:
    config = LoraConfig(
        r=2 * shape.r,
        lora_alpha=SCALING * 2 * shape.r,
        lora_dropout=shape.dropout,
        target_modules=DEFAULT_TARGETS["llava"],
    )
    model = get_peft_model(shared_copy(base), config, autocast_adapter_dtype=float32_adapter)
    return Peer(model, without_embeds(batch))


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that adapters are put on, by name."""
    chosen = re.compile(DEFAULT_TARGETS["llava"])
    return {name: module for name, module in model.named_modules() if chosen.fullmatch(name)}


def draw_adapter(name: str, linear: nn.Linear, shape: Shape) -> dict[str, Tensor]:
    """A layer's adapter as in mid-training, the same for every peer: float32, on the layer's device."""
    d, k, r, e = linear.in_features, linear.out_features, shape.r, shape.experts
    sizes = {
        "vu_A": (e, r, d), "vu_B": (e, k, r), "if_A": (e, r, d), "if_B": (e, k, r), "vu_router": (e, d),
        "if_router": (e, INSTRUCTION_DIM), "vu_importance": (k,), "if_importance": (k,),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    device = linear.weight.device
    return {n: torch.randn(s, generator=generator).mul_(s[-1] ** -0.5).to(device) for n, s in sizes.items()}


def fused(shape: Shape, base: nn.Module, batch: dict[str, Tensor]) -> Peer:
    config = smolora.SMoLoRAConfig(
        r=shape.r, lora_alpha=SCALING * shape.r, lora_dropout=shape.dropout, num_vu_experts=shape.experts,
        num_if_experts=shape.experts, instruction_dim=INSTRUCTION_DIM, route_over="all",
    )  # fmt: skip
    model = get_peft_model(shared_copy(base), config)
    with torch.no_grad():
        for name, linear in targets(base).items():
            experts = model.get_submodule(f"base_model.model.{name}").smolora_experts["default"]
            for kind, values in draw_adapter(name, linear, shape).items():
                getattr(experts, kind).copy_(values)
    return Peer(model, batch)


class OfficialLinear(nn.Module):
    """The released layer, written out: `peers.official` around a frozen linear layer, in the layer's dtype."""

    def __init__(self, linear: nn.Linear, adapter: dict[str, Tensor], instruction: Tensor, dropout: float) -> None:
        super().__init__()
        self.linear, self.instruction, self.dropout = linear, instruction, dropout
        dtype = linear.weight.dtype
        self.adapter = nn.ParameterDict({n: nn.Parameter(v.to(dtype), n in TRAINED) for n, v in adapter.items()})

    def forward(self, x: Tensor) -> Tensor:
        dropout = (lambda x: F.dropout(x, self.dropout)) if self.dropout else None
        adapter = {name: self.adapter[name] for name in self.adapter}
        return official(x, self.linear(x), adapter, self.instruction.to(x.dtype), None, dropout)


def released(shape: Shape, base: nn.Module, batch: dict[str, Tensor]) -> Peer:
    model = shared_copy(base)
    for name, linear in targets(base).items():
        parent, _, child = name.rpartition(".")
        adapter = draw_adapter(name, linear, shape)
        wrapped = OfficialLinear(linear, adapter, batch["instruction_embeds"], shape.dropout)
        setattr(model.get_submodule(parent), child, wrapped)
    return Peer(model, without_embeds(batch))


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
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small", help="model and batch (default: %(default)s)")
    parser.add_argument("--peers", help=f"comma-separated, of {', '.join(PEERS)}")
    parser.add_argument("--seconds", type=float, default=90.0, help="to spend on timing, about (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", type=Path, help="folder of the results (default: bench/results/<device>)")
    args = parser.parse_args(argv)
    unknown = set((args.peers or "").split(",")) - {*PEERS, ""}
    if unknown:
        parser.error(f"--peers: {', '.join(sorted(unknown))} unknown; known: {', '.join(PEERS)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = choose_device(args.device)
    shape = PRESETS[args.preset]
    if device.type == "cpu" and shape.hidden > 1024:
        sys.exit(f"--preset {shape.name} needs a GPU")
    names = args.peers.split(",") if args.peers else list(PEERS)
    if shape.dtype == "float32" and "peft_lora" in names and "peft_lora_fp32" in names:
        names.remove("peft_lora_fp32")  # the same
    environment = report.environment(device)
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    if device.type == "cpu" and (load := os.getloadavg()[0]) > os.cpu_count() / 2:
        print(f"Other programs are busy (load {load:.1f} on {os.cpu_count()} cores): lean on the ratios alone.")
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
