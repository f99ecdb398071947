"""The trainer: optimiser groups, schedules, checkpoints that are whole, and what stops it."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from smolora.train.methods.method import ADAPTERS
from smolora.train.methods.smolora import SMoLoRA
from smolora.train.run import TrainingRun
from smolora.train.trainer import ContinualTrainer, TrainingStoppedError, complete_checkpoints, training_arguments


@pytest.fixture
def trainer(short):
    def make(*overrides: str) -> ContinualTrainer:
        run = TrainingRun(short(*overrides))
        run.load_processors()
        stage = run.method.course.stages()[0]
        model = run.method.adapter.start(run.base_model(), None)
        arguments = training_arguments(run.recipe, run.paths.root / "checkpoints", 1, 100, 0, False)
        return ContinualTrainer(run.recipe, run.method, run.stage_samples(stage, ()), None, model=model, args=arguments)

    return make


@pytest.mark.parametrize("decay", [0.01, 0.0])
def test_projector_learning_rate(trainer, decay):
    made = trainer(
        "training.projector_learning_rate=2e-5", "training.learning_rate=1e-4", f"training.weight_decay={decay}"
    )
    groups = made.create_optimizer().param_groups
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    trained = {name: p for name, p in made.model.named_parameters() if p.requires_grad}
    assert len(rates) == len(trained)
    for name, parameter in trained.items():
        assert rates[id(parameter)] == (2e-5 if "multi_modal_projector" in name else 1e-4, decay), name


@pytest.mark.parametrize(("schedule", "end"), [("cosine", 0.0), ("constant", 1e-3)])
def test_schedule(trainer, schedule, end):
    made = trainer(f"training.schedule={schedule}", "training.learning_rate=1e-3", "training.warmup_ratio=0.1")
    made.create_optimizer_and_scheduler(100)
    rates = []
    for _ in range(100):
        rates.append(made.lr_scheduler.get_last_lr()[0])
        made.optimizer.step()
        made.lr_scheduler.step()
    assert rates[:11] == pytest.approx([1e-4 * step for step in range(11)]) and max(rates) == pytest.approx(1e-3)
    assert made.lr_scheduler.get_last_lr()[0] == pytest.approx(end, abs=1e-9)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_run_goes_on_with_another_batch_of_a_device(short, tmp_path, monkeypatch, batch):
    """The checkpoint's own says how many it took at a time; the recipe's counts, and the adapter is the same."""
    common = ["adapter.lora_dropout=0", "training.batch_size=4", "training.save_steps=1", "training.epochs=1"]
    adapters = []
    for name, sizes in (("whole", (2,)), ("changed", (2, batch))):
        for place, size in enumerate(sizes):
            overrides = [f"output={tmp_path / name}", *common, f"training.per_device_batch_size={size}"]
            run = TrainingRun(short(*overrides, one_task=True))
            run.load_processors()
            with pytest.MonkeyPatch.context() as patch:
                if place < len(sizes) - 1:
                    save = ContinualTrainer._save_checkpoint

                    def stopped(self, model, trial, save=save):
                        save(self, model, trial)
                        raise KeyboardInterrupt

                    patch.setattr(ContinualTrainer, "_save_checkpoint", stopped)
                    with pytest.raises(KeyboardInterrupt):
                        run.train_stage(run.method.course.stages()[0])
                else:
                    run.train_stage(run.method.course.stages()[0])
        adapters.append(load_file(tmp_path / name / "stage-1-ImageNet/adapter/adapter_model.safetensors"))
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "dropout"),
    [
        ("training.activation_checkpointing=true", 0.05),  # what is recomputed has the same masks
        ("training.per_device_batch_size=4", 0.0),  # accumulated, with batches of uneven token counts
    ],
)
def test_what_changes_nothing(short, tmp_path, change, dropout):
    losses = []
    for name, changes in (("as it is", ()), ("changed", (change,))):
        run = TrainingRun(
            short(
                f"output={tmp_path / name}",
                f"adapter.lora_dropout={dropout}",
                "training.epochs=2",
                "training.logging_steps=1",
                "training.warmup_ratio=0",
                *changes,
            )
        )
        run.load_processors()
        run.train_stage(run.method.course.stages()[0])
        log = json.loads((tmp_path / name / "stage-1-ImageNet/log.json").read_text())
        losses.append([line["loss"] for line in log if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][0] > losses[0][1] + 0.05


@pytest.mark.parametrize("seen", [1, 2, 8])
def test_several_gpus_and_one_process_are_one_device(short, monkeypatch, tmp_path, seen):
    """`Trainer` would take a batch for each of them, and wrap the model in DataParallel."""
    after = TrainingArguments.__post_init__

    def gpus(self):
        after(self)
        self._n_gpu = seen

    monkeypatch.setattr(TrainingArguments, "__post_init__", gpus)
    recipe = short("training.batch_size=12", "training.per_device_batch_size=3")
    arguments = training_arguments(recipe, tmp_path, 1, 100, 0, False)
    assert (arguments.n_gpu, arguments.train_batch_size, arguments.gradient_accumulation_steps) == (1, 3, 4)


def test_a_loss_that_is_no_number_stops(short, tmp_path, monkeypatch):
    """From the fourth step on: the checkpoint of the second is the last good one, and the run goes on from there."""
    recipe = short("training.batch_size=2", "training.per_device_batch_size=2", "training.save_steps=2", one_task=True)
    calls = []

    class Bad(SMoLoRA):
        name = "smolora"

        def loss_term(self, model, batch, outputs):
            calls.append(None)
            return torch.tensor(float("nan") if len(calls) > 3 else 0.0)

    monkeypatch.setitem(ADAPTERS, "smolora", Bad)
    good = tmp_path / "run/stage-1-ImageNet/checkpoints/checkpoint-2"
    with pytest.raises(TrainingStoppedError, match=rf"not a finite number.*the last good checkpoint is {good}"):
        TrainingRun(recipe)()
    assert complete_checkpoints(good.parent) == [good]
    assert not (tmp_path / "run/stage-1-ImageNet/adapter").exists()
    monkeypatch.undo()
    assert TrainingRun(recipe)()["training"]["stage-1-ImageNet"]["steps"] == 6


def test_a_full_disk_stops(short, tmp_path):
    """Files may not grow beyond what the first checkpoint took; the second's cannot be written."""
    recipe = short("training.batch_size=2", "training.per_device_batch_size=2", "training.save_steps=2", one_task=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    original, saved = ContinualTrainer._save_checkpoint, []

    def save(self, model, trial):
        if saved:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        saved.append(None)
        original(self, model, trial)

    good = tmp_path / "run/stage-1-ImageNet/checkpoints/checkpoint-2"
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ContinualTrainer, "_save_checkpoint", save)
            message = rf"cannot write .*checkpoint-4: .*; the last good checkpoint is {good}"
            with pytest.raises(TrainingStoppedError, match=message):
                TrainingRun(recipe)()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert complete_checkpoints(good.parent) == [good]
    assert TrainingRun(recipe)()["training"]["stage-1-ImageNet"]["steps"] == 6


def test_torn_checkpoints_do_not_count(tmp_path):
    def checkpoint(step: int, files: dict[str, bytes], sizes: dict[str, int] | None) -> Path:
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
        if sizes is not None:
            (path / "complete.json").write_text(json.dumps({"files": sizes, "seconds": 1.0, "tokens": 2}))
        return path

    nine = checkpoint(9, {"a": b"123"}, {"a": 3})
    ten = checkpoint(10, {"a": b"12"}, {"a": 2})
    checkpoint(11, {"a": b"12"}, {"a": 3})
    checkpoint(12, {"a": b"12"}, {"a": 2, "b": 1})
    checkpoint(13, {"a": b"12"}, None)
    (checkpoint(14, {"a": b"12"}, None) / "complete.json").write_text('{"files": {"a"')
    assert complete_checkpoints(tmp_path) == [nine, ten]
    assert complete_checkpoints(tmp_path / "nothing") == []
