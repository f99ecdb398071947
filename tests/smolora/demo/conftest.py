"""Two small finished runs over one base, to ask on."""

from __future__ import annotations

from pathlib import Path

import pytest

from smolora.demo.runs import DemoRun, open_runs
from smolora.recipe import load_recipe
from smolora.train.run import TrainingRun
from support.train_world import make_world

METHODS = ("smolora", "seqlora")


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> list[Path]:
    """The folders of two runs of two tasks."""
    recipe = make_world(tmp_path_factory.mktemp("demo"), ask=3)
    quick = ["downstream={}", "training.batch_size=12", "training.per_device_batch_size=12", "training.epochs=1"]
    made = []
    for method in METHODS:
        made.append(recipe.parent / method)
        TrainingRun(load_recipe(recipe, [*quick, f"method={method}", f"output={made[-1]}"]))()
    return made


@pytest.fixture(scope="session")
def runs(folders) -> list[DemoRun]:
    return open_runs(folders)
