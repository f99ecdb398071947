"""A whole run of models with chat templates: planned, trained, asked, and continued where it was stopped."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from smolora.backbones.load import load_backbone
from smolora.recipe import load_recipe
from smolora.train.plan import make_plan
from smolora.train.run import TrainingRun
from smolora.train.trainer import ContinualTrainer
from support.chat_models import save_chat
from support.train_world import make_world


@pytest.mark.parametrize("kind", ["qwen2_5_vl", pytest.param("internvl", marks=pytest.mark.slow)])
def test_a_run_is_continued_as_if_it_had_not_been_stopped(kind, tmp_path, monkeypatch):
    path = make_world(tmp_path, train=6, ask=3)
    save_chat(tmp_path / "chat", kind)

    def recipe(name):
        overrides = (f"output={tmp_path / name}", f"model.path={tmp_path / 'chat'}", "training.epochs=1")
        short = ("downstream={}", "training.batch_size=2", "training.save_steps=1", "methods={}")
        return load_recipe(path, [*overrides, *short])

    plan = make_plan(recipe("whole"))
    tokens = len(load_backbone(tmp_path / "chat").read(tmp_path / "data/ImageNet/images/0.png").ids)
    assert plan["memory"]["assumes"].startswith(f"{2 * (tokens + 128)} tokens a device")
    whole = TrainingRun(recipe("whole"))()
    assert whole["matrix"] and all(0 <= score <= 100 for row in whole["matrix"] for score in row if score is not None)

    save = ContinualTrainer._save_checkpoint

    def stopped(self, *args):
        save(self, *args)
        if self.state.global_step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ContinualTrainer, "_save_checkpoint", stopped)
    with pytest.raises(KeyboardInterrupt):
        TrainingRun(recipe("stopped"))()
    monkeypatch.undo()
    assert TrainingRun(recipe("stopped"))()["matrix"] == whole["matrix"]
    adapters = list(tmp_path.glob("whole/stage-*/adapter/adapter_model.safetensors"))
    assert len(adapters) == 2
    for file in adapters:
        found, expected = load_file(tmp_path / "stopped" / file.relative_to(tmp_path / "whole")), load_file(file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    answers = sorted((tmp_path / "whole").rglob("*.info.json"))
    layers = [layer for file in answers for layer in json.loads(file.read_text())["routing"]]
    assert any("merger" in layer["layer"] or "projector" in layer["layer"] for layer in layers)
