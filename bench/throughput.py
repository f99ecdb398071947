"""Predict the time of every kernel from its machine code, on any machine; nothing here is a measurement.

    python bench/throughput.py [--preset llava-7b] [--card h200] [--json] [--lines]
    python bench/throughput.py --sweep grad_output BT=64 BD=128,256 warps=4,8 stages=2,3 registers=none,128
    python bench/throughput.py --compare before.json after.json
    python bench/throughput.py --budget check
    python bench/throughput.py --page docs/predictions.md

Kernels are compiled as a training step launches them. Their machine code is counted and simulated on one multiprocessor
(bench/predict/). `--json` ends with one line: `layer`, forward and backward over the frozen linear's time at dropout
0.05 with bfloat16 parameters; `passes`, the share of each pass's time that a copy of its bytes takes, at dropout 0 with
float32 parameters as in bench/passes.py, the worse of the shapes; `decode`, a step's rate over that without an adapter,
by sequences; `copy`, a plain copy's share of the memory's rate.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from predict import budget, page, report, sweep
from predict.decode import MODELS, predict_decode
from predict.layer import LayerPrediction, predict_copy, predict_layer
from predict.machines import CARDS, Machine, card_here, machine
from predict.report import Predictions
from shapes import PRESETS, SMoLoRACase

SEQUENCES = (1, 8, 64)
TRAINED_WITH = ((0.05, "bfloat16"), (0.0, "float32"))  # dropout, and the dtype of parameters


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("llava-7b", "llava-13b"), default="llava-7b")
    parser.add_argument("--card", choices=CARDS, help="default: the one that is here, else h200")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--output", type=Path, help="write every figure to this file, for --compare")
    parser.add_argument("--lines", action="store_true", help="instructions by source line of each pass's main kernel")
    parser.add_argument(
        "--sweep", nargs="+", metavar=("KERNEL", "FIELD=VALUES"), help="try tiles of a kernel in its place"
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="two files of --output")
    parser.add_argument("--measured", type=Path, help="a JSON of bench/passes.py, to be shown beside the predictions")
    parser.add_argument("--page", type=Path, help="write the page of predictions for all cards to this file")
    parser.add_argument("--budget", choices=("check", "write"), help="of the instructions of inner loops")
    parser.add_argument("--arch", type=int, nargs="+", default=(80, 90), help="of --budget (default: 80 90)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.sweep:
        try:
            args.sweep = sweep.parse(args.sweep)
        except ValueError as error:
            parser.error(f"--sweep: {error}")
    return args


def predict_all(
    preset: str,
    cases: list[SMoLoRACase],
    cards: list[Machine],
    workers: int,
    show: Callable[[LayerPrediction, Machine], None] = lambda layer, card: None,
) -> list[Predictions]:
    """Predict all that a report has for each card, in `workers` processes; `show` gets each layer as it comes."""
    found = []
    with ProcessPoolExecutor(workers) as pool:
        copies = [pool.submit(predict_copy, card) for card in cards]
        layers = [
            [pool.submit(predict_layer, case, card, *given) for given in TRAINED_WITH for case in cases]
            for card in cards
        ]
        for card, copy, futures in zip(cards, copies, layers, strict=True):
            for future in futures:
                show(future.result(), card)
            steps = [predict_decode(MODELS[preset], n, card, cases[0].r, cases[0].vu) for n in SEQUENCES]
            found.append(Predictions(preset, card, [future.result() for future in futures], steps, copy.result()))
    return found


def check_budget(architectures: list[int], renew: bool) -> int:
    """Renew the budget of inner loops, or compare them with it; return the exit status."""
    found = budget.count(architectures)
    if renew:
        budget.write(budget.read() | found if budget.FILE.exists() else found)
        print(f"{len(found)} loops written to {budget.FILE}")
        return 0
    wrong = budget.complaints(found, budget.read())
    print("\n".join([*wrong, f"{len(found)} loops, {len(wrong)} over budget"]))
    if wrong:
        print(f"if that is meant, renew the budget: {budget.COMMAND}")
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.compare:
        print(report.compare(*(json.loads(path.read_text()) for path in args.compare)))
        return 0
    if args.budget:
        return check_budget(args.arch, args.budget == "write")
    cases = [case for case in PRESETS[args.preset] if case.ffn]
    if args.page:
        args.page.write_text(page.write(predict_all(args.preset, cases, list(map(machine, CARDS)), args.workers)))
        return 0
    card = machine(args.card or card_here() or "h200")
    print(f"Predictions for {card.name.upper()}, {args.preset}: {card.basis()}.")
    if args.sweep:
        sweep.run(args.sweep, cases, card)
        return 0

    def show(layer: LayerPrediction, card: Machine) -> None:
        print(f"\n{report.layer_table(layer, card, args.lines)}", flush=True)

    (found,) = predict_all(args.preset, cases, [card], args.workers, show)
    print(f"\n{report.decode_table(found.steps)}")
    print(f"\nA plain copy is predicted at {found.copy.of_copy:.1%} of the memory's rate.")
    if args.measured:
        print(f"\n{report.beside_measured(found, json.loads(args.measured.read_text())['rows'])}")
    if args.output:
        args.output.write_text(json.dumps(report.everything(found), indent=1) + "\n")
    if args.json:
        print(json.dumps(report.summary(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
