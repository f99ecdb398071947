"""Test sets answered and scored, one after the other: what the trainer does after each stage, and `smolora evaluate`.

OUTPUT/answers/TextVQA.jsonl ...    what `smolora.evaluate.generate` writes for each task
OUTPUT/scores.json                  {"TextVQA": {what `smolora score --json` prints}, ...}
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import AutoModelForImageTextToText, AutoTokenizer

from ..data.format import Skipped, read_questions
from ..data.images import ImageTransform
from ..data.prompts import PromptEncoder
from .datasets import DATASETS, PROTOCOLS, Files, find_dataset
from .generate import Embed, GenerationSettings, Job, generate_answers, process_state, write_whole
from .instructions import SOURCES, instruction_embeds
from .score import Score, score

PADDINGS = ("all", "released")
DTYPES = ("auto", "float32", "float16", "bfloat16")


def evaluate_tasks(
    model: nn.Module,
    encoder: PromptEncoder,
    transform: ImageTransform,
    tasks: Sequence[str],
    *,
    annotations: Sequence[Path],
    images: Path,
    output: Path,
    model_id: str,
    embed: Mapping[str, Embed] | None = None,
    settings: GenerationSettings | None = None,
    max_new_tokens: int | None = None,
    padding: str = "all",
    protocol: str = "smolora",
) -> dict[str, Score]:
    """Answer and score test sets. Started again, it goes on where it was stopped; see `generate_answers`.

    Args:
        model: a LLaVA, with adapters or without, in eval mode and on its device.
        encoder: makes its prompts.
        transform: makes its images.
        tasks: names of `DATASETS`.
        annotations: folders with their files.
        images: folder that the records' image paths start in.
        output: folder for answers and scores.
        model_id: the model's name in the answers.
        embed: for each task what makes instruction embeddings of its questions, for a model that takes them.
        settings: of the generation.
        max_new_tokens: of every answer; by default the released number of each dataset.
        padding: "all" pads every image to a square, as in training; "released" leaves that out for the four datasets
            that the released evaluation does not pad.
        protocol: of the scores.

    Returns:
        Scores by task; the same on every process.

    Raises:
        ValueError: a task, a file or an argument is wrong. What can be known before the first answer is.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(map(repr, PADDINGS))}, got {padding!r}")
    settings = settings or GenerationSettings()
    jobs = []
    for task in tasks:
        spec = find_dataset(task)
        spec.scoring(protocol)
        questions = Files(annotations, task).find(spec.questions)
        broken: list[Skipped] = []
        if settings.skip_broken:
            read_questions(questions, broken=broken)
        # what scoring needs is there, and whole
        spec.load(Files(annotations, task, {record.index for record in broken}), spec.questions)
        jobs.append(Job(task, questions, images, output / "answers" / f"{task}.jsonl", model_id))
    scores = {}
    for job in jobs:
        spec = DATASETS[job.dataset]
        generate_answers(
            model, encoder,
            ImageTransform(transform.processor, square=padding == "all" or spec.released_square),
            job, embed=embed and embed[job.dataset],
            settings=replace(settings, max_new_tokens=max_new_tokens or spec.max_new_tokens),
        )  # fmt: skip
        scores[job.dataset] = score(job.dataset, annotations, job.output, protocol)
    if PartialState().is_main_process:
        content = {task: result.as_dict() for task, result in scores.items()}
        write_whole(output / "scores.json", json.dumps(content, indent=1) + "\n")
    return scores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="the base: a LLaVA of transformers, with its tokenizer and image processor")
    add("--adapter", help="folder of a PEFT adapter on it")
    add("--task", required=True, action="append", help=f"may be given several times: {', '.join(DATASETS)}")
    add(
        "--annotations", required=True, action="append", type=Path, metavar="DIR",
        help="folder with the tasks' files, or with a subfolder for each; may be given several times",
    )  # fmt: skip
    add("--images", required=True, type=Path, metavar="DIR", help="folder that the records' image paths start in")
    add("--output", required=True, type=Path, metavar="DIR", help="folder for answers and scores")
    add("--model-id", help="the model's name in the answers (default: the adapter's or the model's folder)")
    add(
        "--instruction", choices=SOURCES, default="sample",
        help="what the adapter routes by: each question's own instruction, the mean of a task's, or the rows saved "
        "with the adapter, one a task, as released (default: %(default)s)",
    )  # fmt: skip
    add("--encoder", metavar="DIR", help="the sentence encoder (default: the packaged all-MiniLM-L6-v2)")
    add("--dtype", choices=DTYPES, default="auto", help="of the base (default: as its folder has it)")
    add(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    add("--max-new-tokens", type=int, help="of an answer (default: as released, 1024 for four tasks and 128 for six)")
    add(
        "--token-budget", type=int, default=GenerationSettings.token_budget,
        help="tokens of a batch's prompts, padding and image included (default: %(default)s)",
    )  # fmt: skip
    add("--image-workers", type=int, default=GenerationSettings.image_workers, help="default: %(default)s")
    add(
        "--padding", choices=PADDINGS, default="all",
        help="pad images to a square for all tasks, as in training, or for the released six (default: %(default)s)",
    )  # fmt: skip
    add("--protocol", choices=PROTOCOLS, default="smolora", help="of the scores (default: %(default)s)")
    add("--skip-broken", action="store_true", help="leave out broken records and images, count and list them")
    add("--routes", action="store_true", help="save the routes, alpha and beta of every sample")


def run(args: argparse.Namespace) -> int:
    settings = GenerationSettings(
        token_budget=args.token_budget, image_workers=args.image_workers, skip_broken=args.skip_broken,
        routes_per_sample=args.routes,
    )  # fmt: skip
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    broken: list[Skipped] | None = [] if args.skip_broken else None
    questions = {
        task: read_questions(Files(args.annotations, task).find(find_dataset(task).questions), broken=broken)
        for task in args.task
    }
    state = process_state(on_cpu=args.device == "cpu")
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=args.dtype)
    encoder = PromptEncoder.for_model(AutoTokenizer.from_pretrained(args.model), model.config)
    embed = None
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter)
        embed = instruction_embeds(args.instruction, model.active_peft_config, args.adapter, questions, args.encoder)
    model = model.to(state.device).eval()
    scores = evaluate_tasks(
        model, encoder, ImageTransform.from_pretrained(args.model), args.task, annotations=args.annotations,
        images=args.images, output=args.output, model_id=args.model_id or Path(args.adapter or args.model).name,
        embed=embed, settings=settings, max_new_tokens=args.max_new_tokens, padding=args.padding,
        protocol=args.protocol,
    )  # fmt: skip
    if state.is_main_process:
        print(*scores.values(), sep="\n")
    return 0
