"""`smolora judge`: a language model rates answers from 0 to 10."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..evaluate.judge import CRITERIA, SAMPLING, JudgeSettings, judge_answers
from ..io.files import path_argument
from .evaluate import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, type=path_argument, metavar="DIR", help="the judge, a causal language model")
    add("--questions", required=True, type=path_argument, metavar="FILE", help="the test file, with the references")
    add("--answers", required=True, type=path_argument, metavar="FILE", help="the answers, JSON lines")
    add("--output", required=True, type=path_argument, metavar="FILE", help="for the ratings, JSON lines")
    add(
        "--criteria",
        choices=CRITERIA,
        default=JudgeSettings.criteria,
        help="what is rated: what the answer knows, or where it places something (default: %(default)s)",
    )
    add(
        "--sample",
        action="store_true",
        help="draw replies, as CoIN does ("
        + ", ".join(f"{name} {value}" for name, value in SAMPLING.items() if value)
        + "); without it they are greedy",
    )
    add("--seed", type=int, default=JudgeSettings.seed, help="of the draws (default: %(default)s)")
    add("--max-new-tokens", type=int, default=JudgeSettings.max_new_tokens, help="of a reply (default: %(default)s)")
    add(
        "--token-budget",
        type=int,
        default=JudgeSettings.token_budget,
        help="tokens of a batch's prompts, padding included (default: %(default)s)",
    )
    add("--dtype", choices=DTYPES, default="auto", help="of the judge (default: as its folder has it)")
    add(
        "--device",
        choices=("cuda", "cpu", "auto"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="auto: spread over all GPUs (default: %(default)s)",
    )
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    settings = JudgeSettings(args.criteria, args.sample, args.seed, args.max_new_tokens, args.token_budget)
    if not Path(args.model, "config.json").is_file():
        raise ValueError(f"--model must be the folder of a language model, got {args.model}, which has no config.json")
    for name in ("questions", "answers"):
        if not getattr(args, name).is_file():
            raise ValueError(f"--{name} must be a file, got {getattr(args, name)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that torch sees, and there is none: leave it out, or --device cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    spread = {"device_map": "auto"} if args.device == "auto" else {}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, local_files_only=True, **spread)
    found = judge_answers(
        (model if spread else model.to(args.device)).eval(),
        tokenizer,
        args.questions,
        args.answers,
        args.output,
        model_id=Path(args.model).resolve().name,
        settings=settings,
    )
    print(json.dumps(found._asdict()) if args.json else found)
    return 0
