"""`--dry-run`: counts, steps and memory are right, and what is missing is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from smolora.cli import main
from smolora.minicvit.prepare import minicvit
from smolora.recipe import load_recipe
from smolora.train import prepare
from smolora.train.data import Collator, TaskSamples, recipe_backbone
from smolora.train.methods import Method
from smolora.train.plan import GIB, estimate_memory, make_plan
from support.chat_models import save_chat
from support.train_world import make_world


def dry_run(capsys, *arguments: str) -> dict:
    assert main(["train", *arguments, "--dry-run", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan(world, capsys):
    plan = dry_run(capsys, str(world))
    stages = [{key: stage[key] for key in ("name", "train", "test", "asked", "steps")} for stage in plan["stages"]]
    assert stages == [
        {"name": "ImageNet", "train": 12, "test": 4, "asked": 4, "steps": 6},
        {"name": "Flickr30k", "train": 12, "test": 4, "asked": 8, "steps": 6},
    ]
    downstream = [(stage["name"], stage["train"], stage["test"], stage["steps"]) for stage in plan["downstream"]]
    assert downstream == [("OCRVQA", 0, 4, 0), ("Places365, 2-shot", 4, 4, 2)]
    assert plan["accumulation"] == 2 and plan["makes"] == []
    # 7 layers of the small model are adapted: r (d + k) numbers an expert, 4 experts, and two vectors of k
    adapted = [(32, 96)] * 4 + [(96, 32)] * 2 + [(32, 32)] * 2
    assert plan["memory"]["trainable_parameters"] == sum(4 * 4 * (d + k) + 2 * k for d, k in adapted)
    assert not (world.parent / "run").exists(), "a dry run writes nothing"


# LLaVA-1.5-7B's adapted layers, inputs x outputs: gate, up and down of 32 decoder layers, and the projector's two
LAYERS_7B = [(4096, 11008)] * 64 + [(11008, 4096)] * 32 + [(1024, 4096), (4096, 4096)]
LORA_7B = sum(128 * (d + k) for d, k in LAYERS_7B)
PROJECTOR_7B = (1024 + 1) * 4096 + (4096 + 1) * 4096


@pytest.mark.parametrize("setting", ["single", "multi"])
@pytest.mark.parametrize(
    ("method", "trained", "kept"),
    [
        ("seqlora", LORA_7B, 0),
        ("replay", LORA_7B, 0),
        ("dora", LORA_7B + sum(k for _, k in LAYERS_7B), 2 * sum(d * k for d, k in LAYERS_7B)),  # copies in 16 bits
        ("ewc", LORA_7B, 8 * LORA_7B),  # Fisher information and anchor
        ("ewc-tir", LORA_7B, 8 * LORA_7B),
        ("clora", LORA_7B, 6 * 4 * LORA_7B),  # P of six tasks in the few-shot stage
        ("eproj", PROJECTOR_7B, 6 * 4 * PROJECTOR_7B),  # of the other five tasks and the few-shot ones
    ],
)
def test_what_the_baselines_need_for_llava_7b(llava_7b, setting, method, trained, kept):
    path = Path(__file__).parents[3] / f"recipes/cvit_llava7b_{setting}.yaml"
    recipe = load_recipe(path, [f"model.path={llava_7b.parent / 'base'}", f"method={method}"])
    memory = estimate_memory(recipe, Method(recipe), devices=1, image_tokens=576)
    assert memory["trainable_parameters"] == trained
    assert memory["method_gib"] * GIB == kept


@pytest.mark.parametrize("images", [1, 2])
def test_tokens_of_minigpt4(tmp_path, images):
    """The plan counts the image tokens of the longest sample that the collator makes, whose prompts are as long as is
    said of them."""
    path = make_world(tmp_path, train=2, ask=2)
    shutil.rmtree(tmp_path / "base")
    save_chat(tmp_path / "base", "minigpt4")
    file = tmp_path / "data/ImageNet/train.json"
    records = json.loads(file.read_text())
    records[1]["image"] = [records[1]["image"]] * images
    records[1]["conversations"][0]["value"] = "<image>\n" * (images - 1) + records[1]["conversations"][0]["value"]
    file.write_text(json.dumps(records))
    recipe = load_recipe(path, ["downstream={}"])
    backbone = recipe_backbone(recipe)
    assert backbone.style == "minigpt4"
    samples = TaskSamples(recipe, recipe.tasks[0], backbone, None)
    batch = Collator(backbone, recipe.training.max_length, torch.float32)([samples[index] for index in range(2)])
    lengths = [backbone.length(samples[index].input_ids, samples[index].images) for index in range(2)]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    tokens = int((batch["input_ids"] == backbone.image_token_id).sum(1).max())
    assert tokens == images * backbone.queries
    assert make_plan(recipe)["memory"]["assumes"].startswith(f"{2 * (tokens + 128)} tokens a device")


def test_plan_for_a_reader(world, capsys):
    assert main(["train", str(world), "--dry-run", "--method", "multitask"]) == 0
    out = capsys.readouterr().out
    assert "multitask" in out and "24" in out and "memory, estimated" in out


def test_overrides_stand_before_options_and_after_them(world, capsys):
    steps = [dry_run(capsys, str(world))["stages"][0]["steps"]]
    for arguments in (["training.epochs=1", "--method", "seqlora"], ["--method", "seqlora", "training.epochs=1"]):
        steps.append(dry_run(capsys, str(world), *arguments)["stages"][0]["steps"])
    assert steps == [6, 3, 3]


def test_a_task_has_epochs_of_its_own(world, capsys):
    plan = dry_run(capsys, str(world), "downstream.few-shot.0.epochs=5", "tasks.1.epochs=3")
    assert [stage["steps"] for stage in plan["stages"]] == [6, 9]
    assert plan["downstream"][-1]["steps"] == 5
    together = dry_run(capsys, str(world), "tasks.1.epochs=3", "--method", "multitask")
    assert [stage["steps"] for stage in together["stages"]] == [12], "of a stage that trains it alone"


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        ("multitask", [("multitask", 24, 8, 8, 12)]),
        ("zeroshot", [("zeroshot", 0, 8, 8, 0)]),
        ("dirlora", [("ImageNet", 12, 4, 4, 6), ("Flickr30k", 12, 4, 4, 6)]),
    ],
)
def test_stages_of_methods(world, capsys, method, stages):
    plan = dry_run(capsys, str(world), "--method", method)
    found = [tuple(stage[key] for key in ("name", "train", "test", "asked", "steps")) for stage in plan["stages"]]
    assert found == stages


def test_tasks_of_coin(world, tmp_path, capsys):
    """Grounding is known under the protocol "coin" alone, and Flickr30k is not."""
    folder = tmp_path / "Grounding"
    shutil.copytree(world.parent / "data" / "ImageNet", folder)
    records = json.loads((folder / "test.json").read_text())
    boxes = {"answer_bbox": "[0.10, 0.20, 0.50, 0.60]", "size": [24, 30]}
    (folder / "test.json").write_text(json.dumps([record | boxes for record in records]))
    task = f"{{name: Grounding, train: {folder / 'train.json'}, test: {folder / 'test.json'}}}"
    grounding = [str(world), f"tasks=[{task}]", "downstream={}"]
    plan = dry_run(capsys, *grounding, "evaluation.protocol=coin")
    assert [(stage["train"], stage["asked"]) for stage in plan["stages"]] == [(12, 4)]
    assert main(["train", *grounding, "--dry-run"]) == 1
    assert "got 'Grounding'; it is scored under 'standard' and 'coin'" in capsys.readouterr().err
    assert main(["train", str(world), "evaluation.protocol=coin", "--dry-run"]) == 1
    assert "task 'Flickr30k': dataset must be one of ScienceQA, TextVQA, ImageNet, GQA" in capsys.readouterr().err


def test_everything_that_is_missing_is_named(world, capsys):
    missing = ["model.path=/no/base", "tasks.0.train=ImageNet/nothing.json", "data.annotations=[/no/annotations]"]
    assert main(["train", str(world), *missing, "--dry-run"]) == 1
    error = capsys.readouterr().err
    for name in ("/no/base/config.json (model.path)", "ImageNet/nothing.json", "/no/annotations"):
        assert name in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.per_device_batch_size=3"], "training.batch_size must be a multiple"),
        (["tasks.0.dataset=ImagNet"], "got 'ImagNet'; did you mean ImageNet?"),
        (["tasks.0.test=ImageNet/train.json"], "ImageNet.test must be named test.json"),
        (["trainin.epochs=3"], "did you mean 'training'"),
        (["method=smolra"], "got 'smolra'; did you mean 'smolora'?"),
        (["prepare.nothing=1"], "prepare must be one of minicvit, minicvit_20, minicoin, got 'nothing'"),
    ],
)
def test_refused(world, capsys, overrides, message):
    assert main(["train", str(world), *overrides, "--dry-run"]) == 1
    assert message in capsys.readouterr().err


def test_a_task_of_no_known_dataset_is_named(world, capsys):
    assert main(["train", str(world), "tasks.0.name=Birds", "--dry-run"]) == 1
    assert "task 'Birds': dataset must be one of ScienceQA" in capsys.readouterr().err


def test_a_backend_that_cannot_run_is_named(world, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["train", str(world), "backend=cuda", "--dry-run"]) == 1
    assert "backend 'cuda' cannot run: " in capsys.readouterr().err


def test_images_are_looked_for(world, tmp_path, capsys):
    shutil.copytree(world.parent / "data", tmp_path / "data")
    (tmp_path / "data/ImageNet/images/3.png").unlink()
    assert main(["train", str(world), f"data.root={tmp_path / 'data'}", "--dry-run"]) == 1
    error = capsys.readouterr().err
    assert "images/3.png" in error and "record 6, and 1 more of that file" in error


def test_answers_that_are_cut_off_whole_are_named(world, tmp_path, capsys):
    """The second task's, before the first is trained; how many more there are; and of the last table too."""
    assert main(["train", str(world), "training.max_length=95", "--dry-run"]) == 1
    error = capsys.readouterr().err
    assert "Flickr30k/train.json: record 0: training.max_length 95 cuts off all of its answer, it has" in error, error
    assert "(and 11 more of that file)" in error
    data = tmp_path / "data"
    shutil.copytree(world.parent / "data", data)
    records = json.loads((data / "Places365/train.json").read_text())
    records[2]["conversations"][0]["value"] = "<image>\n" + "word " * 900 + "?"
    (data / "Places365/train.json").write_text(json.dumps(records))
    assert main(["train", str(world), f"data.root={data}", "training.max_length=600", "--dry-run"]) == 1
    assert "Places365/train.json: record 2: training.max_length 600" in capsys.readouterr().err
    assert main(["train", str(world), f"data.root={data}", "--method", "zeroshot", "--dry-run"]) == 0


def test_prepared_folders_at_home(world, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = minicvit.planned({"data": "~/data", "base": "~/base", "tasks": ["GQA"]})
    assert tmp_path / "base" in found and all(path.is_relative_to(tmp_path) for path in found)
    assert main(["train", str(world), "prepare={minicvit: {data: $D, base: b}}", "--dry-run"]) == 1
    assert "prepare.minicvit.data: a path is taken as it is written" in capsys.readouterr().err


def test_what_a_recipe_makes_is_listed_and_not_required(world, tmp_path, monkeypatch, capsys):
    root = tmp_path / "made"
    module = SimpleNamespace(made=SimpleNamespace())
    made = {root / "ImageNet/train.json": 10, root / "ImageNet/test.json": 3, root / "base": None}
    module.made.planned = lambda options: {path: count for path, count in made.items() if options == {"scale": 2}}
    monkeypatch.setattr(prepare, "PREPARATIONS", {"made": "made_module"})
    monkeypatch.setitem(__import__("sys").modules, "made_module", module)
    overrides = [
        "prepare={made: {scale: 2}}",
        f"data.root={root}",
        f"model.path={root / 'base'}",
        "downstream={}",
        "tasks=[{name: ImageNet, train: ImageNet/train.json, test: ImageNet/test.json}]",
    ]
    plan = make_plan(load_recipe(world, overrides))
    assert (plan["stages"][0]["train"], plan["stages"][0]["test"], plan["stages"][0]["steps"]) == (10, 3, 6)
    assert set(plan["makes"]) == {str(path) for path in made} and plan["memory"] is None
