"""The plan of a run: paths checked, samples counted, steps and memory estimated, before anything is trained."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from ..backends import check_backend
from ..data.format import Conversation, Question, read_conversations, read_questions
from ..evaluate.benchmarks import find_dataset
from ..evaluate.datasets import Files
from ..io.files import has_file
from ..recipe import Recipe, TaskRecipe
from ..tuner.counts import num_trainable
from .data import check_samples, epoch_samples, recipe_backbone
from .look import look_at, sentence
from .methods import Method, Stage
from .prepare import planned
from .trainer import accumulation, steps_of

GIB = 2**30
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
ADAPTER_BYTES = 4  # a float32 weight that a stage does not train
OPTIMISER_BYTES = 4 + 4 + 8  # a trained float32 weight, its gradient, Adam's two moments


def make_plan(recipe: Recipe) -> dict[str, Any]:
    """Check the files of a recipe, and plan its run.

    Returns:
        "name", "method", "output"; "stages" and "downstream", each a list of "name", "train" and "test" (samples of the
        stage's own files), "extra" (samples that the method adds), "asked" (questions after it), "steps"; "config",
        sections of the recipe as the method uses them; "makes", paths that the recipe makes itself; "devices",
        "accumulation"; "data", what `look_at` finds in each task whose files are there; "memory", an estimate (None
        while there is no base model).

    Raises:
        ValueError: paths are missing (the message names all), records are malformed or too long, the batch does not fit
            the devices, the backend cannot run here, or there is no such method or preparation.
    """
    check_backend(recipe.backend)
    checker = _Checker(recipe)
    method = Method(recipe)
    devices = int(os.environ.get("WORLD_SIZE", 1))
    plan: dict[str, Any] = {"name": recipe.name, "method": method.name, "output": str(recipe.folder)}
    checker.folder(Path(recipe.model.path), "model.path", "config.json")
    if recipe.instructions.encoder is not None and method.adapter.text is not None:
        checker.folder(Path(recipe.instructions.encoder), "instructions.encoder", "modules.json")
    counts = {task.name: checker.task(task) for task in recipe.all_tasks}
    if checker.missing:
        raise ValueError("\n".join(["there is no", *(f"  {line}" for line in checker.missing)]))
    stages = [*method.course.stages(), *method.course.downstream()]
    image_tokens = 0
    if Path(recipe.model.path).is_dir():
        backbone = recipe_backbone(recipe)
        trained = [stage for stage in stages if all(recipe.train_file(task).is_file() for task in stage.train)]
        most = check_samples(recipe, trained, backbone)
        image_tokens = most or backbone.image_tokens or 0
    plan["stages"] = [_stage(stage, counts, recipe, method) for stage in method.course.stages()]
    plan["downstream"] = [_stage(stage, counts, recipe, method) for stage in method.course.downstream()]
    plan["config"] = method.settings()
    plan["data"] = checker.looks
    plan["makes"] = [str(path) for path in checker.made]
    for stage in stages:
        accumulation(recipe.of_stage(stage.train), devices)
    plan["devices"], plan["accumulation"] = devices, accumulation(recipe, devices)
    plan["memory"] = (
        estimate_memory(recipe, method, devices, image_tokens) if Path(recipe.model.path).is_dir() else None
    )
    return plan


def _stage(stage: Stage, counts: dict[str, tuple[int, int]], recipe: Recipe, method: Method) -> dict[str, Any]:
    train = sum(counts[task.name][0] for task in stage.train)
    extra = method.num_extra_samples(stage, {name: trained for name, (trained, _) in counts.items()}) if train else 0
    own = stage.train or stage.test
    samples = epoch_samples(train, extra, method.half_extra)
    batch_size = recipe.of_stage(stage.train).training.batch_size
    return {
        "name": stage.name.rpartition("/")[2] if stage.table else stage.name.split("-", 2)[2],
        "folder": stage.name,
        "train": train,
        "extra": extra,
        "test": sum(counts[task.name][1] for task in own),
        "asked": sum(counts[task.name][1] for task in stage.test),
        "steps": steps_of(samples, batch_size, recipe.epochs(stage.train)) if train else 0,
    }


class _Checker:
    """Checks that the files of a recipe exist, except those that it makes itself."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.planned = planned(recipe.prepare)
        self.made: list[Path] = []
        self.looks: dict[str, dict[str, Any]] = {}
        self.missing: list[str] = []

    def folder(self, path: Path, what: str, content: str) -> None:
        """Check a folder by a file in it."""
        if not (path / content).is_file() and self._makes(path) is None:
            self.missing.append(f"{path / content} ({what})")

    def task(self, task: TaskRecipe) -> tuple[int, int]:
        """Check the files of a task, and count its training samples and questions."""
        recipe = self.recipe
        try:
            dataset = find_dataset(task.benchmark_name, recipe.evaluation.protocol)
        except ValueError as error:
            raise ValueError(f"task {task.name!r}: {error} (or give the task a `dataset`)") from error
        train, test = recipe.train_file(task), recipe.test_file(task)
        if dataset.question_files is not None and test.name not in dataset.question_files:
            names = " or ".join(sorted(dataset.question_files))
            raise ValueError(
                f"{task.name}.test must be named {names}, as {task.benchmark_name} is scored by that file, got {test}"
            )
        images = recipe.images(task)
        samples: list[Conversation] = []
        questions: list[Question] = []
        trained = 0
        if task.train is not None:
            trained = self._count(train, f"{task.name}.train", read_conversations, images, samples)
        asked = self._count(test, f"{task.name}.test", read_questions, images, questions)
        if samples or questions:
            self.looks[task.name] = look_at(samples, questions, images)
        if test.is_file():
            folders = recipe.annotations(task)
            absent = [folder for folder in folders if not folder.is_dir()]
            self.missing += [f"{folder} (data.annotations)" for folder in absent]
            if not absent:  # reads all files that scoring needs
                dataset.load(Files(folders, task.benchmark_name), test.name)
        return trained, asked

    def _count(self, path: Path, what: str, read: Callable[[Path], list], images: Path, records: list) -> int:
        """Check a file, and count its records, which are added to `records` if it is there."""
        if path.is_file():
            records += read(path)
            self._images(records, path, images)
            return len(records)
        made = self._makes(path)
        if made is None:
            self.missing.append(f"{path} ({what})")
        return made or 0

    def _images(self, records: Iterable[Conversation | Question], file: Path, folder: Path) -> None:
        """Check that all images exist. The first missing one is named, the others are counted."""
        there: dict[str, bool] = {}
        absent = []
        for record in records:
            for image in record.images:
                if image not in there:
                    there[image] = has_file(folder / image)
                if not there[image]:
                    absent.append((record, image))
                    break
        if absent and self._makes(folder) is None:
            more = f", and {len(absent) - 1} more of that file" if len(absent) > 1 else ""
            self.missing.append(f"{folder / absent[0][1]} ({file}: record {absent[0][0].index}{more})")

    def _makes(self, path: Path) -> int | None:
        """Number of records of a path that the recipe makes, 0 if it has none; None if it does not make it."""
        if path.resolve() not in self.planned:
            return None
        if path not in self.made:
            self.made.append(path)
        return self.planned[path.resolve()] or 0


def estimate_memory(recipe: Recipe, method: Method, devices: int, image_tokens: int) -> dict[str, Any]:
    """Estimate the memory of a device that holds the whole model. Activations follow a rule of thumb.

    Args:
        image_tokens: tokens that stand for the images of a sample.
    """
    config = AutoConfig.from_pretrained(recipe.model.path, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
        base = sum(p.numel() for p in model.parameters())
        model.requires_grad_(False)
        if method.adapter.config(model) is not None:
            model = method.adapter.start(model, None)
            method.freeze(model, method.course.stages()[0])
        trainable = num_trainable(model)
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad) - base
        held = method.memory(model) + ADAPTER_BYTES * frozen
    text, training = config.text_config, recipe.training
    tokens = training.per_device_batch_size * min(training.max_length, image_tokens + 128)
    size = BYTES[recipe.model.dtype]
    # a decoder layer saves about 8 tensors of hidden size and 3 of FFN size per token for backward
    layer = tokens * size * (8 * text.hidden_size + 3 * text.intermediate_size)
    saved = layer * text.num_hidden_layers
    if training.activation_checkpointing:
        saved = layer + tokens * size * text.hidden_size * text.num_hidden_layers
    logits = tokens * text.vocab_size * (size + 4)
    parts = {
        "base_gib": base * size / GIB,
        "adapter_gib": trainable * OPTIMISER_BYTES / GIB,
        "activations_gib": (saved + logits) / GIB if trainable else 0.0,
        "method_gib": held / GIB,
    }
    return {
        "base_parameters": base,
        "trainable_parameters": trainable,
        **parts,
        "total_gib": sum(parts.values()),
        "assumes": f"{tokens} tokens a device at a time; sharding of {devices} device(s) not counted",
    }


def print_plan(plan: dict[str, Any]) -> None:
    """Print a plan as text."""
    print(f"{plan['name']}: {plan['method']}, into {plan['output']}")
    stages = [(kind, stage) for kind in ("stages", "downstream") for stage in plan[kind]]
    columns = {"name": "stage", "train": "train", "extra": "extra", "steps": "steps", "test": "test"}
    columns["asked"] = "asked after it"
    if not any(stage["extra"] for _, stage in stages):
        del columns["extra"]
    rows: list[tuple[str, ...]] = [("", *columns.values())]
    rows += [(kind, *(str(stage[key]) for key in columns)) for kind, stage in stages]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left, right = row[:2], row[2:]
        cells = [cell.ljust(width) for cell, width in zip(left, widths, strict=False)]
        print("  ".join([*cells, *(cell.rjust(width) for cell, width in zip(right, widths[2:], strict=True))]).rstrip())
    for section in ("adapter", "baseline"):
        if values := [f"{key} {value}" for key, value in plan["config"][section].items() if value is not None]:
            print(f"{section}: {', '.join(values)}")
    for name, look in plan["data"].items():
        print(sentence(name, look))
    for path in plan["makes"]:
        print(f"makes {path}")
    memory = plan["memory"]
    if memory is None:
        print("memory: not known before the base model is there")
    else:
        of_method = f", what {plan['method']} keeps {memory['method_gib']:.2f}" if memory["method_gib"] else ""
        print(
            f"memory, estimated: {memory['total_gib']:.2f} GiB (base {memory['base_gib']:.2f}, "
            f"{memory['trainable_parameters']:,} trained parameters and their optimiser {memory['adapter_gib']:.2f}, "
            f"activations {memory['activations_gib']:.2f}{of_method}; {memory['assumes']})"
        )
