"""The recipes that are shipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from smolora.data.format import Conversation
from smolora.evaluate.score import find_dataset
from smolora.instructions.texts import instruction_of
from smolora.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))
ORDER = ["ScienceQA", "TextVQA", "Flickr30k", "ImageNet", "GQA", "VQAv2"]
CVIT = [path for path in RECIPES if path.name.startswith("cvit_")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_is_and_can_be_read(path):
    recipe = load_recipe(path)
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(word in " ".join(comment) for word in ("Table", "Figure", "cvit_llava7b"))
    for task in recipe.all_tasks:
        assert Path(task.test).name == find_dataset(task.dataset or task.name).questions
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
