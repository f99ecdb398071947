"""`smolora make-minicoin`: the data of MiniCoIN."""

from __future__ import annotations

import argparse

from ..minicvit.minicoin import MINICOIN
from . import make_minicvit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    make_minicvit.add_arguments(parser, MINICOIN)


def run(args: argparse.Namespace) -> int:
    return make_minicvit.run(args, MINICOIN)
