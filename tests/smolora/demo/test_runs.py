"""Runs and their models: what is missing is named, and weights are shared but for the adapters."""

from __future__ import annotations

import shutil

import pytest
import torch

from smolora.demo import runs as module
from smolora.demo.runs import StageModels, open_runs, with_shared_weights


@pytest.mark.parametrize(
    ("remove", "match"),
    [
        ("results.json", "is no finished run: it has no results.json"),
        ("recipe.yaml", "has no recipe.yaml"),
        ("stage-2-Flickr30k/adapter", "has no adapter of stage-2-Flickr30k"),
    ],
)
def test_what_a_run_lacks_is_named(folders, tmp_path, remove, match):
    copy = tmp_path / "run"
    shutil.copytree(folders[1], copy)
    path = copy / remove
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=match):
        open_runs([copy])


def test_a_base_that_was_moved_is_named(folders, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(folders[1], copy)
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(folders[1].parent / "base"), "elsewhere"))
    with pytest.raises(ValueError, match="the base model is no longer in elsewhere"):
        open_runs([copy])


def test_a_run_that_was_moved_is_opened(folders, tmp_path):
    copy = tmp_path / "moved"
    shutil.copytree(folders[1], copy)
    (run,) = open_runs([copy])
    assert run.training.paths.evaluated_adapter(run.stages[0]).is_relative_to(copy)


def test_runs_over_one_base_share_its_weights(runs):
    models = StageModels()
    with models.lock:
        loaded = [models.get(run, stage) for run in runs for stage in run.stages]
        assert models.get(runs[0], runs[0].stages[0]) is loaded[0]
    tensors = [{name: p for name, p in model.named_parameters() if "vision_tower" in name} for model in loaded]
    assert tensors[0].keys() == tensors[-1].keys() and len(tensors[0]) > 10
    for name, tensor in tensors[0].items():
        assert all(other[name] is tensor for other in tensors), name
    assert not any(model.training for model in loaded)


def test_a_copy_has_modules_of_its_own(runs):
    base = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    copy = with_shared_weights(base)
    copy[0] = torch.nn.Identity()
    assert isinstance(base[0], torch.nn.Linear) and copy[1] is not base[1]
    assert copy[1].weight is base[1].weight and copy[1].running_mean is base[1].running_mean


def test_few_models_stay_in_memory(runs, monkeypatch):
    monkeypatch.setattr(module, "MOST_MODELS", 1)
    models = StageModels()
    with models.lock:
        first = models.get(runs[0], runs[0].stages[0])
        models.get(runs[1], runs[1].stages[0])
        assert models.get(runs[0], runs[0].stages[0]) is not first
