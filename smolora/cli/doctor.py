"""`smolora doctor`."""

from __future__ import annotations

import argparse

from ..doctor import diagnose


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: it prints all it knows."""


def run(args: argparse.Namespace) -> int:
    print(diagnose().markdown(), end="")
    return 0
