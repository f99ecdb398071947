"""`smolora doctor`: a diagnosis of this machine."""

from __future__ import annotations

import argparse

from ..doctor import diagnose


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no arguments."""


def run(args: argparse.Namespace) -> int:
    print(diagnose().markdown(), end="")
    return 0
