"""A thin `transformers.Trainer`: reproducible order, a projector learning rate, checkpoints that are complete."""

from __future__ import annotations

import json
import math
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..io.files import fsync_tree, read_text, write_json
from ..io.progress import Progress
from ..recipe import Recipe
from .data import GlobalBatches, StageSamples
from .methods import Method
from .projector import projector_family

MARKER = "complete.json"  # written into a checkpoint once all its other files are on disk
SCHEDULES = {"cosine": "cosine", "constant": "constant_with_warmup"}
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # the new name and the old one


class TrainingStoppedError(ValueError):
    """Training cannot continue. The message names the last good checkpoint."""


def training_arguments(
    recipe: Recipe, folder: Path, epochs: float, steps: int, seed: int, on_gpu: bool
) -> TrainingArguments:
    """The arguments of a stage's training.

    Args:
        recipe: the recipe.
        folder: folder for checkpoints.
        epochs, steps, seed: epochs, optimiser steps and seed of the stage.
        on_gpu: whether there is an accelerator to train on.

    Raises:
        ValueError: the global batch is not a multiple of the batches of all devices.
    """
    training = recipe.training
    checkpointing = {}
    if training.activation_checkpointing:
        name = CHECKPOINTING[0] if hasattr(TrainingArguments, CHECKPOINTING[0]) else CHECKPOINTING[1]
        checkpointing = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    arguments = TrainingArguments(
        **{
            **checkpointing,
            "report_to": "none",
            "disable_tqdm": True,  # `_ShowProgress` shows it
            "ddp_timeout": 7 * 24 * 3600,  # the main process may score while the others wait
            "use_cpu": not on_gpu,
            "dataloader_pin_memory": on_gpu,
            **training.arguments,
        },
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=training.per_device_batch_size,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        warmup_steps=round(training.warmup_ratio * steps),
        lr_scheduler_type=SCHEDULES[training.schedule],
        save_strategy="steps",
        save_steps=training.save_steps,
        logging_strategy="steps",
        logging_steps=training.logging_steps,
        dataloader_num_workers=training.workers,
        remove_unused_columns=False,
        seed=seed,
        data_seed=seed,
        bf16=recipe.model.dtype == "bfloat16",
        fp16=recipe.model.dtype == "float16",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else `Trainer` would take a batch for each that this process sees
    arguments.gradient_accumulation_steps = accumulation(recipe, arguments.world_size)
    return arguments


def accumulation(recipe: Recipe, devices: int) -> int:
    """Number of gradient accumulation steps.

    Raises:
        ValueError: the global batch is not a multiple of the batches of all devices.
    """
    training = recipe.training
    at_once = training.per_device_batch_size * devices
    if training.batch_size % at_once:
        raise ValueError(
            f"training.batch_size must be a multiple of training.per_device_batch_size times the number of devices, "
            f"{training.per_device_batch_size} x {devices}, got {training.batch_size}"
        )
    return training.batch_size // at_once


def complete_checkpoints(folder: Path) -> list[Path]:
    """Find the completely written checkpoints, oldest first."""
    whole = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            sizes = json.loads(read_text(path / MARKER))["files"]
            found = {name: (path / name).stat().st_size for name in sizes}
        except (OSError, ValueError, KeyError):
            continue
        if found == sizes:
            whole.append(path)
    return sorted(whole, key=lambda path: int(path.name.rpartition("-")[2]))


class _SetSamplerEpoch(TrainerCallback):
    """Tells the sampler its epoch, which some wrappers of a batch-skipping data loader do not pass on."""

    def __init__(self, order: GlobalBatches) -> None:
        self.order = order

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.order.set_epoch(int(state.epoch or 0))


class _ShowProgress(TrainerCallback):
    """Shows the steps of a stage with the last loss that was logged."""

    shown: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hidden = not state.is_world_process_zero
        self.shown = Progress("training", state.max_steps, "step", done=state.global_step, hidden=hidden)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logged = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
        if self.shown is not None:
            self.shown.update(remark="" if logged is None else f"loss {logged:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.shown is not None:
            self.shown.__exit__(None, None, None)


class ContinualTrainer(Trainer):
    """Trains one stage.

    Args:
        recipe: the recipe.
        method: the method, which may add to the loss.
        samples: the samples of the stage.
        resume: the checkpoint that training will continue from.
        kwargs: arguments of `Trainer`.

    Raises:
        ValueError: the method needs whole gradients, and they are sharded.
    """

    optimizer: torch.optim.Optimizer | None
    model_accepts_loss_kwargs: bool

    def __init__(
        self, recipe: Recipe, method: Method, samples: StageSamples, resume: Path | None, **kwargs: Any
    ) -> None:
        super().__init__(train_dataset=samples, **kwargs)
        self.recipe, self.method = recipe, method
        # Qwen-VL and others have only the mean over a micro-batch, with which a step would depend on how it is cut
        self._own_loss = not self.model_accepts_loss_kwargs
        self.model_accepts_loss_kwargs = True
        if method.adds_to_gradients and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                f"method {method.name} adds to whole gradients once a step, which DeepSpeed and FSDP do not have: "
                "leave training.arguments.deepspeed and fsdp out"
            )
        own = samples.own if method.half_extra and samples.own < len(samples) else None
        # without fillers, accelerate repeats the epoch's first samples in an incomplete last step
        devices = self.args.world_size
        multiple = 1 if devices == 1 else devices * self.args.per_device_train_batch_size
        self.order = GlobalBatches(samples.lengths, recipe.training.batch_size, self.args.seed, own, multiple)
        self.add_callback(_SetSamplerEpoch(self.order))
        self.remove_callback(PrinterCallback)
        self.add_callback(_ShowProgress())
        marker = json.loads(read_text(resume / MARKER)) if resume else {"seconds": 0.0, "tokens": 0}
        self._before = marker["seconds"], marker["tokens"]
        self._start = time.monotonic()
        self._tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)
        self._bad = torch.zeros((), dtype=torch.int64, device=self.args.device)  # count of losses that are not finite

    @property
    def last_good(self) -> str:
        """The last complete checkpoint, in words."""
        whole = complete_checkpoints(Path(self.args.output_dir))
        return f"the last good checkpoint is {whole[-1]}" if whole else "there is no checkpoint of this stage yet"

    def cost(self) -> dict[str, float | int]:
        """Seconds and unpadded tokens so far, with those before a restart, and peak memory in bytes.

        Tokens are summed over all processes.
        """
        on_gpu = self.args.device.type == "cuda"
        return {
            "seconds": self._before[0] + time.monotonic() - self._start,
            "tokens": self._before[1] + int(self.accelerator.gather(self._tokens).sum()),
            "peak_memory": torch.cuda.max_memory_allocated()
            if on_gpu
            else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }

    # ---- data and optimiser

    def _get_train_sampler(self, train_dataset: Any = None) -> GlobalBatches:
        return self.order

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The parameters that get weight decay: those of `Trainer`, without those that the adapter exempts."""
        exempt = self.method.adapter.undecayed
        return [name for name in super().get_decay_parameter_names(model) if not any(part in name for part in exempt)]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimiser, with parameter groups for the projector if it has its own learning rate."""
        if self.optimizer is not None or self.recipe.training.projector_learning_rate is None:
            return super().create_optimizer(model)
        model = self.model if model is None else model
        family = projector_family(self.model, "training.projector_learning_rate")
        decayed = set(self.get_decay_parameter_names(model))
        groups = []
        for projector, rate in ((False, self.args.learning_rate), (True, self.recipe.training.projector_learning_rate)):
            for decays in (True, False):
                parameters = [
                    p
                    for name, p in model.named_parameters()
                    if p.requires_grad and family.is_in_connector(name) == projector and (name in decayed) == decays
                ]
                if parameters:
                    decay = self.args.weight_decay if decays else 0.0
                    groups.append({"params": parameters, "weight_decay": decay, "lr": rate})
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        optimizer = kind(groups, **options)
        self.optimizer = optimizer
        return optimizer

    # ---- loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of a micro-batch; after the last one of a step, the terms once a step."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.method.adds_to_gradients and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            self.method.step_term(self.accelerator.unwrap_model(model), 1.0 if scaler is None else scaler.get_scale())
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss, a micro-batch's part of the mean over the answers' tokens of a step, plus what the method adds."""
        batch = {**inputs, **self.method.batch_inputs(inputs)}
        if self._own_loss:
            outputs = model(**batch)
            logits = outputs.logits
            loss = ForCausalLMLoss(logits, batch["labels"], logits.shape[-1], num_items_in_batch=num_items_in_batch)
            if self.args.average_tokens_across_devices:
                loss = loss * self.args.world_size  # gradients are averaged over the processes
        else:
            loss, outputs = super().compute_loss(model, dict(batch), True, num_items_in_batch)
        extra = self.method.loss_term(self.accelerator.unwrap_model(model), batch, outputs)
        if extra is not None:
            loss = loss + extra / self.current_gradient_accumulation_steps
        self._tokens += inputs["attention_mask"].sum()
        self._bad += ~torch.isfinite(loss.detach())
        return (loss, outputs) if return_outputs else loss

    def check_finite(self) -> None:
        """Stop if a loss since the last check or an adapter is not finite.

        Raises:
            TrainingStoppedError: one is. The message names the last good checkpoint.
        """
        bad = self._bad.clone()
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                values = parameter.detach()
                bad += ~torch.isfinite(values.to_local() if isinstance(values, DTensor) else values).all()
        if int(self.accelerator.gather(bad).sum()):
            raise TrainingStoppedError(
                f"the loss is not a finite number, at step {self.state.global_step} or shortly before: {self.last_good}"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.check_finite()
        super().log({**logs, **self.method.figures()} if "loss" in logs else logs, start_time)

    # ---- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, mark it as complete, and then remove the older ones.

        Raises:
            TrainingStoppedError: it cannot be written.
        """
        self.check_finite()
        folder = Path(self.args.output_dir)
        path = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        cost = self.cost()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                fsync_tree(path)
                files = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
                write_json(path / MARKER, {"files": files, "seconds": cost["seconds"], "tokens": cost["tokens"]})
        except Exception as error:  # a full disk is an OSError here, a RuntimeError of torch.save, a SafetensorError
            raise TrainingStoppedError(f"cannot write {path}: {error}; {self.last_good}") from error
        if self.args.should_save:
            for other in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                if other != path:
                    shutil.rmtree(other)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model with frozen routers, which `Trainer` leaves out under DeepSpeed's ZeRO-3."""
        frozen = []
        if self.is_deepspeed_enabled:
            prefix = self.accelerator.unwrap_model(self.model).base_model.prefix
            frozen = [p for name, p in self.model.named_parameters() if prefix in name and not p.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            super().save_model(output_dir, _internal_call)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter into a folder, and sync it to disk.

        Raises:
            TrainingStoppedError: it cannot be written, or is not finite.
        """
        self.check_finite()
        try:
            self.save_model(str(folder))
            if self.args.should_save:
                if not any(folder.glob("adapter_model.*")):
                    raise OSError("no adapter was written (FSDP needs the state dict type FULL_STATE_DICT)")
                for name in ("training_args.bin", "README.md"):
                    (folder / name).unlink(missing_ok=True)
                fsync_tree(folder)
        except Exception as error:
            raise TrainingStoppedError(f"cannot write {folder}: {error}; {self.last_good}") from error
        self.accelerator.wait_for_everyone()


def steps_of(samples: int, batch_size: int, epochs: float) -> int:
    """Number of optimiser steps of a stage."""
    return math.ceil(-(-samples // batch_size) * epochs)
