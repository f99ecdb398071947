"""`smolora assemble`: the parts of a LLaVA or of a MiniGPT-4 to one model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..io.files import join_names, path_argument
from ..official.assemble import assemble
from ..official.minigpt4 import assemble_minigpt4
from ..official.parts import TOKENIZER_FILES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--language",
        required=True,
        type=path_argument,
        metavar="DIR",
        help="the language model, as transformers saves it",
    )
    parser.add_argument(
        "--vision",
        required=True,
        type=path_argument,
        metavar="PATH",
        help="folder of a CLIP model, or of its vision half; with --minigpt4 the file eva_vit_g.pth",
    )
    parser.add_argument(
        "--qformer", type=path_argument, metavar="FILE", help="with --minigpt4: blip2_pretrained_flant5xxl.pth"
    )
    parser.add_argument(
        "--projector",
        required=True,
        type=path_argument,
        metavar="FILE",
        help="mm_projector.bin; with --minigpt4 its checkpoint, pretrained_minigpt4.pth",
    )
    parser.add_argument(
        "--output", required=True, type=path_argument, metavar="DIR", help="a new folder for the assembled model"
    )
    parser.add_argument(
        "--minigpt4", action="store_true", help="assemble a MiniGPT-4 with Vicuna, as transformers' Blip2"
    )


def run(args: argparse.Namespace) -> int:
    if args.minigpt4 != (args.qformer is not None):
        given = "--minigpt4 without --qformer" if args.minigpt4 else f"--qformer {args.qformer} without --minigpt4"
        raise ValueError(f"a MiniGPT-4 needs --minigpt4 and --qformer, and a LLaVA neither; got {given}")
    if args.minigpt4:
        parts = args.language, args.vision, args.qformer, args.projector
        for argument, names in assemble_minigpt4(*parts, args.output).items():
            if names:
                print(f"left out of --{argument}, as in the released code: {join_names(names)}", file=sys.stderr)
    else:
        assemble(args.language, args.vision, args.projector, args.output)
    print(f"wrote {args.output}")
    if not any(Path(args.language, name).exists() for name in TOKENIZER_FILES):
        print(f"it has no tokenizer, since {args.language} has none: training and evaluation need one", file=sys.stderr)
    return 0
