"""`--quiet` and `--json`, which several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from ..io.progress import reporting_to, shows_bars


def add_output_arguments(parser: argparse.ArgumentParser, json: str) -> None:
    """Add the two options.

    Args:
        parser: the command's.
        json: what is printed as JSON.
    """
    parser.add_argument("--quiet", action="store_true", help="show no progress, only the result and errors")
    parser.add_argument("--json", action="store_true", help=f"print {json} as one JSON object; progress goes to stderr")


@contextmanager
def output_of(args: argparse.Namespace) -> Iterator[None]:
    """The context in which a command that has the two options works. transformers draws bars on a terminal alone."""
    from transformers.utils import logging  # takes a second, which `smolora report` does not need

    with reporting_to("nobody" if args.quiet else "program" if args.json else "people"):
        hidden = not shows_bars() and logging.is_progress_bar_enabled()
        if hidden:
            logging.disable_progress_bar()
        try:
            yield
        finally:
            if hidden:
                logging.enable_progress_bar()
