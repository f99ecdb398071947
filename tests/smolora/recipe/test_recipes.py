"""The recipes that are shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from smolora.data.format import Conversation
from smolora.evaluate.coin import COIN_DATASETS
from smolora.evaluate.score import find_dataset
from smolora.instructions.texts import instruction_of
from smolora.official.llava import llava_config
from smolora.recipe import load_recipe
from smolora.train.methods import Method
from smolora.train.trainer import accumulation

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))
ORDER = ["ScienceQA", "TextVQA", "Flickr30k", "ImageNet", "GQA", "VQAv2"]
COIN = [path for path in RECIPES if path.name.startswith("coin_")]
CVIT = [path for path in RECIPES if path.name.startswith("cvit_")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_is_and_can_be_read(path):
    recipe = load_recipe(path)
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(word in " ".join(comment) for word in ("Table", "Figure", "cvit_llava7b"))
    for task in recipe.all_tasks:
        names = find_dataset(task.benchmark_name).question_files  # None: any
        assert names is None or Path(task.test).name in names
        for text in task.instructions:  # what the template finds in a prompt is itself
            question = Conversation(0, f"Which one?\n{text}", "", None).text
            assert instruction_of(question, [t for other in recipe.all_tasks for t in other.instructions]) == text


@pytest.mark.parametrize("path", CVIT, ids=lambda path: path.stem)
def test_the_papers_setting(path):
    recipe = load_recipe(path)
    config, training = recipe.adapter_config(), recipe.training
    assert [task.name for task in recipe.tasks] == ORDER
    assert (config.r, config.scaling, config.top_k, config.lora_dropout) == (16, 2, 1, 0.05)
    assert (training.learning_rate, training.batch_size, training.epochs) == (1e-4, 64, 1)
    assert len({len(task.instructions) for task in recipe.all_tasks}) == 1
    assert len(recipe.tasks[0].instructions) == (5 if recipe.setting == "multi" else 1)
    released = "released" in path.name
    assert training.schedule == ("constant" if released else "cosine")
    assert (config.route_over, config.decode_routing) == (("all", "token") if released else ("prompt", "prompt"))


def test_studies():
    experts = {path.stem.rpartition("_")[2] for path in CVIT if "experts" in path.name}
    for number in experts:
        config = load_recipe(f"{CVIT[0].parent}/cvit_llava7b_single_experts_{number}.yaml").adapter_config()
        assert (config.num_vu_experts, config.num_if_experts) == (int(number), int(number))
    assert experts == {"1", "2", "8", "16"}
    ablations = {load_recipe(path).method for path in CVIT if "ablation" in path.name}
    assert ablations == {"smolora-vu", "smolora-if", "smolora-mean"}
    names = [load_recipe(path).name for path in CVIT if "places" not in path.name]
    assert len(set(names)) == len(names), "two recipes would share a folder"


@pytest.mark.parametrize("path", COIN, ids=lambda path: path.stem)
def test_coins_setting(path):
    """The samples a step are those of CoIN's 8 GPUs, whose batches and accumulation differ from task to task."""
    recipe = load_recipe(path)
    training, config = recipe.training, recipe.adapter_config()
    assert [task.name for task in recipe.tasks] == list(COIN_DATASETS)
    assert [Path(task.test).name for task in recipe.tasks] == [spec.questions for spec in COIN_DATASETS.values()]
    batches = (14 * 8, 14 * 8, 16 * 8, 6 * 8, 14 * 8, 6 * 8, 8 * 8, 10 * 8)
    assert [recipe.of_stage([task]).training.batch_size for task in recipe.tasks] == [8 * batch for batch in batches]
    assert recipe.of_stage(recipe.tasks) is recipe
    for devices in (1, 2, 4, 8):
        assert all(accumulation(recipe.of_stage([task]), devices) for task in recipe.tasks)
    assert (training.learning_rate, training.weight_decay, training.epochs) == (2e-4, 0, 1)
    assert (training.schedule, training.warmup_ratio, recipe.model.dtype) == ("cosine", 0.03, "bfloat16")
    assert training.full_projector and recipe.evaluation.protocol == "coin"
    assert (recipe.baseline.rank, recipe.baseline.alpha, recipe.baseline.experts) == (128, 256, 8)
    assert (config.r, config.scaling, config.lora_dropout) == (16, 2, 0.05)
    assert recipe.data.root.endswith(
        {"original": "Original", "diverse": "Diverse", "10type": "10Type"}[path.stem.rpartition("_")[2]]
    )


def test_the_published_number_of_moeloras_parameters(tmp_path):
    """350 million for LLaVA-7B (BranchLoRA's table): seven linear layers a decoder layer, and the projector."""
    vision = {"image_size": 336, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096}
    text = {"vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    config = llava_config(
        vision={**vision, "num_hidden_layers": 24, "num_attention_heads": 16},
        text={**text, "num_attention_heads": 32},
        image_token=32000,
    )
    config.save_pretrained(tmp_path)
    path = next(path for path in COIN if path.stem == "coin_llava7b_original")
    recipe = load_recipe(path, [f"model.path={tmp_path}"])
    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(config).requires_grad_(False)
        model = Method(recipe).adapter.start(base, None)
    rows, columns = 6 * 4096 + 11008, 5 * 4096 + 2 * 11008  # all inputs of a decoder layer, and all outputs
    experts, projector = 128 * (rows + columns) + 8 * rows, (1024 + 1) * 4096 + (4096 + 1) * 4096
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 32 * experts + projector == 349_904_896
