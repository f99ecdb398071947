"""A training run: stage after stage is trained and evaluated.

If the process is killed, repeating the call resumes the run.
"""

from __future__ import annotations

import gc
import shutil
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoModelForImageTextToText, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..backends import use_backend
from ..evaluate.generate import GenerationSettings, process_state
from ..evaluate.instructions import recipe_instructions, recipe_questions
from ..evaluate.score import Score
from ..evaluate.tasks import Task, evaluate_tasks
from ..io.files import atomic_write_text, fsync_tree, locked, write_json
from ..io.progress import say
from ..recipe import Recipe, TaskRecipe, load_recipe
from ..tuner.counts import num_trainable
from .data import Collator, StageSamples, TaskSamples, check_samples, epoch_samples, recipe_backbone
from .kept import check_sums, write_checksums
from .methods import Method, Stage, StageWork
from .paths import RunPaths, read, read_if_exists
from .prepare import prepare
from .results import collect_results
from .trainer import ContinualTrainer, complete_checkpoints, steps_of, training_arguments

# Keys of a recipe that may change when a run is continued. They decide how it is computed or what is evaluated at its
# end, and leave everything that is already there as it is.
CHANGEABLE = (
    "output",
    "training.per_device_batch_size",
    "training.activation_checkpointing",
    "training.save_steps",
    "training.logging_steps",
    "training.workers",
    "training.arguments.report_to",
    "evaluation.workers",
    "downstream",
)


class TrainingRun:
    """The run of a recipe.

    Args:
        recipe: the recipe.

    Raises:
        ValueError: the method is unknown, or the folder belongs to a run of another recipe.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.paths = RunPaths(recipe.folder)
        self.method = Method(recipe)
        self.state = process_state(on_cpu=not torch.accelerator.is_available())
        self.check_folder()

    def check_folder(self) -> None:
        """Refuse to continue the run of another recipe.

        Raises:
            ValueError: the folder belongs to one. The message names the keys that differ. Or `downstream` changes the
                number of tasks that the adapters in the folder have room for.
        """
        if not self.paths.recipe.exists():
            return
        before = load_recipe(self.paths.recipe)
        old = _flatten(before.as_dict())  # keys newer than the run get defaults
        new = _flatten(self.recipe.as_dict())
        different = [
            f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
            for key in {**old, **new}
            if old.get(key) != new.get(key) and not any(f"{key}.".startswith(f"{name}.") for name in CHANGEABLE)
        ]
        if different:
            raise ValueError(
                f"{self.paths.root} has a run of another recipe ({'; '.join(different)}): remove it, or name another "
                "output"
            )
        numbers = before.num_task_ids, self.recipe.num_task_ids
        if self.method.adapter.has_task_slots and numbers[0] != numbers[1]:
            raise ValueError(
                f"downstream must leave the {numbers[0]} tasks that the {self.method.adapter.name} adapters in "
                f"{self.paths.root} tell apart (those trained downstream count as one), got {numbers[1]}: name another "
                "output"
            )

    @property
    def stages(self) -> list[Stage]:
        """Its stages, upstream and downstream."""
        return [*self.method.course.stages(), *self.method.course.downstream()]

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left of it."""
        trained = all(self.paths.adapter(stage).is_dir() for stage in self.stages if stage.train)
        asked = all(task.name in self.paths.scores(stage) for stage in self.stages for task in stage.test)
        return trained and asked and self.paths.results.is_file()

    def __call__(self) -> dict[str, Any]:
        """Do what is left of the run.

        Returns:
            The content of results.json.

        Raises:
            ValueError: an input is wrong, or training cannot continue.
            BlockingIOError: another process works on this run.
        """
        main = self.state.is_main_process
        with locked(self.paths.lock, str(self.paths.root)) if main else nullcontext():
            return self._continue(main)

    def _continue(self, main: bool) -> dict[str, Any]:
        if main:
            self.check_folder()  # check again, now that we hold the lock
            devices = torch.accelerator.device_count()
            if self.state.num_processes == 1 and devices > 1:
                say(
                    f"found {devices} devices, using one; to use all of them: torchrun --nproc-per-node {devices} "
                    "-m smolora.cli train RECIPE"
                )
            prepare(self.recipe.prepare)
            atomic_write_text(self.paths.recipe, yaml.safe_dump(self.recipe.as_dict(), sort_keys=False))
        self.state.wait_for_everyone()
        self.load_processors()
        stages = self.stages
        check_samples(self.recipe, stages, self.backbone)
        with use_backend(self.recipe.backend):
            for number, stage in enumerate(stages):
                if main:
                    say(f"== {self.recipe.name}: {stage.name} ({number + 1} of {len(stages)})")
                if stage.train and not self.paths.adapter(stage).is_dir():
                    self.train_stage(stage)
                if main:
                    self.remove_checkpoints(stage)
                self.evaluate_stage(stage)
                if main:
                    write_json(self.paths.results, collect_results(self.recipe, self.method, self.paths))
                self.state.wait_for_everyone()
        return read(self.paths.results)

    def load_processors(self) -> None:
        """Load tokenizer, image processor and sentence encoder."""
        self.dtype = getattr(torch, self.recipe.model.dtype)
        self.backbone = recipe_backbone(self.recipe)
        sources = {None: None, "instruction": recipe_instructions, "question": recipe_questions}
        source = sources[self.method.adapter.text]
        self.texts = None if source is None else source(self.recipe)

    def base_model(self) -> nn.Module:
        """Load the base model, frozen, onto this process's device."""
        model = AutoModelForImageTextToText.from_pretrained(
            self.recipe.model.path, dtype=self.dtype, local_files_only=True
        )
        return model.requires_grad_(False).to(self.state.device)

    # ---- training

    def train_stage(self, stage: Stage) -> None:
        """Train a stage and save its adapter, from its last checkpoint if there is one."""
        for earlier in stage.lineage:
            check_sums(self.paths, earlier)
        kept = tuple(self.paths.kept(earlier) for earlier in stage.lineage)
        # drawn from the stage's name, so that leaving out another stage does not change this one
        seed = (self.recipe.seed + zlib.crc32(stage.name.encode())) % 2**32
        set_seed(seed)
        previous = None if stage.starts_from is None else self.paths.evaluated_adapter(stage.starts_from)
        model = self.method.adapter.start(self.base_model(), previous)
        config: Any = model.config
        config.use_cache = False
        self.method.freeze(model, stage)
        samples = self.stage_samples(stage, kept)
        collate = Collator(self.backbone, self.recipe.training.max_length, self.dtype)
        own = StageSamples([self._task_samples(task) for task in stage.train])
        checkpoints = self.paths.checkpoints(stage)
        resume = self._last_checkpoint(checkpoints)
        at_once = self.recipe.training.per_device_batch_size
        notes = self.paths.notes(stage)
        work = StageWork(stage, kept, own, collate, at_once, self.state, notes, goes_on=resume is not None)
        self.method.before_stage(model, work)
        trainable = num_trainable(model)
        recipe, epochs = self.recipe.of_stage(stage.train), self.recipe.epochs(stage.train)
        size = epoch_samples(samples.own, len(samples) - samples.own, self.method.half_extra)
        steps = steps_of(size, recipe.training.batch_size, epochs)
        trainer = ContinualTrainer(
            recipe,
            self.method,
            samples,
            resume,
            model=model,
            args=training_arguments(recipe, checkpoints, epochs, steps, seed, on_gpu=self.state.device.type != "cpu"),
            data_collator=collate,
        )
        set_seed((seed + self.state.process_index) % 2**32)  # each process draws its own dropout masks
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        self._save_stage(trainer, work, size, trainable)
        del model, trainer
        unset_hf_deepspeed_config()  # else ZeRO-3 would partition the next base model, which is evaluated whole
        _free_memory()

    def _last_checkpoint(self, folder: Path) -> Path | None:
        """Find the last complete checkpoint, and remove the torn ones."""
        whole = complete_checkpoints(folder)
        self.state.wait_for_everyone()  # all have looked before anything is removed or written
        if self.state.is_main_process:
            for path in folder.glob("checkpoint-*"):
                if path not in whole:
                    shutil.rmtree(path)
        self.state.wait_for_everyone()
        return whole[-1] if whole else None

    def _save_stage(self, trainer: ContinualTrainer, work: StageWork, samples: int, trainable: int) -> None:
        """Write what a trained stage leaves, the adapter last: it marks the stage as trained."""
        stage = work.stage
        folder, kept = self.paths.stage(stage), self.paths.kept(stage)
        new_adapter, new_kept = folder / "adapter.part", folder / "kept.part"
        if self.state.is_main_process:
            for path in (new_adapter, new_kept, kept):  # left by a process that was killed here
                shutil.rmtree(path, ignore_errors=True)
            new_kept.mkdir(parents=True)
        self.state.wait_for_everyone()
        cost = trainer.cost()
        self.method.after_stage(trainer.accelerator.unwrap_model(trainer.model), work, new_kept)
        trainer.save_adapter(new_adapter)
        if self.state.is_main_process:
            write_checksums(folder, {"adapter": new_adapter, "kept": new_kept})
            if any(new_kept.iterdir()):
                fsync_tree(new_kept)
                new_kept.replace(kept)
            else:
                new_kept.rmdir()
            write_json(folder / "log.json", trainer.state.log_history)
            trained = {
                "samples": samples,
                "steps": trainer.state.global_step,
                "trainable": trainable,
                "timing": {**cost, "tokens_per_second": cost["tokens"] / cost["seconds"]},
            }
            write_json(folder / "training.json", trained)
            new_adapter.replace(self.paths.adapter(stage))
        self.state.wait_for_everyone()

    def remove_checkpoints(self, stage: Stage) -> None:
        """Remove the checkpoints of a trained stage, and keep other files that were logged beside them."""
        folder = self.paths.checkpoints(stage)
        shutil.rmtree(self.paths.notes(stage), ignore_errors=True)
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def stage_samples(self, stage: Stage, kept: tuple[Path, ...]) -> StageSamples:
        """The samples of a stage, with those that the method adds."""
        parts = [self._task_samples(task) for task in stage.train]
        extra: dict[str, tuple[TaskRecipe, list[int]]] = {}
        for task, index in self.method.extra_samples(stage, kept):
            extra.setdefault(task.name, (task, []))[1].append(index)
        return StageSamples(parts, [self._task_samples(task, indices) for task, indices in extra.values()])

    def _task_samples(self, task: TaskRecipe, indices: list[int] | None = None) -> TaskSamples:
        texts = None if self.texts is None else self.texts[task.name]
        task_id = self.recipe.task_id(task) if self.method.adapter.takes_task_ids else None
        return TaskSamples(self.recipe, task, self.backbone, texts, indices, task_id)

    # ---- evaluation

    def evaluate_stage(self, stage: Stage) -> None:
        """Evaluate the tasks of a stage that have no score yet."""
        folder, scores = self.paths.evaluation(stage), self.paths.scores(stage)
        adapter = self.method.adapter
        left = [task for task in stage.test if task.name not in scores]
        tasks = [Task.from_recipe(self.recipe, task, adapter.answers_as(task)) for task in left]
        if not tasks:
            return
        timing = read_if_exists(folder / "evaluation.json")

        def save(name: str, score: Score, seconds: float) -> None:
            say(str(score))
            score.show_remark()
            scores[name] = score.as_dict()
            timing[name] = {"seconds": seconds, "answers_per_second": score.count / seconds}
            write_json(folder / "evaluation.json", timing)
            write_json(folder / "scores.json", scores)

        evaluation = self.recipe.evaluation
        model = adapter.load(self.base_model(), self.paths.evaluated_adapter(stage)).eval()
        evaluate_tasks(
            model,
            self.backbone,
            tasks,
            output=folder,
            model_id=f"{self.recipe.name}/{stage.name}",
            embed=self.texts,
            settings=GenerationSettings(token_budget=evaluation.token_budget, image_workers=evaluation.workers),
            max_new_tokens=evaluation.max_new_tokens,
            padding=evaluation.padding,
            protocol=evaluation.protocol,
            on_score=save,
        )
        self.state.wait_for_everyone()
        del model
        _free_memory()


def _flatten(content: Any, key: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys. Lists count as values."""
    if not isinstance(content, dict) or not content:
        return {key: content}
    return {
        name: item
        for part, value in content.items()
        for name, item in _flatten(value, f"{key}.{part}" if key else part).items()
    }


def _free_memory() -> None:
    """Return the memory of a deleted model to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
