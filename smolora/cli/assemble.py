"""`smolora assemble`: a language model, a vision tower and a projector to a LLaVA."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..io.files import path_argument
from ..official.assemble import TOKENIZER_FILES, assemble


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--language",
        required=True,
        type=path_argument,
        metavar="DIR",
        help="the language model, as transformers saves it",
    )
    parser.add_argument(
        "--vision", required=True, type=path_argument, metavar="DIR", help="a CLIP model, or its vision half"
    )
    parser.add_argument("--projector", required=True, type=path_argument, metavar="FILE", help="mm_projector.bin")
    parser.add_argument("--output", required=True, type=path_argument, metavar="DIR", help="a new folder for the LLaVA")


def run(args: argparse.Namespace) -> int:
    assemble(args.language, args.vision, args.projector, args.output)
    print(f"wrote {args.output}")
    if not any(Path(args.language, name).exists() for name in TOKENIZER_FILES):
        print(f"it has no tokenizer, since {args.language} has none: training and evaluation need one", file=sys.stderr)
    return 0
