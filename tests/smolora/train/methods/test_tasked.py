"""Methods that need a task: it is found by the selector, or given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from smolora.methods.selector import Features, TaskSelector
from smolora.recipe import load_recipe
from smolora.train.methods import Method
from smolora.train.methods.stage import in_eval_mode


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


class Selected(torch.nn.Module):
    """Notes in which mode its features are asked for."""

    def __init__(self):
        super().__init__()
        self.inside = torch.nn.Dropout()
        self.keys = TaskSelector(2, 3, 3)
        self.modes = []

    def selector(self):
        return self.keys

    def sample_features(self, task_ids):
        self.modes.append(self.inside.training)
        return Features(torch.ones(len(task_ids), 3), torch.ones(len(task_ids), 3))


@pytest.mark.parametrize("method", ["lilora", "branchlora"])
def test_keys_are_made_without_dropout(short, tmp_path, method):
    adapter = Method(short(f"method={method}", "methods.branchlora.freeze=false")).adapter
    model = Selected().train()
    batches = [{"task_ids": torch.tensor([0, 0])}] * 2
    adapter.after_stage(model, SimpleNamespace(batches=lambda: batches, total=lambda values: values), tmp_path)
    assert model.modes == [False, False] and model.inside.training and model.keys.learned.tolist() == [True, False]


def test_the_mode_is_restored_after_an_error():
    model = torch.nn.Dropout()
    with pytest.raises(KeyError), in_eval_mode(model):
        assert not model.training
        raise KeyError
    assert model.training
    with in_eval_mode(model.eval()):
        pass
    assert not model.training


@pytest.mark.parametrize(
    "override",
    [
        "lilora.task_r=true",
        "lilora.task_r=2.0",
        "lilora.regulariser_weight=true",
        "moecl.double_softmax='no'",
        "moecl.double_softmax=0",
        "moecl.discriminator_weight=false",
        "moecl.target_modules=[1]",
    ],
)
def test_options_are_taken_as_they_are_written(short, override):
    method = override.partition(".")[0]
    key = override.partition("=")[0].replace(".", r"\.")
    with pytest.raises(ValueError, match=rf"methods\.{key}.* must be"):
        Method(short(f"method={method}", f"methods.{override}"))


@pytest.mark.parametrize(
    ("method", "options", "unused"),
    [
        ("branchlora", "{alignment: 2}", "alignment"),
        ("branchlora", "{routers: shared, keys: trained}", "keys"),
        ("branchlora", "{routers: shared, alignment: 0.5}", "alignment"),
        ("branchlora", "{freeze: false, freeze_pool: tunable}", "freeze_pool"),
        ("eproj", "{pull: 0.2}", "pull"),
        ("eproj", "{key_steps: 10}", "key_steps"),
        ("lilora", "{regulariser_weight: 2}", "regulariser_weight"),
        ("moecl", "{discriminator_weight: 0, double_softmax: false}", "double_softmax"),
    ],
)
def test_options_without_an_effect_are_refused(short, method, options, unused):
    with pytest.raises(ValueError, match=rf"methods\.{method}\.{unused} has no effect where .* leave it out, got"):
        Method(short(f"method={method}", f"methods.{method}={options}"))


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
