"""A small world of data and a base model, shared by the tests of the trainer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from smolora.recipe import Recipe, load_recipe
from support.train_world import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """The recipe of a folder with data and a base model."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def short(world, tmp_path):
    """A recipe that runs in seconds: one step on one task, unless something else is asked for."""

    def load(*overrides: str, one_task: bool = False) -> Recipe:
        quick = [
            f"output={tmp_path / 'run'}",
            "downstream={}",
            "training.epochs=1",
            "training.batch_size=12",
            "training.per_device_batch_size=12",
            "evaluation.max_new_tokens=2",
        ]
        recipe = load_recipe(world, [*quick, *overrides])
        return dataclasses.replace(recipe, tasks=recipe.tasks[:1]) if one_task else recipe

    return load
