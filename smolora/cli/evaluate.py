"""`smolora evaluate`: a model and questions from a recipe or from options, to answers and scores."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from ..backbones.load import BACKBONES, load_backbone
from ..backends import check_backend, use_backend
from ..config import MixtureConfig, SMoLoRAConfig
from ..data.format import Skipped, read_questions
from ..evaluate.benchmarks import datasets_of
from ..evaluate.datasets import PROTOCOLS
from ..evaluate.generate import Embed, GenerationSettings, process_state
from ..evaluate.instructions import (
    SOURCES,
    check_size,
    question_instructions,
    recipe_instructions,
    recipe_questions,
    saved_instructions,
    whole_questions,
)
from ..evaluate.tasks import PADDINGS, Task, check_tasks, evaluate_tasks
from ..extras import require_extra
from ..io.files import path_argument
from .output import add_output_arguments, output_of

DTYPES = ("auto", "float32", "float16", "bfloat16")
OPTION_TO_RECIPE_KEY = {
    "model": "model.path",
    "dtype": "model.dtype",
    "prompt": "model.prompt",
    "annotations": "data.annotations",
    "images": "data.images",
    "instruction": "instructions.embed",
    "encoder": "instructions.encoder",
    "max_new_tokens": "evaluation.max_new_tokens",
    "token_budget": "evaluation.token_budget",
    "image_workers": "evaluation.workers",
    "padding": "evaluation.padding",
    "protocol": "evaluation.protocol",
}
DEFAULTS = {  # without a recipe
    "dtype": "auto",
    "instruction": "sample",
    "token_budget": GenerationSettings.token_budget,
    "image_workers": GenerationSettings.image_workers,
    "padding": "all",
    "protocol": "smolora",
}


class Request(NamedTuple):
    """The model, its questions, and how to ask them."""

    model: str
    dtype: str
    prompt: str | None
    tasks: list[Task]
    embed: Callable[[Any], Mapping[str, Embed]]  # by task, for an adapter of this configuration
    instructions: str  # how they are embedded, as a part of the run's identity
    settings: GenerationSettings
    max_new_tokens: int | None
    padding: str
    protocol: str
    backend: str = "auto"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--recipe",
        type=path_argument,
        help="ask the questions of a recipe (see recipes/); the options below override parts of it",
    )
    add("overrides", nargs="*", metavar="key=value", help="further changes to the recipe: data.root=DIR, ...")
    add(
        "--model",
        type=path_argument,
        help="the base: a model that takes images, with its tokenizer and image processor",
    )
    add("--adapter", type=path_argument, help="folder of a PEFT adapter on it")
    add(
        "--task",
        action="append",
        help=f"one of {', '.join(datasets_of())}, or with --recipe of its tasks (default: all); may be given several "
        "times",
    )
    add(
        "--annotations",
        action="append",
        type=path_argument,
        metavar="DIR",
        help="folder with the tasks' files, or with a subfolder for each; may be given several times",
    )
    add("--images", type=path_argument, metavar="DIR", help="folder that the records' image paths start in")
    add("--output", required=True, type=path_argument, metavar="DIR", help="folder for answers and scores")
    add("--model-id", help="the model's name in the answers (default: the adapter's or the model's folder)")
    add(
        "--instruction",
        choices=SOURCES,
        help="what the adapter routes by: each question's own instruction, the mean of a task's, or the rows saved "
        f"with the adapter, one a task, as released (default: {DEFAULTS['instruction']})",
    )
    add(
        "--encoder",
        type=path_argument,
        metavar="DIR",
        help="the sentence encoder (default: the packaged all-MiniLM-L6-v2)",
    )
    add("--dtype", choices=DTYPES, help="of the base (default: as its folder has it)")
    add(
        "--prompt",
        choices=sorted(BACKBONES),
        help="how the base is spoken to: LLaVA-1.5's prompt as released, or its own chat template (default: what its "
        "folder fits)",
    )
    add(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    add(
        "--max-new-tokens",
        type=int,
        help="of an answer (default: as released, 1024 for four tasks and 128 for six; 1024 with --protocol coin)",
    )
    add(
        "--token-budget",
        type=int,
        help=f"tokens of a batch's prompts, padding and image included (default: {DEFAULTS['token_budget']})",
    )
    add("--image-workers", type=int, help=f"default: {DEFAULTS['image_workers']}")
    add(
        "--padding",
        choices=PADDINGS,
        help="pad images to a square for all tasks, as in training, or for the released six, none with --protocol coin "
        f"(default: {DEFAULTS['padding']})",
    )
    add("--protocol", choices=PROTOCOLS, help=f"of the scores (default: {DEFAULTS['protocol']})")
    add("--skip-broken", action="store_true", help="leave out broken records and images, count and list them")
    add_output_arguments(parser, "the scores by task, in percent and unrounded,")
    add("--routes", action="store_true", help="save the routes, alpha and beta of every sample")


def run(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that torch sees, and there is none: leave it out, or --device cpu")
    if args.adapter and not Path(args.adapter, "adapter_config.json").is_file():
        raise ValueError(
            "--adapter must be the folder of a PEFT adapter (of a run: RUN_DIR/stage-.../adapter), "
            f"got {args.adapter}, which has no adapter_config.json"
        )
    with output_of(args):
        return _evaluate(args)


def _evaluate(args: argparse.Namespace) -> int:
    request = request_from_options(args) if args.recipe is None else request_from_recipe(args)
    if not Path(request.model, "config.json").is_file():
        raise ValueError(f"--model must be the folder of a model, got {request.model}, which has no config.json")
    check_backend(request.backend)
    check_tasks(request.tasks, request.protocol, skip_broken=args.skip_broken)
    state = process_state(on_cpu=args.device == "cpu")
    backbone = load_backbone(request.model, request.prompt)
    if request.padding == "released":
        backbone.cropping()  # refuses before anything is loaded
    model = AutoModelForImageTextToText.from_pretrained(request.model, dtype=request.dtype)
    embed = None
    if args.adapter:
        try:
            model = PeftModel.from_pretrained(model, str(args.adapter))
        except (KeyError, RuntimeError) as error:  # tensors that are missing, unknown or of another shape
            raise ValueError(f"--adapter {args.adapter} does not fit {request.model}: {error}") from error
        config = model.active_peft_config
        finds = isinstance(config, MixtureConfig) and config.finds_by_question
        if finds:
            _check_selector(model, config, request.tasks, args.adapter)
        if finds or isinstance(config, SMoLoRAConfig):
            embed = request.embed(config)
    with use_backend(request.backend):
        scores = evaluate_tasks(
            model.to(state.device).eval(),
            backbone,
            request.tasks,
            output=args.output,
            model_id=args.model_id or folder_name(args.adapter or request.model),
            embed=embed,
            instructions=None if embed is None else request.instructions,
            settings=request.settings,
            max_new_tokens=request.max_new_tokens,
            padding=request.padding,
            protocol=request.protocol,
        )
    if state.is_main_process and args.json:
        print(json.dumps({name: score.as_dict() for name, score in scores.items()}))
    elif state.is_main_process:
        for name, score in scores.items():
            print(score if name == score.dataset else f"{name}: {score}")
            score.show_remark()
    return 0


def _check_selector(model: Any, config: Any, tasks: Sequence[Task], folder: Path) -> None:
    """Check that a task that is not given can be found.

    Raises:
        ValueError: the adapter was trained with given tasks, so it has nothing to find them by.
    """
    selector = model.base_model.selector()
    if selector.is_ready or getattr(config, "num_tasks", None) == 1 or all(task.task_id is not None for task in tasks):
        return
    raise ValueError(
        f"--adapter {folder} was trained with given tasks (task: oracle) and cannot find them: ask it by --recipe "
        "RUN_DIR/recipe.yaml, which gives them"
    )


def folder_name(path: str | Path) -> str:
    """Return the name of a model's folder; for an adapter that the trainer saved, the name of its stage."""
    path = Path(path).resolve()
    return path.parent.name if path.name == "adapter" else path.name


def request_from_options(args: argparse.Namespace) -> Request:
    """Make the request for tasks of the benchmark."""
    if args.overrides:
        raise ValueError(f"{args.overrides[0]} changes a recipe, which must be given by --recipe")
    for name in ("model", "task", "annotations", "images"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} must be given, or a --recipe that says it")
    given = {name: getattr(args, name) for name in OPTION_TO_RECIPE_KEY if getattr(args, name) is not None}
    options = argparse.Namespace(**{**dict.fromkeys(OPTION_TO_RECIPE_KEY), **DEFAULTS, **given})
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    folders, images = [Path(folder) for folder in options.annotations], Path(options.images)
    tasks = [Task.of_benchmark(name, folders, images, options.protocol) for name in dict.fromkeys(args.task)]

    def embed(config: Any) -> Mapping[str, Embed]:
        if config.finds_by_question:
            return whole_questions(config, tasks, options.encoder)
        if options.instruction == "saved":
            return saved_instructions(config, args.adapter, tasks)
        broken: list[Skipped] | None = [] if args.skip_broken else None
        questions = {task.name: read_questions(task.questions, broken=broken) for task in tasks}
        return question_instructions(options.instruction, config, questions, options.encoder)

    return Request(
        str(options.model),
        options.dtype,
        options.prompt,
        tasks,
        embed,
        f"{options.instruction}, encoder {options.encoder}",
        GenerationSettings(
            token_budget=options.token_budget,
            image_workers=options.image_workers,
            skip_broken=args.skip_broken,
            routes_per_sample=args.routes,
        ),
        options.max_new_tokens,
        options.padding,
        options.protocol,
    )


def request_from_recipe(args: argparse.Namespace) -> Request:
    """Make the request for a recipe's tasks, all of them or those of `--task`."""
    require_extra("eval", user="--recipe")
    from ..recipe import load_recipe
    from ..train.methods import Method

    given = {name: getattr(args, name) for name in OPTION_TO_RECIPE_KEY if getattr(args, name) is not None}
    saved = given.get("instruction") == "saved"
    if saved:
        del given["instruction"]
    short = [f"{OPTION_TO_RECIPE_KEY[name]}={json.dumps(value, default=str)}" for name, value in given.items()]
    recipe = load_recipe(args.recipe, [*args.overrides, *short])
    known = {task.name: task for task in recipe.all_tasks}
    for name in args.task or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--task must be one of {args.recipe}'s tasks, {', '.join(known)}, got {name!r}{hint}")
    asked = [known[name] for name in dict.fromkeys(args.task or known)]
    adapter = Method(recipe).adapter if args.adapter else None
    tasks = [Task.from_recipe(recipe, task, None if adapter is None else adapter.answers_as(task)) for task in asked]

    def embed(config: Any) -> Mapping[str, Embed]:
        if config.finds_by_question:
            questions = recipe_questions(recipe)
            check_size(questions[asked[0].name].encoder.dim, config, "the sentence encoder")
            return questions
        if saved:
            return saved_instructions(config, args.adapter, tasks)
        embeds = recipe_instructions(recipe)
        check_size(embeds[asked[0].name].encoder.dim, config, "the sentence encoder")
        return embeds

    evaluation = recipe.evaluation
    return Request(
        recipe.model.path,
        recipe.model.dtype,
        recipe.model.prompt,
        tasks,
        embed,
        "saved" if saved else str(recipe.instructions),
        GenerationSettings(
            token_budget=evaluation.token_budget,
            image_workers=evaluation.workers,
            skip_broken=args.skip_broken,
            routes_per_sample=args.routes,
        ),
        evaluation.max_new_tokens,
        evaluation.padding,
        evaluation.protocol,
        recipe.backend,
    )
