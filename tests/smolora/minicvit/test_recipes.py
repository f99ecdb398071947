"""The small benchmarks' recipes name the files that their preparation makes, and the data's instructions."""

from pathlib import Path

import pytest

from smolora.evaluate.benchmarks import find_dataset
from smolora.evaluate.coin import COIN_DATASETS
from smolora.instructions.texts import MULTI_TYPE, SINGLE_TYPE
from smolora.minicvit.minicoin import INSTRUCTIONS, MINICOIN
from smolora.minicvit.tasks import MINICVIT, TASKS
from smolora.recipe import load_recipe
from smolora.train.plan import make_plan
from smolora.train.prepare import planned

RECIPES = sorted(Path(__file__).parents[3].glob("recipes/mini*.yaml"))
TABLES = {"single": SINGLE_TYPE, "multi": MULTI_TYPE}


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} >= {"minicvit_run", "minicvit_single", "minicvit_multi", "minicoin"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_its_data(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where nothing is made yet
    recipe = load_recipe(path)
    benchmark = MINICOIN if recipe.benchmark == "MiniCoIN" else MINICVIT
    table = INSTRUCTIONS if benchmark is MINICOIN else TABLES[recipe.setting]
    made = planned(recipe.prepare)
    for task in recipe.all_tasks:
        assert tuple(task.instructions) == table[task.dataset or task.name]
        assert made[recipe.test_file(task).resolve()] == benchmark.tasks[task.dataset or task.name].test
        assert task.train is None or made[recipe.train_file(task).resolve()]
    plan = make_plan(recipe)
    assert [stage["train"] for stage in plan["stages"]] == [benchmark.tasks[task.name].train for task in recipe.tasks]
    assert str(Path(recipe.model.path)) in plan["makes"]


def test_the_full_recipes_have_all_ten_tasks():
    for name in ("minicvit_single", "minicvit_multi"):
        recipe = load_recipe(next(path for path in RECIPES if path.stem == name))
        assert {task.dataset or task.name for task in recipe.all_tasks} == set(TASKS)


@pytest.mark.parametrize("protocol", ("standard", "coin"))
def test_minicoin_has_coins_tasks_in_its_order(protocol):
    recipe = load_recipe(next(path for path in RECIPES if path.stem == "minicoin"), [f"evaluation.protocol={protocol}"])
    assert [task.name for task in recipe.tasks] == list(COIN_DATASETS) == list(MINICOIN.tasks)
    for task in recipe.tasks:
        assert Path(task.test).name in find_dataset(task.name, protocol).question_files
