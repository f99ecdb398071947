"""Methods that need a task: it is found by the selector, or given."""

from __future__ import annotations

import pytest

from smolora.recipe import load_recipe
from smolora.train.methods import Method


def test_the_numbers_that_are_given(world):
    """Upstream tasks by their place, few-shot ones share the next number; a selector is given none."""
    recipe = load_recipe(world, ["method=lilora", "methods.lilora.task=oracle", "downstream.zero-shot=[]"])
    adapter = Method(recipe).adapter
    assert adapter.text is None
    assert {task.name: adapter.answers_as(task) for task in recipe.all_tasks} == {
        "ImageNet": 0,
        "Flickr30k": 1,
        "Places365, 2-shot": 2,
    }
    recipe = load_recipe(world, ["method=lilora"])
    adapter = Method(recipe).adapter
    assert adapter.text == "question" and all(adapter.answers_as(task) is None for task in recipe.all_tasks)


def test_a_task_that_is_never_trained_has_no_number(world):
    recipe = load_recipe(world, ["method=moecl", "methods.moecl.task=oracle"])
    with pytest.raises(ValueError, match=r"task must be 'selector' where a task is asked that is .* task 'OCRVQA'"):
        Method(recipe)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("methods.lilora.task=given", r"methods\.lilora\.task"),
        ("methods.lilora.regularizer=paper", r"methods\.lilora\.regularizer.*did you mean.*regulariser"),
        ("methods.lilora.task_r=0", r"methods\.lilora\.task_r"),
        ("methods.lilora.regulariser_weight=-1", r"methods\.lilora\.regulariser_weight"),
    ],
)
def test_bad_options(short, override, message):
    with pytest.raises(ValueError, match=message):
        Method(short("method=lilora", override))
