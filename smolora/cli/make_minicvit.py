"""`smolora make-minicvit`: the data of MiniCVIT."""

from __future__ import annotations

import argparse
import json

from ..io.files import path_argument, read_text
from ..minicvit.tasks import TASKS, make_minicvit, training_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=path_argument, metavar="DIR", help="where to write it")
    parser.add_argument(
        "--task", action="append", choices=TASKS, metavar="NAME", help="only this task; may be given several times"
    )


def run(args: argparse.Namespace) -> int:
    folder = make_minicvit(args.folder, args.task)
    for name in args.task or TASKS:
        digest = json.loads(read_text(folder / "annotations" / name / "digest.json"))["sha256"]
        train = max(training_files(name).values(), default=0)
        print(f"{name:<10} {train:>5} training samples, {TASKS[name].test} questions, sha256 {digest[:16]}")
    print(f"contact sheets: {folder / 'contact_sheets'}")
    return 0
