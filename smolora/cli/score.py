"""`smolora score`: a file of answers to its dataset's metric, and MIF where it is defined."""

from __future__ import annotations

import argparse
import json

from ..evaluate.benchmarks import datasets_of
from ..evaluate.datasets import PROTOCOLS
from ..evaluate.score import score
from ..io.files import path_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help=f"one of {', '.join(datasets_of())}")
    parser.add_argument(
        "--annotations",
        required=True,
        action="append",
        type=path_argument,
        metavar="DIR",
        help="folder with the dataset's files, or with a subfolder of its name; may be given several times",
    )
    parser.add_argument("--answers", required=True, type=path_argument, metavar="FILE", help="the answers, JSON lines")
    parser.add_argument(
        "--protocol",
        default="smolora",
        choices=PROTOCOLS,
        help="smolora: as the paper's tables; standard: as the field means the metric; coin: CoIN's scorers as "
        f"released, of {', '.join(datasets_of('coin'))} (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, in percent, unrounded")


def run(args: argparse.Namespace) -> int:
    result = score(args.dataset, args.annotations, args.answers, args.protocol)
    if args.json:
        print(json.dumps(result.as_dict()))
        result.show_remark()
    else:
        result.show()
    return 0
