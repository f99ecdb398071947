"""`smolora convert-official`: an adapter of a released code to a PEFT adapter, or back."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..io.files import path_argument, read_json_object
from ..official import convert, convert_moelora


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, type=path_argument, metavar="DIR", help="the adapter to convert")
    parser.add_argument(
        "--output", required=True, type=path_argument, metavar="DIR", help="a new folder for what it becomes"
    )
    parser.add_argument(
        "--to-official", action="store_true", help="from a PEFT adapter to the released code's format, not from it"
    )


def run(args: argparse.Namespace) -> int:
    kind = read_json_object(Path(args.adapter) / "adapter_config.json").get("peft_type")
    to_official, from_official = convert.convert_to_official, convert.convert_official
    if kind in (convert_moelora.OFFICIAL_PEFT_TYPE, "MOELORA"):
        to_official, from_official = convert_moelora.convert_to_official, convert_moelora.convert_official
    (to_official if args.to_official else from_official)(args.adapter, args.output)
    print(f"wrote {args.output}")
    return 0
