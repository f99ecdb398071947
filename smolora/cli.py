"""The command `smolora`: one subcommand a job, each in the module that does the job.

A module of `COMMANDS` has `add_arguments(parser)` and `run(args)`, which returns the exit status. Only the module that
was asked for is imported, so that `smolora --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

COMMANDS: dict[str, tuple[str, str]] = {  # name: (module, what it does)
    "train": ("smolora.train.cli", "Train on a stream of tasks by a recipe, and evaluate after each."),
    "evaluate": ("smolora.evaluate.cli", "Answer the benchmark's questions with a model, and score the answers."),
    "score": ("smolora.evaluate.score", "Score a file of answers: the dataset's metric and MIF."),
    "metrics": ("smolora.evaluate.matrix", "Compute AP, MAP, BWT and MIF from an accuracy matrix."),
    "report": ("smolora.report", "Write a report on one run or several: tables, figures, cases."),
    "make-minicvit": ("smolora.data.minicvit", "Write MiniCVIT, the benchmark in small, made in code."),
    "convert-official": ("smolora.convert", "Convert an adapter of the released code to a PEFT adapter, or back."),
    "assemble": ("smolora.assemble", "Make one LLaVA of a language model, a CLIP vision tower and a projector."),
    "embed": ("smolora.instruction", "Embed instructions, or show the embeddings of a file."),
    "doctor": ("smolora.doctor", "Print what this machine can run, and what is wrong with it, for a bug report."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand: 0 if it did its work, 1 after an error that it names, 2 for arguments it cannot read."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale without "±" must not end a run
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="smolora", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, (_, text) in COMMANDS.items()}
    if not argv or argv[0] not in COMMANDS:
        parser.parse_args(argv)  # exits: with help, or with an error
    name = argv[0]
    implementation = importlib.import_module(COMMANDS[name][0])
    implementation.add_arguments(parsers[name])
    args = parsers[name].parse_intermixed_args(argv[1:])  # key=value may stand before options and after them
    try:
        return implementation.run(args)
    except (OSError, ValueError) as error:
        print(f"smolora {name}: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
