"""Floors: the fewest bytes and operations of every pass, and the time that a card needs for them.

    python bench/roofline.py [--preset llava-7b] [--r 16] ...

A pass can be no faster than max(bytes / bandwidth, operations / rate). Bytes count every operand once, read or written;
partial sums are an implementation's own and are not in the floor. Rates are dense bf16 on tensor cores.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shapes import PRESETS, MixtureCase, Shape, SMoLoRACase

if TYPE_CHECKING:
    from torch import Tensor

FLOAT = 4  # bytes of h, alpha, and of a float32 gradient


@dataclass(frozen=True)
class MachinePeaks:
    """Memory bandwidth in byte/s (read plus written) and matrix rate in FLOP/s."""

    name: str
    bandwidth: float
    rate: float


CARDS = (
    MachinePeaks("A100", 2.0e12, 312e12),
    MachinePeaks("H100", 3.35e12, 989e12),
    MachinePeaks("H200", 4.8e12, 989e12),
    MachinePeaks("B200", 8.0e12, 2250e12),
)
# What an H200 was measured to give; the others, and its own line above, are the data sheets' figures.
H200_MEASURED = MachinePeaks("H200 measured", 4.3e12, 780e12)


@dataclass(frozen=True)
class Work:
    """Bytes moved and floating-point operations done by one pass."""

    bytes: float
    flops: float

    def seconds(self, peaks: MachinePeaks) -> float:
        return max(self.bytes / peaks.bandwidth, self.flops / peaks.rate)


def shrink_columns(case: SMoLoRACase) -> int:
    """Return the columns of rank space that `route_shrink` computes: with one read, those of all VU experts."""
    return 2 * case.r if _two_reads(case) else case.vu * case.r + case.r


def _two_reads(case: SMoLoRACase) -> bool:
    return case.vu * case.r > 128


def _route_shrink(case: SMoLoRACase) -> Work:
    """Count h and the router's sums from one read of x, or beyond 128 columns from two, which is cheaper."""
    T, d, r, item = case.tokens, case.d, case.r, case.item
    columns = shrink_columns(case)  # the router's own come on top
    weights = (case.vu * r + case.vu + r) * d * item  # vu_A, R_vu, one if_A
    reads = (2 if _two_reads(case) else 1) * T * d * item
    return Work(reads + weights + T * columns * FLOAT, 2 * T * d * (columns + case.vu))


def adapter(case: SMoLoRACase | MixtureCase) -> dict[str, Work]:
    """Count the adapter's four passes; y and dx are written once, and the base GEMM accumulates on them."""
    return _mixture(case) if isinstance(case, MixtureCase) else _smolora(case)


def _smolora(case: SMoLoRACase) -> dict[str, Work]:
    T, d, k, r, item = case.tokens, case.d, case.k, case.r, case.item
    chosen = min(case.batch, case.vu) + min(case.batch, case.if_)  # experts that some instance uses
    A, B = chosen * r * d, chosen * r * k  # elements
    h, dh = T * 2 * r * FLOAT, T * 2 * r * item
    alpha = T * FLOAT
    return {
        "route_shrink": _route_shrink(case),
        "fuse_expand": Work(h + alpha + B * item + T * k * item, 2 * T * k * 2 * r),
        "grad_output": Work(T * k * item + h + alpha + B * item + dh + B * FLOAT, 2 * 2 * T * k * 2 * r),
        "grad_input": Work(T * d * item + dh + A * item + T * d * item + A * FLOAT, 2 * 2 * T * d * 2 * r),
    }


def _mixture(case: MixtureCase) -> dict[str, Work]:
    """Count another method's passes, without the little work done once a sequence or a step (gates, LiLoRA's B).

    MoELoRA's router is counted, for every token goes through it.
    """
    T, d, k, item = case.tokens, case.d, case.k, case.item
    columns, rank = case.columns, case.mixed
    router = case.experts if case.method == "moelora" else 0
    branches = min(case.batch * case.active, case.experts) if case.method == "branchlora" else rank // case.r
    A, B = (columns + router) * d, branches * case.r * k  # elements
    h, dh, scores = T * columns * FLOAT, T * columns * item, T * router * FLOAT
    down = 2 * T * d * (columns + router)
    return {
        "route_shrink": Work(T * d * item + A * item + h + scores, down),
        "fuse_expand": Work(h + scores + B * item + T * k * item, 2 * T * k * rank),
        "grad_output": Work(T * k * item + h + dh + 2 * scores + B * (item + FLOAT), 2 * 2 * T * k * rank),
        "grad_input": Work(2 * T * d * item + dh + scores + A * (item + FLOAT), 2 * down),
    }


def operand_bytes(case: SMoLoRACase, name: str) -> int:
    """Count every operand of a pass once, as the floor does; of route_shrink's columns only those it returns."""
    unchosen = shrink_columns(case) - 2 * case.r if name == "route_shrink" else 0
    return adapter(case)[name].bytes - case.tokens * unchosen * FLOAT


def partial_bytes(case: SMoLoRACase, name: str, buffers: list[Tensor]) -> int:
    """Count the bytes written to buffers and read again; route_shrink reads the chosen experts' columns alone."""
    total = sum(buffer.untyped_storage().nbytes() for buffer in buffers)
    if name != "route_shrink":
        return 2 * total
    columns = sum(part.nbytes for part in buffers if part.dim() == 3 and part.shape[1] == case.tokens)
    return 2 * total - columns + columns * 2 * case.r // shrink_columns(case)


def base(case: Shape) -> dict[str, Work]:
    """Count the frozen linear layer: y = W x and dx = W^T g."""
    T, d, k = case.tokens, case.d, case.k
    gemm = Work((T * d + d * k + T * k) * case.item, 2 * T * d * k)
    return {"base forward": gemm, "base dx": gemm}


FORWARD = ("route_shrink", "fuse_expand")
BACKWARD = ("grad_output", "grad_input")


def adapter_seconds(case: SMoLoRACase | MixtureCase, peaks: MachinePeaks) -> dict[str, float]:
    """Return the floors of the adapter alone in seconds: {"forward", "backward", "both"}."""
    passes = {name: work.seconds(peaks) for name, work in adapter(case).items()}
    forward, backward = sum(passes[name] for name in FORWARD), sum(passes[name] for name in BACKWARD)
    return {"forward": forward, "backward": backward, "both": forward + backward}


def layer_seconds(case: SMoLoRACase | MixtureCase, peaks: MachinePeaks) -> dict[str, float]:
    """Return the floors of base and adapter together in seconds: {"forward", "backward", "both"}."""
    own = adapter_seconds(case, peaks)
    gemm = base(case)["base forward"].seconds(peaks)
    return {mode: own[mode] + (2 if mode == "both" else 1) * gemm for mode in own}


def table(case: SMoLoRACase | MixtureCase, cards: tuple[MachinePeaks, ...]) -> str:
    """Format the floors of one case, in microseconds."""
    passes = adapter(case) | base(case)
    lines = [
        case.describe(),
        f"{'pass':<14}{'MB':>9}{'GFLOP':>9}" + "".join(f"{card.name + ' us':>18}" for card in cards),
    ]
    for name, work in passes.items():
        cells = "".join(f"{work.seconds(card) * 1e6:>18.1f}" for card in cards)
        lines.append(f"{name:<14}{work.bytes / 1e6:>9.1f}{work.flops / 1e9:>9.1f}{cells}")
    own = [adapter_seconds(case, card)["both"] for card in cards]
    whole = [layer_seconds(case, card)["both"] for card in cards]
    lines.append(f"{'adapter':<32}" + "".join(f"{seconds * 1e6:>18.1f}" for seconds in own))
    shares = [f"{1 + seconds / (total - seconds):.3f}x" for seconds, total in zip(own, whole, strict=True)]
    lines.append(f"{'layer / frozen linear':<32}" + "".join(f"{share:>18}" for share in shares))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="llava-7b")
    for flag in ("d", "k", "r", "vu", "batch", "seq"):
        parser.add_argument(f"--{flag}", type=int, help="replaces the preset's value in every shape")
    parser.add_argument("--if", dest="if_", type=int, help="number of IF experts")
    args = vars(parser.parse_args())
    cases = PRESETS[args.pop("preset")]
    changes = {name: value for name, value in args.items() if value is not None}
    for case in cases:
        print(table(replace(case, **changes), (*CARDS, H200_MEASURED)), end="\n\n")
    print(
        "Data-sheet bandwidth (TB/s) and dense bf16 rate (TFLOP/s): "
        + ", ".join(f"{card.name} {card.bandwidth / 1e12:g} / {card.rate / 1e12:g}" for card in CARDS)
        + f"; {H200_MEASURED.name}: {H200_MEASURED.bandwidth / 1e12:g} / {H200_MEASURED.rate / 1e12:g}."
    )


if __name__ == "__main__":
    main()
