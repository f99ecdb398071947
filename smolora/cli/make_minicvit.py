"""`smolora make-minicvit`: the data of MiniCVIT."""

from __future__ import annotations

import argparse
import json

from ..io.files import path_argument, read_text
from ..minicvit.files import Benchmark
from ..minicvit.tasks import MINICVIT


def add_arguments(parser: argparse.ArgumentParser, benchmark: Benchmark = MINICVIT) -> None:
    parser.add_argument("folder", type=path_argument, metavar="DIR", help="where to write it")
    parser.add_argument(
        "--task",
        action="append",
        choices=benchmark.tasks,
        metavar="NAME",
        help="only this task; may be given several times",
    )


def run(args: argparse.Namespace, benchmark: Benchmark = MINICVIT) -> int:
    folder = benchmark.make(args.folder, args.task)
    for name in args.task or benchmark.tasks:
        digest = json.loads(read_text(folder / "annotations" / name / "digest.json"))["sha256"]
        train = max(benchmark.training_files(name).values(), default=0)
        print(f"{name:<10} {train:>5} training samples, {benchmark.tasks[name].test} questions, sha256 {digest[:16]}")
    print(f"contact sheets: {folder / 'contact_sheets'}")
    return 0
