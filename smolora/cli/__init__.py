"""The command `smolora`: one subcommand a job, each in a module of its own.

A module has `add_arguments(parser)` and `run(args)`, which returns the exit status. Only the module that was asked for
is imported, so that `smolora --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

COMMANDS: dict[str, str] = {  # a module each, with an underscore for "-"
    "train": "Train on a stream of tasks by a recipe, and evaluate after each.",
    "evaluate": "Answer the benchmark's questions with a model, and score the answers.",
    "score": "Score a file of answers: the dataset's metric and MIF.",
    "metrics": "Compute AP, MAP, BWT and MIF from an accuracy matrix.",
    "report": "Write a report on one run or several: tables, figures, cases.",
    "make-minicvit": "Write MiniCVIT, the benchmark in small, made in code.",
    "convert-official": "Convert an adapter of the released code to a PEFT adapter, or back.",
    "assemble": "Make one LLaVA of a language model, a CLIP vision tower and a projector.",
    "embed": "Embed instructions, or show the embeddings of a file.",
    "doctor": "Print what this machine can run, and what is wrong with it, for a bug report.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand: 0 if it did its work, 1 after an error that it names, 2 for arguments it cannot read."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale without "±" must not end a run
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="smolora", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    if not argv or argv[0] not in COMMANDS:
        parser.parse_args(argv)  # exits: with help, or with an error
    name = argv[0]
    implementation = importlib.import_module(f".{name.replace('-', '_')}", __name__)
    implementation.add_arguments(parsers[name])
    args = parsers[name].parse_intermixed_args(argv[1:])  # key=value may stand before options and after them
    try:
        return implementation.run(args)
    except (OSError, ValueError) as error:
        print(f"smolora {name}: error: {error}", file=sys.stderr)
        return 1
