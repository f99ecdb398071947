"""`smolora metrics`: an accuracy matrix to AP, MAP, BWT and MIF, or to CoIN's or MLLM-CL's figures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from ..data.format import read_json
from ..evaluate.metrics import CONVENTIONS, Figures, continual_metrics
from ..evaluate.paper import disagreements_with
from ..io.files import path_argument
from ..io.markdown import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "matrix",
        type=path_argument,
        help='JSON: {"tasks": [...], "matrix": [[a11], [a21, a22], ...], "mif": of the same form or left out, '
        '"method": "dirlora" for an adapter a task}; a single row of all tasks is one evaluation',
    )
    parser.add_argument(
        "--convention",
        default="cvit",
        choices=CONVENTIONS,
        help="cvit: AP, MAP, BWT over the T - 1 earlier tasks, MIF; coin: ACC, MAA, BWT over all T tasks; "
        "mllm-cl: MFT, MFN, MAA, BWT over the T - 1 earlier tasks (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with one entry a stage")
    parser.add_argument(
        "--allow-missing", action="store_true", help="cells may be missing; so are the figures that need them"
    )


def run(args: argparse.Namespace) -> int:
    content = read_json(args.matrix)
    if not isinstance(content, dict) or not {"tasks", "matrix"} <= content.keys():
        raise ValueError(f"{args.matrix}: must hold an object with 'tasks' and 'matrix'")
    try:
        figures = continual_metrics(
            content["tasks"],
            content["matrix"],
            content.get("mif"),
            method="dirlora" if str(content.get("method")).lower() == "dirlora" else None,
            allow_missing=args.allow_missing,
            convention=args.convention,
        )
    except ValueError as error:
        raise ValueError(f"{args.matrix}: {error}") from error
    if args.json:
        print(json.dumps(figures))
        return 0
    print(_table(content["tasks"], figures))
    if args.convention == "cvit":
        for disagreement in disagreements_with(content["tasks"], content["matrix"]):
            print(f"the paper's tables disagree: {disagreement}")
    return 0


def _table(tasks: Sequence[str], figures: Figures) -> str:
    """Format the figures, one line for each stage."""
    stages = len(figures["BWT"])
    names = [printable(name).replace("\n", " ") for name in tasks] if stages == len(tasks) else ["all"]
    width = max(len("stage"), *map(len, names))
    lines = [f"{'stage':<{width}}" + "".join(f"{name:>10}" for name in figures)]
    for k, name in enumerate(names):
        cells = (figures[figure][k] for figure in figures)
        lines.append(f"{name:<{width}}" + "".join(f"{'-' if cell is None else f'{cell:.2f}':>10}" for cell in cells))
    return "\n".join(lines)
