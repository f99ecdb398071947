"""The small benchmarks' recipes name the files that their preparation makes, and the data's instructions."""

import json
from pathlib import Path

import pytest

from small_llava import save_base, small_llava
from smolora.evaluate.benchmarks import find_dataset
from smolora.evaluate.coin import COIN_DATASETS
from smolora.instructions.texts import MULTI_TYPE, SINGLE_TYPE
from smolora.minicvit.minicoin import MINICOIN
from smolora.minicvit.tasks import MINICVIT, TASKS
from smolora.minicvit.twenty import MINICVIT_20
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
    benchmark = {"MiniCoIN": MINICOIN, "MiniCVIT-20": MINICVIT_20}.get(recipe.benchmark, MINICVIT)
    table = TABLES[recipe.setting] if benchmark is MINICVIT else next(iter(benchmark.settings.values()))
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


@pytest.mark.parametrize("protocol", ("standard", "coin"))
def test_a_made_folder_is_planned_and_a_box_that_is_none_is_named(tmp_path, protocol):
    small = {name: task._replace(train=4, test=2) for name, task in MINICOIN.tasks.items()}
    data = MINICOIN._replace(tasks=small).make(tmp_path / "data")
    save_base(tmp_path / "base", small_llava())
    places = {
        "prepare": "{}",
        "model.path": tmp_path / "base",
        "data.root": data / "Instructions_Original",
        "data.images": data / "images",
        "data.annotations": f"[{data / 'annotations'}]",
        "evaluation.protocol": protocol,
    }
    path = next(path for path in RECIPES if path.stem == "minicoin")
    recipe = load_recipe(path, [f"{key}={value}" for key, value in places.items()])
    plan = make_plan(recipe)
    assert [(stage["name"], stage["train"], stage["test"]) for stage in plan["stages"]] == [
        (name, 4, 2) for name in MINICOIN.tasks
    ]
    assert plan["makes"] == []
    questions = data / "Instructions_Original/Grounding/test.json"
    records = json.loads(questions.read_text())
    records[1]["answer_bbox"] = "[0.1, 0.2, 1.3, 0.4]"
    questions.write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"test.json: record 1: answer_bbox must be a text of four numbers in 0..1"):
        make_plan(recipe)
