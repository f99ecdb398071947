"""The fields of `transformers.TrainingArguments` that a recipe may set, and why the others are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainingArguments

from .messages import unknown_key

OWN_ARGUMENTS = {  # field of TrainingArguments: the key of a recipe, or the part of the program, that sets it
    "output_dir": "output",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.epochs",
    "per_device_train_batch_size": "training.per_device_batch_size",
    "gradient_accumulation_steps": "training.batch_size",
    "learning_rate": "training.learning_rate",
    "weight_decay": "training.weight_decay",
    "warmup_steps": "training.warmup_ratio",
    "warmup_ratio": "training.warmup_ratio",
    "lr_scheduler_type": "training.schedule",
    "activation_checkpointing": "training.activation_checkpointing",
    "gradient_checkpointing": "training.activation_checkpointing",
    "save_strategy": "training.save_steps",
    "save_steps": "training.save_steps",
    "save_total_limit": "training.save_steps",
    "logging_strategy": "training.logging_steps",
    "logging_steps": "training.logging_steps",
    "dataloader_num_workers": "training.workers",
    "remove_unused_columns": "the trainer",
    "train_sampling_strategy": "the trainer",
    "seed": "seed",
    "data_seed": "seed",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}

_UNSEEN = "which it does not have when it answers"
_STOPPED = "a run that was stopped and continued would differ from one that was not"
_SAMPLES = "training.batch_size alone decides how many samples a step has, on any number of devices"
_EVALUATED = "a stage is evaluated after its training, by the section `evaluation`"
REFUSED_ARGUMENTS = {  # field of TrainingArguments: why it must keep its default
    "label_smoothing_factor": f"without labels in its forward, the model would route by the answer, {_UNSEEN}",
    "neftune_noise_alpha": f"the model would route by noise, {_UNSEEN}",
    "save_only_model": _STOPPED,
    "ignore_data_skip": _STOPPED,
    "dataloader_in_order": _STOPPED,
    "resume_from_checkpoint": "a run finds its checkpoints by itself",
    "auto_find_batch_size": _SAMPLES,
    "accelerator_config": _SAMPLES,
    "parallelism_config": _SAMPLES,
    "local_rank": "the launcher sets it",
    "average_tokens_across_devices": "the loss would depend on the number of devices",
    "dataloader_drop_last": "a stage trains on all of its samples",
    **dict.fromkeys(
        (
            "batch_eval_metrics",
            "bf16_full_eval",
            "do_eval",
            "do_predict",
            "do_train",
            "eval_accumulation_steps",
            "eval_delay",
            "eval_do_concat_batches",
            "eval_on_start",
            "eval_steps",
            "eval_strategy",
            "eval_use_gather_object",
            "fp16_full_eval",
            "greater_is_better",
            "include_for_metrics",
            "label_names",
            "load_best_model_at_end",
            "metric_for_best_model",
            "per_device_eval_batch_size",
            "prediction_loss_only",
        ),
        _EVALUATED,
    ),
}


def training_argument_names() -> set[str]:
    """The fields of `TrainingArguments` that a recipe may set."""
    return _fields().keys() - OWN_ARGUMENTS.keys()


def check_arguments(arguments: dict[str, Any]) -> None:
    """Check `training.arguments`.

    Raises:
        ValueError: a field is unknown, is set by another key, or would break a promise of the trainer. The message says
            which.
    """
    for name, value in arguments.items():
        key = f"training.arguments.{name}"
        if name in OWN_ARGUMENTS:
            raise ValueError(f"{key} is set by {OWN_ARGUMENTS[name]}")
        if name not in _fields():
            raise ValueError(unknown_key(key, training_argument_names()))
        if name in REFUSED_ARGUMENTS and value is not None and value != _fields()[name].default:
            raise ValueError(f"{key} must be left out, got {value!r}: {REFUSED_ARGUMENTS[name]}")


def _fields() -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
