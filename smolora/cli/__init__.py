"""The command `smolora`, with a module for each subcommand.

A subcommand's module has `add_arguments(parser)` and `run(args)`, which returns the exit status. Only the module of the
subcommand that was given is imported, so that `smolora --help` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ..extras import MissingExtraError, require_extra


class Command(NamedTuple):
    """A subcommand: its help, and the extra without which its module cannot be imported."""

    help: str
    extra: str | None = None


COMMANDS: dict[str, Command] = {  # their modules have underscores for hyphens
    "init": Command("Read files of your own, write them in the benchmark's format, and draft a recipe.", "eval"),
    "train": Command("Train on a stream of tasks by a recipe, and evaluate after each.", "eval"),
    "sweep": Command("Train the runs of a grid over a recipe's keys, and compare them.", "eval"),
    "evaluate": Command("Answer the benchmark's questions with a model, and score the answers.", "llava"),
    "score": Command("Score a file of answers: the dataset's metric and MIF."),
    "judge": Command("Have a language model rate answers from 0 to 10.", "llava"),
    "metrics": Command("Compute AP, MAP, BWT and MIF from an accuracy matrix."),
    "report": Command("Write a report on one run or several: tables, figures, cases.", "report"),
    "demo": Command("Ask the models of finished runs on a web page.", "demo"),
    "make-minicvit": Command("Write MiniCVIT, a small synthetic version of the benchmark.", "minicvit"),
    "make-minicoin": Command("Write MiniCoIN, a small synthetic version of CoIN.", "minicvit"),
    "convert-official": Command("Convert an adapter of the released code to a PEFT adapter, or back."),
    "assemble": Command(
        "Assemble a LLaVA or a MiniGPT-4 from a language model, a vision tower and a projector.", "llava"
    ),
    "embed": Command("Embed instructions, or show the embeddings of a file."),
    "doctor": Command("Print what this machine can run, and what is wrong with it, for a bug report."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        The exit status: 0 on success, 1 on a reported error. A usage error exits with 2.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale without "±" must not end a run
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="smolora", description=__doc__.partition("\n")[0])
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    parsers = {
        name: subparsers.add_parser(name, help=command.help, description=command.help)
        for name, command in COMMANDS.items()
    }
    if not argv or argv[0] not in COMMANDS:
        parser.parse_args(argv)  # exits: with help, or with an error
    name = argv[0]
    try:
        extra = COMMANDS[name].extra
        if extra is not None:
            require_extra(extra, user="this command")
        module = importlib.import_module(f".{name.replace('-', '_')}", __name__)
        module.add_arguments(parsers[name])
        args = parsers[name].parse_intermixed_args(argv[1:])  # key=value may stand before options and after them
        return module.run(args)
    except (OSError, ValueError, MissingExtraError) as error:
        print(f"smolora {name}: error: {error}", file=sys.stderr)
        return 1
