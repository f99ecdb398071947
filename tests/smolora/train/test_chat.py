"""A whole run of models with chat templates: planned, trained, asked, and continued where it was stopped."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch.utils.data import DataLoader

from smolora.backbones.load import load_backbone
from smolora.cli import main
from smolora.recipe import load_recipe
from smolora.train.data import Collator, StageSamples
from smolora.train.plan import make_plan
from smolora.train.run import TrainingRun
from smolora.train.trainer import ContinualTrainer
from support.answers import read
from support.chat_models import CHAT_KINDS, save_chat
from support.runs import SAME, assert_ranks_agree, assert_same, killed_runs
from support.train_world import make_world

KINDS = [pytest.param(kind, marks=() if kind == CHAT_KINDS[0] else pytest.mark.slow) for kind in CHAT_KINDS]
SHORT = (
    "downstream={}",
    "training.epochs=1",
    "training.batch_size=2",
    "training.save_steps=1",
)


def chat_world(folder, kind, train=6):
    """The recipe of a world with a model of this kind, whose records have several images and turns, or none."""
    path = make_world(folder, train=train, ask=3)
    shutil.rmtree(folder / "base")
    save_chat(folder / "base", kind)
    file = folder / "data/ImageNet/train.json"
    records = json.loads(file.read_text())
    (first, second), image = records[0]["conversations"], records[0]["image"]
    instruction = first["value"].rpartition("\n")[2]
    records[0]["image"] = [image, records[3]["image"]]
    records[0]["conversations"] += [{**first, "value": f"And <image>?\n{instruction}"}, second]
    records[1]["conversations"][0]["value"] = records[1]["conversations"][0]["value"].removeprefix("<image>\n")
    del records[1]["image"]
    file.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory):
    """A recipe, and the folder of its run, which was moved, so that the recipe can be run again."""
    path = chat_world(tmp_path_factory.mktemp(request.param), request.param)
    recipe = load_recipe(path, SHORT)
    TrainingRun(recipe)()
    return path, recipe.folder.rename(path.parent / "run-whole")


def test_what_a_run_leaves(whole):
    """The plan has the tokens that the processor makes, and the connector routes."""
    path, folder = whole
    plan = make_plan(load_recipe(path, SHORT))
    backbone, images = load_backbone(path.parent / "base"), path.parent / "data/ImageNet/images"
    records = json.loads((path.parent / "data/ImageNet/train.json").read_text())
    tokens = sum(len(backbone.read(images.parent.parent / image).ids) for image in records[0]["image"])
    assert plan["memory"]["assumes"].startswith(f"{2 * (tokens + 128)} tokens a device")
    results = json.loads((folder / "results.json").read_text())
    assert [len(row) for row in results["matrix"]] == [1, 2]
    answers = sorted(folder.rglob("*.info.json"))
    layers = [layer for file in answers for layer in json.loads(file.read_text())["routing"]]
    assert any(part in layer["layer"] for layer in layers for part in ("merger", "projector", "connector"))


def test_a_run_is_continued_as_if_it_had_not_been_stopped(whole, monkeypatch):
    path, folder = whole
    save = ContinualTrainer._save_checkpoint

    def stopped(self, *args):
        save(self, *args)
        if self.state.global_step == 2:
            raise KeyboardInterrupt

    recipe = load_recipe(path, SHORT)
    monkeypatch.setattr(ContinualTrainer, "_save_checkpoint", stopped)
    with pytest.raises(KeyboardInterrupt):
        TrainingRun(recipe)()
    monkeypatch.undo()
    TrainingRun(recipe)()
    assert_same(recipe.folder, folder)


def test_workers_make_the_same_batches(whole):
    path, _ = whole
    run = TrainingRun(load_recipe(path, SHORT))
    run.load_processors()
    samples = StageSamples([run._task_samples(task) for task in run.recipe.tasks])
    collate = Collator(run.backbone, run.recipe.training.max_length, run.dtype)
    alone, shared = (list(DataLoader(samples, 3, collate_fn=collate, num_workers=number)) for number in (0, 2))
    assert len(alone) == len(shared) == 4 and {"pixel_values", "instruction_embeds"} <= alone[0].keys()
    for expected, found in zip(alone, shared, strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_saved_adapter_answers_in_smolora_evaluate_as_in_the_run(whole):
    """With image workers there, and in other batches."""
    path, folder = whole
    stage = folder / "stage-2-Flickr30k"
    options = ["--adapter", str(stage / "adapter"), "--output", str(path.parent / "asked"), "--device", "cpu"]
    assert main(["evaluate", "--recipe", str(path), *options, "downstream={}", "evaluation.workers=1"]) == 0
    for task in ("ImageNet", "Flickr30k"):
        found, expected = (read(place / "answers" / f"{task}.jsonl") for place in (path.parent / "asked", stage))
        assert len(found) == 3
        for one, other in zip(found, expected, strict=True):
            assert (one["question_id"], one["prompt"], one["text"]) == (
                other["question_id"],
                other["prompt"],
                other["text"],
            )


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one(kind, tmp_path):
    """Without dropout, whose masks differ from process to process. An epoch's last step has two samples of four."""
    path = chat_world(tmp_path, kind, train=6)
    overrides = [*SAME, "training.learning_rate=1e-3", "downstream={}"]
    assert_ranks_agree(path, tmp_path, *overrides, steps=4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHAT_KINDS)
def test_killed_three_times_and_continued(kind, tmp_path):
    """In training, while it saves, and among its answers."""
    path = chat_world(tmp_path, kind)
    kills = killed_runs(path, seed=1, kills=3)
    assert [kill["killed at"][0] for kill in kills] == ["step", "save", "ask"]
    assert_same(tmp_path / "run-0", tmp_path / "run-whole")
