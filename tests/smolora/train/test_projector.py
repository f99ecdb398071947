"""The projector trained in full: at its own rate, saved with the adapter, carried on, and there outside the trainer."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText

from small_llava import small_llava
from smolora.train.methods import METHODS, Method
from smolora.train.projector import train_projector_in_full
from smolora.train.run import TrainingRun
from smolora.train.trainer import ContinualTrainer

PROJECTOR = "multi_modal_projector"
FIRST = "stage-1-ImageNet/adapter"
IN_FULL = "training.full_projector=true"
NAMES = tuple(f"linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias"))


def projector_of(folder) -> dict[str, torch.Tensor]:
    """The projector's tensors in an adapter's folder, by their names in it."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name.partition(f"{PROJECTOR}.")[2]: value for name, value in tensors.items() if PROJECTOR in name}


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"zeroshot", "eproj"}))
def test_it_is_trained_whole_and_has_no_adapter(short, method):
    recipe = short(f"method={method}", IN_FULL)
    model = Method(recipe).adapter.start(small_llava().requires_grad_(False), None)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and PROJECTOR in name}
    assert {name.partition(".modules_to_save.default.")[2] for name in trained} == set(NAMES)
    assert not [name for name in model.targeted_module_names if PROJECTOR in name]


def test_without_it_nothing_is_added(short):
    model = Method(short("method=seqlora")).adapter.start(small_llava().requires_grad_(False), None)
    assert not [name for name, _ in model.named_parameters() if "modules_to_save" in name]


def test_a_model_without_a_projector_is_refused():
    with pytest.raises(
        ValueError, match=r"training\.full_projector needs a model whose projector is known.*llava.*got Sequential"
    ):
        train_projector_in_full(nn.Sequential(nn.Linear(2, 2)), None)


@pytest.mark.parametrize("method", ("moelora", "smolora"))
def test_it_is_carried_from_stage_to_stage_and_answers_outside_the_trainer(short, tmp_path, method):
    recipe = short(f"method={method}", IN_FULL, "training.projector_learning_rate=0.02")
    TrainingRun(recipe)()
    folders = [tmp_path / f"run/{stage}/adapter" for stage in ("stage-1-ImageNet", "stage-2-Flickr30k")]
    first, second = map(projector_of, folders)
    base = AutoModelForImageTextToText.from_pretrained(recipe.model.path)
    was = dict(base.model.multi_modal_projector.named_parameters())
    assert set(first) == set(second) == set(NAMES)
    for name in NAMES:  # AdamW's first step is as long as the rate, whatever the gradient
        assert first[name].dtype == torch.float32
        moved = (first[name] - was[name]).abs().max(), (second[name] - first[name]).abs().max()
        assert all(0.015 < float(step) < 0.025 for step in moved), (name, moved)
    alone = AutoPeftModel.from_pretrained(folders[1])  # without a trainer
    loaded = dict(alone.named_parameters())
    for name in NAMES:
        (found,) = [value for key, value in loaded.items() if f"{PROJECTOR}.modules_to_save.default.{name}" in key]
        assert torch.equal(found, second[name])
    seen = torch.randn(1, 4, was["linear_1.weight"].shape[1])
    base.model.multi_modal_projector.load_state_dict(second)
    with torch.no_grad():
        shown = alone.get_base_model().model.multi_modal_projector(seen)
        assert torch.equal(shown, base.model.multi_modal_projector(seen))


def test_a_killed_stage_goes_on_with_it(short, tmp_path, monkeypatch):
    """Killed after two of three steps, and continued from the second one's checkpoint."""
    options = (IN_FULL, "method=moelora", "training.batch_size=4", "training.per_device_batch_size=4")
    names = {name: f"output={tmp_path / name}" for name in ("whole", "killed")}
    recipes = {name: short(*options, "training.save_steps=1", output, one_task=True) for name, output in names.items()}
    TrainingRun(recipes["whole"])()
    step, done = ContinualTrainer.training_step, []

    def dying(self, *args, **kwargs):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(self.state.global_step)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ContinualTrainer, "training_step", dying)
        TrainingRun(recipes["killed"])()
    assert [path.name for path in (tmp_path / "killed").rglob("checkpoint-*")] == ["checkpoint-2"]
    TrainingRun(recipes["killed"])()
    whole, killed = (load_file(tmp_path / name / FIRST / "adapter_model.safetensors") for name in names)
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)


def test_in_16_bits_it_is_kept_in_32(short, tmp_path):
    """Two stages: what the second one reads is not rounded, and the model answers in 16 bits."""
    recipe = short(IN_FULL, "method=seqlora", "model.dtype=bfloat16", "training.projector_learning_rate=1e-6")
    TrainingRun(recipe)()
    stages = [tmp_path / "run" / stage / "adapter" for stage in ("stage-1-ImageNet", "stage-2-Flickr30k")]
    first, second = map(projector_of, stages)
    for name in NAMES:  # a step of 1e-6 would be lost in bfloat16, and after stage 1 by rounding
        assert first[name].dtype == second[name].dtype == torch.float32
        assert not torch.equal(first[name], first[name].bfloat16().float())
        assert 0 < float((second[name] - first[name]).abs().max()) < 2e-6
    base = AutoModelForImageTextToText.from_pretrained(recipe.model.path, dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, stages[1]).eval()
    projector = loaded.get_base_model().model.multi_modal_projector
    assert {p.dtype for p in projector.parameters()} == {torch.bfloat16}
    size = base.config.vision_config.image_size
    ids = torch.full((1, (size // 14) ** 2), base.config.image_token_id)
    pixels = torch.zeros(1, 3, size, size, dtype=torch.bfloat16)
    made = loaded.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=2, do_sample=False)
    assert made.shape == (1, ids.shape[1] + 2)
