"""One decode step of a whole LLaVA, a token for each of several sequences, with an adapter and without.

    python bench/decode_step.py                       the CPU's model: eager steps, which say nothing about a GPU
    python bench/decode_step.py --preset llava-7b     a LLaVA-1.5-7B's shapes with random weights, on a GPU

A static cache takes a prompt, then the step is timed at the position after it: on a GPU the replay of a captured graph.
Peers: none (no adapter), peft_lora (PEFT's LoRA of rank 2r, its weights in the compute dtype), official (the released
algorithm, which routes each token by itself) and this package's tuner, which keeps the prompt's routes, by its backend:
torch, triton, cuda. All share one frozen base. Before anything is timed, in float32 on a small model the step must give
what one forward over prompt and token gives without a cache (of official: what this package's tuner gives with the
released routing), and what is timed must give what the backend torch gives at the same shape.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import StaticCache

import report
import smolora
from accuracy import WrongResult
from peers import OURS
from report import Row
from runs import Run, bench_main, busy_note, free_memory, positive, unavailable
from timing import Job, capture
from whole_model import (
    PRESETS,
    ModelShape,
    OfficialLinear,
    chosen_peers,
    device_for,
    flags,
    make_base,
    shared_copy,
    with_lora,
    with_official,
    with_smolora,
)
from workload import INSTRUCTION_DIM

PEERS = ("none", "peft_lora", "official", *OURS)
ROOM = 8  # tokens that a cache holds after the prompt: what is run before a capture goes on from step to step
# How far logits may be, relative to what the adapter changes: three times what rounding moves them by after 32 layers
# in 16 bits (0.05 in bfloat16), so the sharp check is the one in float32.
LIMITS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1.5e-1}


@dataclass(frozen=True)
class Text:
    """Prompts `ids` (n, length), the tokens `next` (n, 1) after them, and embeddings `instruction` (n, e)."""

    ids: Tensor
    next: Tensor
    instruction: Tensor

    @classmethod
    def draw(cls, shape: ModelShape, sequences: int, prompt: int, device: torch.device) -> Text:
        generator = torch.Generator(device).manual_seed(1)
        size = (sequences, prompt + 1)
        ids = torch.randint(3, shape.vocabulary - 1, size, generator=generator, device=device)
        instruction = torch.randn(sequences, INSTRUCTION_DIM, generator=generator, device=device)
        return cls(ids[:, :-1], ids[:, -1:].contiguous(), instruction)


def cache_name(model: nn.Module) -> str:
    """Return the name of a forward's cache argument, which transformers has renamed."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


class Decoder:
    """A model, and a static cache that its prompt is in."""

    def __init__(self, model: nn.Module, text: Text) -> None:
        self.model, self.text = model.eval(), text
        ours = isinstance(getattr(model, "active_peft_config", None), smolora.SMoLoRAConfig)
        own = {"instruction_embeds": text.instruction} if ours else {}
        for module in model.modules():
            if isinstance(module, OfficialLinear):
                module.instruction = text.instruction
        self.cache = StaticCache(config=model.config.text_config, max_cache_len=text.ids.shape[1] + ROOM)
        self.given = {cache_name(model): self.cache, "use_cache": True}
        model(input_ids=text.ids, logits_to_keep=1, **self.given, **own)

    def step(self) -> Tensor:
        """Return the logits (n, vocabulary) of the next token, which goes into the cache."""
        return self.model(input_ids=self.text.next, **self.given).logits[:, -1]

    def rewind(self) -> None:
        """Put the cache back to the prompt."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.text.ids.shape[1])

    def without_adapter(self) -> Tensor:
        """Return the step's logits from the same cache, without the adapter."""
        self.rewind()
        with self.model.disable_adapter():
            return self.step()


def build(name: str, shape: ModelShape, base: nn.Module, instruction: Tensor) -> nn.Module:
    """Build a peer's model; all of OURS have the same."""
    if name == "none":
        return shared_copy(base)
    if name == "peft_lora":
        return with_lora(shape, base)
    return with_official(shape, base, instruction) if name == "official" else with_smolora(shape, base)


def scope(name: str) -> AbstractContextManager:
    """Return the context of a peer's backend."""
    return smolora.use_backend(name) if name in OURS else nullcontext()


# ---- is it right?


def distance(logits: Tensor, expected: Tensor, plain: Tensor) -> float:
    """Return the error of logits, relative to what the adapter changes: `expected` against `plain`."""
    logits, expected, plain = logits.double(), expected.double(), plain.double()
    return ((logits - expected).norm() / (expected - plain).norm()).item()


def must_agree(name: str, error: float, limit: float, what: str) -> float:
    if not error <= limit:
        raise WrongResult(f"{name} is {error:.1e} of what the adapter changes from {what}, more than {limit:.0e}")
    return error


@torch.no_grad()
def check(name: str, device: torch.device) -> float | None:
    """Return the error of a SMoLoRA peer's step in float32 on a small model; None for the other peers.

    Raises:
        WrongResult: it is over its limit.
    """
    if name not in ("official", *OURS):
        return None
    shape = PRESETS["check"]
    base, text = make_base(shape, device), Text.draw(shape, 3, 9, device)
    with scope(name):
        logits = Decoder(build(name, shape, base, text.instruction), text).step()
    with smolora.use_backend("torch"):
        if name == "official":
            decoder = Decoder(with_smolora(shape, base, route_over="all", decode_routing="token"), text)
            expected, plain, what = decoder.step(), decoder.without_adapter(), "the released routing in this package"
        else:
            model = with_smolora(shape, base).eval()
            ids = torch.cat([text.ids, text.next], 1)
            labels = torch.cat([torch.full_like(text.ids, -100), text.next], 1)  # the routers see the prompt alone
            expected = model(input_ids=ids, labels=labels, instruction_embeds=text.instruction).logits[:, -1]
            plain, what = base.eval()(input_ids=ids).logits[:, -1], "a forward without a cache"
    return must_agree(name, distance(logits, expected, plain), LIMITS["float32"], what)


# ---- measuring


def prepare(name: str, decoder: Decoder) -> tuple[Callable[[], object], Tensor]:
    """Return a peer's step, to be run from a rewound cache, and its logits."""

    def step() -> Tensor:
        with scope(name):
            return decoder.step()

    decoder.rewind()
    if decoder.text.ids.device.type == "cpu":
        return step, step()
    replay, logits = capture(step)
    logits.fill_(float("nan"))
    decoder.rewind()
    replay()
    return replay, logits.clone()


@torch.no_grad()
def measure(run: Run, shape: ModelShape, numbers: list[int], prompt: int) -> None:
    """Measure a row for each peer and number of sequences."""
    errors: dict[str, float | None] = {}
    for name in run.names:
        run.set_status(f"checking {name}")
        try:
            errors[name] = check(name, run.device)
        except Exception as error:  # a kernel that does not compile raises anything: the others are measured
            run.record_failure(name, error)
    shape = replace(shape, dropout=0.0)
    base = make_base(shape, run.device)
    kinds = {name: "smolora" if name in OURS else name for name in errors}
    instruction = torch.zeros(1, INSTRUCTION_DIM, device=run.device)
    models = {kind: build(kind, shape, base, instruction) for kind in dict.fromkeys(kinds.values())}
    for sequences in numbers:
        measure_one(run, shape, models, kinds, errors, sequences, prompt)
        free_memory(run.device)


def measure_one(
    run: Run,
    shape: ModelShape,
    models: dict[str, nn.Module],
    kinds: dict[str, str],
    errors: dict[str, float | None],
    sequences: int,
    prompt: int,
) -> None:
    """Measure the rows of one number of sequences."""
    text = Text.draw(shape, sequences, prompt, run.device)
    decoders: dict[str, Decoder] = {}
    expected: tuple[Tensor, Tensor] | None = None
    jobs, distances = [], {}
    for name, kind in kinds.items():
        try:
            # our backends share torch's prefill: each its own, in 16 bits, would choose otherwise at a near tie
            if kind not in decoders:
                with scope("torch" if kind == "smolora" else name):
                    decoders[kind] = Decoder(models[kind], text)
            decoder = decoders[kind]
            if kind == "smolora" and expected is None:
                plain = decoder.without_adapter()
                decoder.rewind()
                with scope("torch"):
                    expected = decoder.step(), plain
            step, logits = prepare(name, decoder)
            if kind == "smolora":
                error = distance(logits, *expected)
                distances[name] = must_agree(name, error, LIMITS[shape.dtype], f"torch with {sequences} sequences")
        except Exception as error:
            run.record_failure(f"{name}, {sequences} sequences", error)
            free_memory(run.device)
            continue
        jobs.append(Job(name, (lambda _, d=decoder: d.rewind(), lambda _, step=step: step())))
    if not jobs:
        return
    timings = {name: t[1] for name, t in run.time(f"{sequences} sequences: timing", jobs).items()}
    for name, timing in timings.items():
        run.rows.append(
            {
                "peer": name,
                "sequences": sequences,
                "prompt": prompt,
                "shape": asdict(shape),
                "graph": run.device.type == "cuda",
                "step_ms": timing.summary(),
                "tokens_per_second": sequences / timing.median * 1e3,
                "of_none": timings["none"].over(timing) if "none" in timings else None,
                "over": {other: timing.over(timings[other]) for other in timings if other != name},
                "error_small": errors[name],
                "error_of_torch": distances.get(name),
                **run.environment,
            }
        )


def table(rows: list[Row]) -> str:
    """Format a line a peer and number of sequences; times in ms, median (20th-80th percentile)."""
    lines = [f"{'sequences':<11}{'peer':<18}{'step ms':>27}{'tokens/s':>11}{'of none':>9}{'error':>10}{'of torch':>10}"]
    for row in rows:
        spread = report.spread(row["step_ms"])
        of_none = "-" if row["of_none"] is None else f"{row['of_none']:.3f}"
        error, of_torch = ("-" if row[e] is None else f"{row[e]:.0e}" for e in ("error_small", "error_of_torch"))
        lines.append(
            f"{row['sequences']:<11}{report.label(row['peer']):<18}{spread:>27}{row['tokens_per_second']:>11.1f}"
            f"{of_none:>9}{error:>10}{of_torch:>10}"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = flags(__doc__, "model", PEERS, 60.0)
    parser.add_argument("--sequences", help="comma-separated numbers of sequences (default: 1,8,64; on a CPU 1,4)")
    parser.add_argument("--prompt", type=positive, default=128, help="tokens of a prompt (default: %(default)s)")
    args = parser.parse_args(argv)
    args.peers = chosen_peers(parser, args.peers, PEERS)
    try:
        args.sequences = [positive(n) for n in args.sequences.split(",")] if args.sequences else None
    except (ValueError, argparse.ArgumentTypeError):
        parser.error(f"--sequences: must be positive numbers with commas between them, got {args.sequences!r}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    shape = PRESETS[args.preset]
    device = device_for(args.device, shape)
    numbers = args.sequences or ([1, 8, 64] if device.type == "cuda" else [1, 4])
    names, skipped = [], {}
    for name in args.peers:
        if reason := unavailable(name, device, shape.dtype):
            skipped[name] = reason
        else:
            names.append(name)
    how = "a captured graph" if device.type == "cuda" else "no graph: eager steps of a CPU, which say nothing on a GPU"

    def show(run: Run, folder: Path) -> None:
        print(f"\n{shape.name}: one token after {args.prompt}, {shape.dtype}, {how}")
        print(table(run.rows))

    bench_main(
        partial(measure, shape=shape, numbers=numbers, prompt=args.prompt),
        show,
        stem=f"decode_step_{shape.name}",
        output=args.output,
        device=device,
        names=names,
        skipped=skipped,
        steps=len(numbers),
        group_seconds=args.seconds / len(numbers),
        note=busy_note(device),
    )


if __name__ == "__main__":
    main()
