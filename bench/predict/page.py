"""The page of predictions, docs/predictions.md."""

from __future__ import annotations

from predict.report import Predictions, summary

HEAD = """# What is predicted

**None of this is measured.** A static model makes these figures from the kernels' machine code: it counts the
instructions, and simulates one multiprocessor that runs them, with the stall counts and scoreboards that the compiler
wrote. Bank conflicts, L2 misses, the turns of DRAM between reads and writes, and power limits are left out. Counts are
exact. The times may be wrong by a quarter; their order is better than that. On a card, `bench/calibrate.py` measures
the machine figures, and `bench/passes.py` and `bench/fused_vs_naive.py` the times.

    python bench/throughput.py --page docs/predictions.md

wrote this page: LLaVA-7B's FFN (d 4096, k 11008, and back), SMoLoRA of rank 16 with 4 + 4 experts, 8 × 1024 tokens in
bfloat16. A step of decoding has one token a sequence.
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def _card(found: Predictions) -> str:
    card, figures = found.machine, summary(found)
    parts = [f"## {card.name.upper()}", f"With {card.basis()}."]
    layers = _table(
        ["predicted", "over the linear", "if every kernel reached its bound", "adapter, us", "linear, us"],
        [
            [
                f"{layer.case.name}, dropout {layer.dropout:g}",
                f"{layer.over_linear(card):.3f}",
                f"{layer.bound_over_linear(card):.3f}",
                _us(layer.adapter(card)),
                _us(layer.linear),
            ]
            for layer in found.dropped
        ],
    )
    passes = _table(
        ["predicted share of a copy, dropout 0", *(layer.case.name for layer in found.plain)],
        [
            [each.name, *(f"{layer.passes[number].share(card):.0%}" for layer in found.plain)]
            for number, each in enumerate(found.plain[0].passes)
        ],
    )
    decode = _table(
        ["predicted decode step, sequences", *figures["decode"]],
        [["rate over that of no adapter", *(f"{value:.3f}" for value in figures["decode"].values())]],
    )
    parts += [
        "A layer, forward and backward, bfloat16 parameters, with the start of each launch:",
        layers,
        "Each pass beside a copy of its bytes, float32 parameters as in `bench/passes.py`, its other launches' starts "
        "included:",
        passes,
        f"A plain copy comes out at {figures['copy']:.1%} of the memory's rate.",
        decode,
    ]
    for layer in found.dropped:
        rows = [
            [
                f"`{kernel.kernel}`",
                "×".join(map(str, kernel.grid)),
                f"{kernel.waves:.2f}",
                str(sum(kernel.loop.values())),
                str(kernel.barriers),
                kernel.limiter,
                _us(kernel.bound),
                _us(kernel.simulated),
                f"{kernel.of_copy:.0%}",
            ]
            for each in layer.passes
            for kernel in each.kernels
        ]
        head = [
            "kernel",
            "grid",
            "waves",
            "instructions",
            "barriers",
            "limiter",
            "bound, us",
            "predicted, us",
            "of copy",
        ]
        parts += [
            f"### {layer.case.name}, dropout {layer.dropout:g}",
            "Instructions and barriers are those of an iteration of the largest loop; the bound is its limiter's time "
            "at perfect overlap.",
            _table(head, rows),
        ]
    return "\n\n".join(parts)


def write(cards: list[Predictions]) -> str:
    """Return the page for some cards, in Markdown."""
    return "\n\n".join([HEAD.strip(), *map(_card, cards)]) + "\n"
