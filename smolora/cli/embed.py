"""`smolora embed`: instructions to a file of embeddings, or the rows of such a file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ..instructions.encoder import InstructionEncoder
from ..io.embeddings import INSTRUCTION_FILE, read_instruction_embeddings, write_instruction_embeddings
from ..io.files import path_argument, read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", action="append", metavar="TEXT", help="an instruction; may be given several times")
    source.add_argument(
        "--file",
        type=path_argument,
        metavar="FILE",
        help="a text file with an instruction a line, or a .json file with a list of them; a list in that list makes "
        "one row, the mean of its texts",
    )
    source.add_argument("--show", type=path_argument, metavar="FILE", help="print the rows of a file written before")
    parser.add_argument(
        "--output",
        type=path_argument,
        metavar="PATH",
        help=f"a .safetensors file, or a folder to write {INSTRUCTION_FILE} into",
    )
    parser.add_argument(
        "--model",
        type=path_argument,
        metavar="DIR",
        help="the sentence encoder (default: the packaged all-MiniLM-L6-v2)",
    )
    parser.add_argument("--normalize", action="store_true", help="scale every embedding to length 1")


def _rows_of(path: Path) -> list[str | list[str]]:
    text = read_text(path)
    if path.suffix != ".json":
        return [line.strip() for line in text.split("\n") if line.strip()]
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--file must hold JSON, got {path} ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, str) or (isinstance(row, list) and row) for row in rows):
        raise ValueError(f"--file must hold a list of texts, or of lists of texts, got {rows!r:.80}")
    return rows


def run(args: argparse.Namespace) -> int:
    if args.show is not None:
        embeddings, texts = read_instruction_embeddings(args.show)
        print(f"{len(embeddings)} rows of {embeddings.shape[1]} numbers, {embeddings.dtype}")
        for row, (embedding, text) in enumerate(zip(embeddings, texts, strict=True)):
            print(f"{row}  length {embedding.norm():.4f}  {json.dumps(text, ensure_ascii=False)}")
        return 0
    if args.output is None:
        raise ValueError("--output must be given with --text and --file")
    rows = args.text if args.text is not None else _rows_of(args.file)
    if not rows:
        raise ValueError(f"--file must hold an instruction, got {args.file}, which has none")
    encoder = InstructionEncoder(args.model, normalize=args.normalize)
    several = [[row] if isinstance(row, str) else row for row in rows]
    encoder.encode([text for texts in several for text in texts])  # in few batches; below they come from the cache
    embeddings = torch.stack([encoder.encode(texts).mean(0) for texts in several])
    write_instruction_embeddings(args.output, embeddings, rows)
    print(f"wrote {len(rows)} rows of {encoder.dim} numbers to {args.output}")
    return 0
