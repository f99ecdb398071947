"""`smolora report`: folders of runs to a report with tables and figures, as a page and as Markdown."""

from __future__ import annotations

import argparse
import json

from ..io.files import path_argument, read_text
from ..report import write_report
from ..report.layout import read_runs
from .output import add_output_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=path_argument, metavar="RUN_DIR", help="folder of a run; several are compared"
    )
    parser.add_argument(
        "--output", type=path_argument, metavar="DIR", help="folder for the report (default: RUN_DIR/report)"
    )
    add_output_arguments(parser, "the figures after the last stage and the paths of the report")
    parser.add_argument("--cases", type=int, default=0, metavar="N", help="show N questions of each task with answers")


def run(args: argparse.Namespace) -> int:
    if args.cases < 0:
        raise ValueError(f"--cases must be 0 or more, got {args.cases}")
    path = write_report(args.runs, args.output, cases_per_task=args.cases)
    page = path.with_suffix(".html")
    if args.json:
        figures = {run.name: run.last for run in read_runs(args.runs)}
        print(json.dumps({"page": str(page), "markdown": str(path), "figures": figures}))
        return 0
    if not args.quiet:
        print(read_text(path).split("\n## ")[1])  # what it comes to, after the last stage
    print(page)
    print(path)
    return 0
