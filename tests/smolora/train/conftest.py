"""A small world of data and a base model, shared by the tests of the trainer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from transformers import AutoConfig

from smolora.official.llava import llava_config
from smolora.recipe import Recipe, load_recipe
from support.train_world import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """The recipe of a folder with data and a base model."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def llava_7b(tmp_path_factory) -> Path:
    """A recipe whose base model has the sizes of LLaVA-1.5-7B, and no weights."""
    recipe = make_world(tmp_path_factory.mktemp("7b"), train=2, ask=1)
    base = recipe.parent / "base"
    small = AutoConfig.from_pretrained(base)
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    sizes = {"num_attention_heads": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = llava_config(
        vision={**vision, "image_size": 336, "patch_size": 14, "projection_dim": 768},
        text={**text, **sizes},
        image_token=small.image_token_id,
    )
    config.save_pretrained(base)
    return recipe


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
