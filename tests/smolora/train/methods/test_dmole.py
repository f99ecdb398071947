"""D-MoLE from end to end on a small LLaVA: allocation, experts that stay, routers, and answers outside the trainer."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForImageTextToText

from smolora.evaluate.instructions import recipe_questions
from smolora.methods.autoencoder_router import AutoencoderRouter
from smolora.recipe import Recipe, load_recipe
from smolora.train.methods import Method, StageWork
from smolora.train.methods.dmole import DMoLE
from smolora.train.plan import make_plan
from smolora.train.run import TrainingRun
from support.backbones import BACKBONES, TEXT_ONLY
from support.chat_models import save_chat
from support.train_world import make_world, work_of

STAGES = ("stage-1-ImageNet", "stage-2-Flickr30k")
OPTIONS = (
    "method=dmole",
    "training.batch_size=4",
    "training.per_device_batch_size=4",
    "training.save_steps=1",
    "training.weight_decay=0.1",
    "methods.dmole.router_epochs=300",
    "methods.dmole.router_hidden=32",
    "methods.dmole.scored_share=0.25",
)


def make_tasks_differ(patch: pytest.MonkeyPatch) -> None:
    """As the small ones do not: other layers score best, and the task before is a companion."""
    own = DMoLE._scores

    def scores(self, model, work):
        found = own(self, model, work)
        return {name: score and score ** (-1) ** work.stage.number for name, score in found.items()}

    def choose(self, task, features, least_share):
        assert len(features.image) == len(features.text) == 12 and features.image.any(1).all()
        self.companion[task] = task - 1
        return task - 1

    patch.setattr(DMoLE, "_scores", scores)
    patch.setattr(AutoencoderRouter, "choose_companion", choose)


def load(world: Path, folder: Path) -> Recipe:
    quick = (f"output={folder}", "downstream={}", "training.epochs=1", "evaluation.max_new_tokens=2")
    return load_recipe(world, [*quick, *OPTIONS])


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> tuple[Recipe, dict]:
    """A recipe of two tasks, and the results of its run."""
    recipe = load(world, tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        make_tasks_differ(patch)
        return recipe, TrainingRun(recipe)()


def adapter(folder, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / stage / "adapter/adapter_model.safetensors")


def settings(folder, stage: str) -> dict:
    return json.loads((folder / stage / "adapter/adapter_config.json").read_text())


def test_experts_of_two_tasks(whole):
    """They are in the chosen layers alone; the first task's keep their bits under AdamW with weight decay, while they
    are used beside the second's."""
    recipe, results = whole
    assert [len(row) for row in results["matrix"]] == [1, 2] and results["task_source"] == "selector"
    for number, row in enumerate(results["selected"]):
        assert [len(counts) == 3 and sum(counts) for counts in row.values()] == [4] * (number + 1)
        assert all(counts[place] >= 2 for place, counts in enumerate(row.values())), row
    first, second = (adapter(recipe.folder, stage) for stage in STAGES)
    placements = [settings(recipe.folder, stage)["placement"] for stage in STAGES]
    logs = [json.loads((recipe.folder / stage / "kept/dmole.json").read_text()) for stage in STAGES]
    for number, (log, placement) in enumerate(zip(logs, placements, strict=True)):
        assert len(log["scores"]) == 16 and len(log["layers"]) == 8
        assert sum("vision_tower" in name for name in log["layers"]) >= 2
        assert sorted(log["layers"]) == sorted(name for name, experts in placement.items() if number in experts)
    assert {tuple(experts) for experts in placements[1].values()} == {(0,), (1,), (0, 1)}
    for name, experts in placements[0].items():
        for letter in "AB":
            key = f"base_model.model.{name}.routedlora_experts.{letter}"
            before, after = first[key][0], second[key][placements[1][name].index(0)]
            assert experts == [0] and before.any() and torch.equal(before, after)
    for name, experts in placements[1].items():
        key = f"base_model.model.{name}.routedlora_experts"
        assert second[f"{key}.A"].shape[0] == len(experts)
        if 1 in experts:
            assert second[f"{key}.B"][experts.index(1)].any(), "it has learned"
    assert [log["companion"] for log in logs] == [None, 0]
    trained = [results["training"][stage]["trainable"] for stage in STAGES]
    assert trained == [sum(16 * (32 + 32) for _ in log["layers"]) for log in logs]


def test_answers_outside_of_the_trainer(whole):
    """The saved adapter is not told a task: its router's choice is what was trained."""
    recipe, _ = whole
    base = AutoModelForImageTextToText.from_pretrained(recipe.model.path, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, recipe.folder / STAGES[1] / "adapter").eval()
    router = model.base_model.selector()
    assert (router.threshold >= 0).tolist() == [True, True]
    run = TrainingRun(recipe)
    run.load_processors()
    texts = recipe_questions(recipe)
    for number, task in enumerate(recipe.tasks):
        samples = run._task_samples(task)
        texts_of_task = [sample.text for sample in samples.samples]
        embeds = texts[task.name](texts_of_task)
        pixels = torch.stack([run.backbone.transform(recipe.images(task) / sample.image) for sample in samples.samples])
        prompts = [run.backbone.encoder.expand(run.backbone.encoder.prompt(text, True)) for text in texts_of_task]
        inputs = {"input_ids": torch.tensor(prompts), "pixel_values": pixels, "instruction_embeds": embeds}
        features = model.base_model.sample_features(**inputs)
        experts = router.experts(features)
        own = experts[:, 0] == number
        assert own.float().mean() > 0.7 and (experts[own, 1] == number - 1).all()
        options = {"max_new_tokens": 3, "do_sample": False}
        answers = model.generate(**inputs, **options)
        assert torch.equal(model.base_model.last_tasks(), experts[:, 0])
        assert torch.equal(answers, model.generate(**inputs, experts=experts, **options))
        logits, given = (model(**inputs, **extra).logits for extra in ({}, {"experts": experts}))
        assert torch.equal(logits, given)
        none = torch.full((len(pixels), 1), -1)
        assert (logits - model(**inputs, experts=none).logits).abs().max() > 1e-3


def test_processes_share_scores_and_features(world, tmp_path, monkeypatch):
    """What two processes find of their shares adds up to what one finds of all samples."""
    recipe = load(world, tmp_path)
    run = TrainingRun(recipe)
    run.load_processors()
    stage = run.method.course.stages()[0]
    model, method = run.method.adapter.start(run.base_model(), None), run.method.adapter
    work = work_of(run, stage)
    scores, features = method._scores(model, work), method._features(model, work)
    assert len(features.text) == 12 and features.text.any(1).all()
    monkeypatch.setattr(StageWork, "total", lambda self, values: values)
    found = []
    for index in range(2):
        place = SimpleNamespace(num_processes=2, process_index=index, device=torch.device("cpu"))
        share = dataclasses.replace(work, process=place)
        found.append((method._scores(model, share), method._features(model, share)))
    assert {name: sum(own[name] for own, _ in found) for name in scores} == pytest.approx(scores, rel=1e-9)
    for whole, first, second in zip(features, *(own for _, own in found), strict=True):
        assert torch.equal(first + second, whole) and not (first * second).any()


def test_a_run_that_is_broken_off_ends_as_a_whole_one(whole, world, tmp_path, monkeypatch):
    """After a checkpoint of the second stage: the same scores, experts, router and weights, bit for bit."""
    make_tasks_differ(monkeypatch)
    steps = 0

    def stop(optimizer, *_):
        nonlocal steps
        steps += type(optimizer) is torch.optim.AdamW  # the router's is Adam
        if steps == 5:
            raise KeyboardInterrupt

    handle = register_optimizer_step_post_hook(stop)
    recipe = load(world, tmp_path)
    try:
        with pytest.raises(KeyboardInterrupt):
            TrainingRun(recipe)()
    finally:
        handle.remove()
    assert list((tmp_path / STAGES[1] / "checkpoints").glob("checkpoint-1"))
    notes = tmp_path / STAGES[1] / "checkpoints/notes"
    assert sorted(path.name for path in notes.iterdir()) == ["companion.json", "scores.json"]
    with monkeypatch.context() as patch:  # neither is computed again
        patch.setattr(DMoLE, "_scores", lambda *_: pytest.fail("the layers are scored again"))
        patch.setattr(AutoencoderRouter, "choose_companion", lambda *_: pytest.fail("a companion is chosen again"))
        TrainingRun(recipe)()
    assert not notes.parent.exists()
    for stage in STAGES:
        expected, got = (adapter(folder, stage) for folder in (whole[0].folder, tmp_path))
        assert got.keys() == expected.keys()
        assert [name for name in got if not torch.equal(got[name], expected[name])] == []
        for name in ("adapter/adapter_config.json", "kept/dmole.json"):
            files = [(folder / stage / name).read_text() for folder in (whole[0].folder, tmp_path)]
            assert files[0] == files[1], name


def test_the_dry_run_counts_and_checks(short):
    """Before anything runs: the experts of one task, in half of the layers, and a budget that leaves none."""
    plan = make_plan(short("method=dmole"))
    assert plan["memory"]["trainable_parameters"] == 8 * 16 * (32 + 32)
    assert make_plan(short("method=dmole", "methods.dmole.budget=0.25"))["memory"]["trainable_parameters"] == 4 * 1024
    with pytest.raises(
        ValueError, match=r"budget must leave an expert .*, got 0.05 of 8 and 8 scored layers, 1 experts"
    ):
        make_plan(short("method=dmole", "methods.dmole.budget=0.05"))
    with pytest.raises(ValueError, match=r"got 0.5 of 8 and 0 scored layers"):
        make_plan(short("method=dmole", r"methods.dmole.target_modules=.*language_model.*\.self_attn\.[qkvo]_proj"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """The recipe of a world with a small Qwen2.5-VL."""
    folder = tmp_path_factory.mktemp("qwen")
    path = make_world(folder, train=6, ask=3)
    shutil.rmtree(folder / "base")
    save_chat(folder / "base", "qwen2_5_vl")
    return path


def test_a_qwen_is_scored_and_its_features_are_seen(qwen, tmp_path):
    """Its attention, of the tower with q, k and v in one layer: a gradient reaches all, and features fit the router."""
    recipe = load(qwen, tmp_path)
    run = TrainingRun(recipe)
    run.load_processors()
    stage = run.method.course.stages()[0]
    model, method = run.method.adapter.start(run.base_model(), None), run.method.adapter
    work = work_of(run, stage)
    scores, features = method._scores(model, work), method._features(model, work)
    tower = {name for name in scores if ".visual." in name}
    assert {name.rpartition(".")[2] for name in tower} == {"qkv", "proj"}
    assert {name.rpartition(".")[2] for name in scores.keys() - tower} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(scores) == 6 and all(score > 0 for score in scores.values())
    router = model.base_model.selector()
    assert features.image.shape == (6, router.image_dim) and features.image.any(1).all()
    plan = make_plan(recipe)
    assert plan["memory"]["trainable_parameters"] == sum(
        p.numel() for p in model.parameters() if p.requires_grad and p.numel() > 1
    )


@pytest.mark.slow
def test_experts_of_a_qwen(qwen, tmp_path):
    """Two tasks; experts of both parts, and the router finds each task."""
    recipe = load(qwen, tmp_path)
    results = TrainingRun(recipe)()
    assert [len(row) for row in results["matrix"]] == [1, 2]
    for number, stage in enumerate(STAGES):
        chosen = [name for name, experts in settings(tmp_path, stage)["placement"].items() if number in experts]
        assert len(chosen) == 3 and 0 < sum(".visual." in name for name in chosen) < 3
    second = results["selected"][1]
    assert all(counts[place] >= 2 for place, counts in enumerate(second.values())), second


@pytest.mark.parametrize("name", ["mllama", "qwen3"])
def test_a_model_whose_tower_is_not_shown_is_refused(short, name):
    """Whatever the target modules are, since it would fail after the first stage."""
    adapter = Method(short("method=dmole", "methods.dmole.target_modules=[q_proj]")).adapter
    with torch.device("meta"):
        base = {**BACKBONES, **TEXT_ONLY}[name].make()
    with pytest.raises(ValueError, match=r"method must not be dmole for a \w+: .* take smolora or another method"):
        adapter.config(base)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("budget=1.5", "methods.dmole.budget must be at most 1, got 1.5"),
        ("quantile=0", "methods.dmole.quantile.* 0"),
        ("router_epoch=3", "unknown key 'methods.dmole.router_epoch'; did you mean 'methods.dmole.router_epochs'"),
    ],
)
def test_bad_options(short, option: str, message: str):
    with pytest.raises(ValueError, match=message):
        make_plan(short("method=dmole", f"methods.dmole.{option}"))
