"""A run: stage after stage trained and asked, and what came out; killed anywhere, the same call goes on.

What is in its folder is said in `smolora.report.layout`. On top, for each stage:

    RUN_DIR/recipe.yaml           the recipe with all its defaults
    RUN_DIR/stage-2-TextVQA/
      checkpoints/                while it trains; loggers of training.arguments.report_to write here too
      adapter/                    there when its training is done
      log.json                    the trainer's log
      training.json               samples, steps, trained parameters, and "timing"
      kept/                       what the method keeps for later stages, if anything
      evaluation.json             "timing" of the answers
    RUN_DIR/downstream-few-shot/
      Places365, 5-shot/          the adapter of a task that is trained downstream, and what goes with it
"""

from __future__ import annotations

import gc
import json
import os
import platform
import shutil
import time
import zlib
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..backends import use_backend
from ..data.images import ImageTransform
from ..data.prompts import PromptEncoder
from ..evaluate.generate import GenerationSettings, Job, generate_answers, process_state
from ..evaluate.matrix import continual_metrics
from ..evaluate.score import find_dataset, score
from ..io.files import atomic_write_text, locked, read_text, write_json
from ..recipe import Recipe, TaskRecipe
from .data import Collator, Instructions, Samples, TaskSamples, check_samples
from .methods import Stage, find_method
from .prepare import prepare
from .trainer import ContinualTrainer, steps_of, training_arguments, whole_checkpoints

# a change of these changes how a run is computed, or what is asked at its end, and nothing that is there already
CHANGEABLE = (
    "output", "training.per_device_batch_size", "training.activation_checkpointing", "training.save_steps",
    "training.logging_steps", "training.workers", "training.arguments.report_to", "evaluation.workers", "downstream",
)  # fmt: skip


class Run:
    """A recipe's run.

    Args:
        recipe: what to do.

    Raises:
        ValueError: the folder belongs to a run of another recipe.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.folder = recipe.folder
        self.method = find_method(recipe.method)(recipe)
        self.state = process_state(on_cpu=not torch.accelerator.is_available())
        self.check_folder()

    def check_folder(self) -> None:
        """Refuse to go on with another recipe's run.

        Raises:
            ValueError: the folder belongs to one; what differs is named.
        """
        path = self.folder / "recipe.yaml"
        if not path.exists():
            return
        old = _flat(yaml.safe_load(read_text(path)))
        new = _flat(self.recipe.as_dict())
        different = [
            f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
            for key in {**old, **new}
            if old.get(key) != new.get(key) and not any(f"{key}.".startswith(f"{name}.") for name in CHANGEABLE)
        ]
        if different:
            raise ValueError(
                f"{self.folder} has a run of another recipe ({'; '.join(different)}): remove it, or name another output"
            )

    def __call__(self) -> dict[str, Any]:
        """Do what is left to do.

        Returns:
            The content of results.json.

        Raises:
            ValueError: something of the input does not fit, or the training cannot go on; the message says what.
            BlockingIOError: another process is at this run.
        """
        main = self.state.is_main_process
        with locked(self.folder / "run.lock", str(self.folder)) if main else nullcontext():
            return self._go_on(main)

    def _go_on(self, main: bool) -> dict[str, Any]:
        if main:
            self.check_folder()  # now that nobody else writes to it
            seen = torch.accelerator.device_count()
            if self.state.num_processes == 1 and seen > 1:
                print(
                    f"{seen} devices are there and one is used: start it by torchrun --nproc-per-node {seen} for all",
                    flush=True,
                )
            prepare(self.recipe.prepare)
            atomic_write_text(self.folder / "recipe.yaml", yaml.safe_dump(self.recipe.as_dict(), sort_keys=False))
        self.state.wait_for_everyone()
        self.load_parts()
        stages = [*self.method.stages(), *self.method.downstream()]
        check_samples(self.recipe, stages, self.encoder)
        with use_backend(self.recipe.backend):
            for number, stage in enumerate(stages):
                if main:
                    print(f"== {self.recipe.name}: {stage.name} ({number + 1} of {len(stages)})", flush=True)
                if stage.train and not self.adapter(stage).is_dir():
                    self.train(stage, stages[:number])
                if main:
                    self.tidy(stage)
                self.ask(stage)
                if main:
                    write_json(self.folder / "results.json", self.results())
                self.state.wait_for_everyone()
        return _read(self.folder / "results.json")

    # ---- parts

    def load_parts(self) -> None:
        """What turns files into a model's input."""
        path = self.recipe.model.path
        self.dtype = getattr(torch, self.recipe.model.dtype)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self.config = AutoConfig.from_pretrained(path, local_files_only=True)
        self.encoder = PromptEncoder.for_model(tokenizer, self.config)
        self.transform = ImageTransform.from_pretrained(path)
        self.instructions = Instructions(self.recipe) if self.method.takes_instructions else None

    def base(self) -> nn.Module:
        """The base model, frozen, on this process's device."""
        model = AutoModelForImageTextToText.from_pretrained(
            self.recipe.model.path, dtype=self.dtype, local_files_only=True
        )
        return model.requires_grad_(False).to(self.state.device)

    def place(self, stage: Stage) -> Path:
        """A stage's folder."""
        return self.folder / stage.name

    def table(self, stage: Stage) -> Path:
        """Where a stage's answers lie."""
        return self.folder / (stage.table or stage.name)

    def adapter(self, stage: Stage) -> Path:
        """A stage's adapter, which is there when its training is done."""
        return self.place(stage) / "adapter"

    def adapter_to_ask(self, stage: Stage) -> Path | None:
        """The adapter that answers a stage's questions: its own, else the one it starts from; None for the base."""
        if stage.train:
            return self.adapter(stage)
        return None if stage.starts_from is None else self.adapter_to_ask(stage.starts_from)

    # ---- training

    def train(self, stage: Stage, earlier: list[Stage]) -> None:
        """Train a stage, or go on with it, up to its adapter."""
        place = self.place(stage)
        kept = [self.place(other) / "kept" for other in earlier if other.train]
        # by the stage's name, so that no other stage that is run or left out changes what this one draws
        seed = (self.recipe.seed + zlib.crc32(stage.name.encode())) % 2**32
        set_seed(seed)
        previous = None if stage.starts_from is None else self.adapter_to_ask(stage.starts_from)
        model = self.method.start(self.base(), previous)
        model.config.use_cache = False
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        samples = self.samples(stage, kept)
        self.method.prepare(model, stage, kept)
        folder = place / "checkpoints"
        epochs = self.recipe.epochs(stage.train)
        steps = steps_of(len(samples), self.recipe.training.batch_size, epochs)
        arguments = training_arguments(self.recipe, folder, epochs, steps, seed, self.state.device.type != "cpu")
        whole = whole_checkpoints(folder)
        resume = whole[-1] if whole else None
        self.state.wait_for_everyone()  # all have looked before anything is removed or written
        if self.state.is_main_process:
            for path in folder.glob("checkpoint-*"):
                if path not in whole:
                    shutil.rmtree(path)
        self.state.wait_for_everyone()
        trainer = ContinualTrainer(
            self.recipe,
            self.method,
            samples,
            resume,
            model=model,
            args=arguments,
            data_collator=Collator(self.transform, self.encoder.pad_token_id, self.dtype),
        )
        set_seed((seed + self.state.process_index) % 2**32)  # of dropout: masks of its own for each process
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        part = place / "adapter.part"
        if self.state.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
        self.state.wait_for_everyone()
        trainer.save_adapter(part)
        cost = trainer.cost()
        if self.state.is_main_process:
            (place / "kept").mkdir(exist_ok=True)
            self.method.keep(trainer.accelerator.unwrap_model(trainer.model), stage, place / "kept")
            if not any((place / "kept").iterdir()):
                (place / "kept").rmdir()
            write_json(place / "log.json", trainer.state.log_history)
            trained = {
                "samples": len(samples),
                "steps": trainer.state.global_step,
                "trainable": trainable,
                "timing": {**cost, "tokens_per_second": cost["tokens"] / cost["seconds"]},
            }
            write_json(place / "training.json", trained)
            part.replace(self.adapter(stage))
        self.state.wait_for_everyone()
        del model, trainer
        unset_hf_deepspeed_config()  # else ZeRO-3 would partition the next base model, which is whole when it is asked
        _free()

    def tidy(self, stage: Stage) -> None:
        """Remove the checkpoints of a stage that has its adapter; what else was logged beside them stays."""
        folder = self.place(stage) / "checkpoints"
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def samples(self, stage: Stage, kept: list[Path]) -> Samples:
        """What a stage trains on."""
        parts = [TaskSamples(self.recipe, task, self.encoder, self.instructions) for task in stage.train]
        extra: dict[str, tuple[TaskRecipe, list[int]]] = {}
        for task, index in self.method.extra_samples(stage, kept):
            extra.setdefault(task.name, (task, []))[1].append(index)
        parts += [
            TaskSamples(self.recipe, task, self.encoder, self.instructions, chosen) for task, chosen in extra.values()
        ]
        return Samples(parts)

    # ---- questions

    def ask(self, stage: Stage) -> None:
        """Answer and score those of a stage's questions that are left."""
        table = self.table(stage)
        scores, timing = _read_if_there(table / "scores.json"), _read_if_there(table / "evaluation.json")
        left = [task for task in stage.test if task.name not in scores]
        if not left:
            return
        model = self.method.load(self.base(), self.adapter_to_ask(stage)).eval()
        for task in left:
            start = time.monotonic()
            output = table / "answers" / f"{task.name}.jsonl"
            self.answer(model, stage, task, output)
            if self.state.is_main_process:
                found = score(
                    task.benchmark_name, self.recipe.annotations(task), output, self.recipe.evaluation.protocol
                )
                found.show()
                scores[task.name] = found.as_dict()
                seconds = time.monotonic() - start
                timing[task.name] = {"seconds": seconds, "answers_per_second": found.count / seconds}
                write_json(table / "evaluation.json", timing)
                write_json(table / "scores.json", scores)
        self.state.wait_for_everyone()
        del model
        _free()

    def answer(self, model: nn.Module, stage: Stage, task: TaskRecipe, output: Path) -> None:
        """Answer a task's questions."""
        evaluation, dataset = self.recipe.evaluation, find_dataset(task.benchmark_name)
        generate_answers(
            model,
            self.encoder,
            ImageTransform(self.transform.processor, square=evaluation.padding == "all" or dataset.released_square),
            Job(
                dataset=task.benchmark_name,
                questions=self.recipe.test_file(task),
                images=self.recipe.images(task),
                output=output,
                model_id=f"{self.recipe.name}/{stage.name}",
            ),
            embed=None if self.instructions is None else partial(self.instructions.embed, task),
            settings=GenerationSettings(
                max_new_tokens=evaluation.max_new_tokens or dataset.max_new_tokens,
                token_budget=evaluation.token_budget,
                image_workers=evaluation.workers,
            ),
        )

    # ---- results

    def results(self) -> dict[str, Any]:
        """What the finished stages gave, as `smolora.report.layout` has it.

        "training" is added, of each trained stage samples, steps and trained parameters. "timing" is all that differs
        between a run and the same one killed and continued.
        """
        recipe, method = self.recipe, self.method
        done = [stage for stage in method.stages() if self.scores(stage).keys() >= {task.name for task in stage.test}]
        matrix, mif = (
            method.matrix([{name: row[figure] for name, row in self.scores(stage).items()} for stage in done])
            for figure in ("score", "mif")
        )
        tasks = [task.name for task in recipe.tasks]
        metrics = continual_metrics(tasks, matrix, mif, method=method.metrics_method, allow_missing=True)
        training = {
            stage.name: _read(self.place(stage) / "training.json")
            for stage in [*method.stages(), *method.downstream()]
            if self.adapter(stage).is_dir()
        }
        timing = {name: {"training": content.pop("timing")} for name, content in training.items()}
        for stage in [*done, *method.downstream()]:
            asked = _read_if_there(self.table(stage) / "evaluation.json")
            if asked:
                timing.setdefault(stage.table or stage.name, {})["evaluation"] = asked
        return {
            "name": recipe.name,
            "method": recipe.method,
            "benchmark": recipe.benchmark or recipe.name,
            "setting": recipe.setting,
            "protocol": recipe.evaluation.protocol,
            "tasks": tasks,
            "stages": [stage.name for stage in done],
            "matrix": matrix,
            "mif": mif,
            **{name: values[: len(done)] for name, values in metrics.items()},
            "downstream": self.downstream_results(),
            "training": training,
            "tests": {
                task.name: {
                    "questions": os.path.relpath(recipe.test_file(task), self.folder),
                    "images": os.path.relpath(recipe.images(task), self.folder),
                }
                for task in recipe.all_tasks
            },
            "config": {**recipe.as_dict(), **method.settings()},
            "versions": _versions(),
            "timing": timing,
        }

    def downstream_results(self) -> dict[str, Any]:
        """The finished downstream tables, also those that another recipe of this run asked for."""
        tables = _read_if_there(self.folder / "results.json").get("downstream", {})
        for name, tasks in self.recipe.downstream.items():
            scores = _read_if_there(self.folder / f"downstream-{name}" / "scores.json")
            if tasks and all(task.name in scores for task in tasks):
                accuracy, mif = ([scores[task.name][figure] for task in tasks] for figure in ("score", "mif"))
                tables[name] = {
                    "folder": f"downstream-{name}",
                    "tasks": [task.name for task in tasks],
                    "accuracy": accuracy,
                    "mif": mif,
                    "AP": sum(accuracy) / len(tasks),
                    "MIF": sum(mif) / len(tasks),
                }
        return tables

    def scores(self, stage: Stage) -> dict[str, Any]:
        """A stage's scores so far, by task."""
        return _read_if_there(self.table(stage) / "scores.json")


def _read(path: Path) -> Any:
    return json.loads(read_text(path))


def _read_if_there(path: Path) -> dict[str, Any]:
    return _read(path) if path.exists() else {}


def _flat(content: Any, key: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys; lists count as values."""
    if not isinstance(content, dict) or not content:
        return {key: content}
    return {name: v for k, value in content.items() for name, v in _flat(value, f"{key}.{k}" if key else k).items()}


def _free() -> None:
    """Give back a model's memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _versions() -> dict[str, str]:
    packages = ("smolora", "torch", "transformers", "peft", "accelerate")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"python": platform.python_version(), **{name: version(name) for name in packages}, "device": device}
