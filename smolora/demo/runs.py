"""Finished runs, and the models of their stages."""

from __future__ import annotations

import copy
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..io.files import has_file
from ..recipe import Recipe, TaskRecipe, load_recipe
from ..report.layout import RunFolder, read_runs
from ..train.methods import Stage
from ..train.run import TrainingRun

MOST_MODELS = 8  # whose adapters stay in memory


class DemoRun:
    """A finished run with what it takes to ask its models.

    Args:
        folder: the run as the report reads it.

    Raises:
        ValueError: the folder lacks its recipe or an adapter, or the base model is no longer where the recipe says.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.name = folder, folder.name
        path = folder.folder / "recipe.yaml"
        if not path.is_file():
            raise ValueError(f"{folder.folder} has no recipe.yaml, which says what its models are made of")
        self.recipe: Recipe = load_recipe(path, [f"output={json.dumps(str(folder.folder))}"])
        base = Path(self.recipe.model.path)
        if not has_file(base / "config.json"):
            raise ValueError(
                f"{folder.folder}: the base model is no longer in {base} (a relative path starts in the current folder)"
            )
        self.training = TrainingRun(self.recipe)
        self.training.load_processors()
        self.stages = [stage for stage in self.training.method.course.stages() if stage.name in folder.stages]
        for stage in self.stages:
            adapter = self.training.paths.evaluated_adapter(stage)
            if adapter is not None and not adapter.is_dir():
                raise ValueError(f"{folder.folder} has no adapter of {stage.name}: {adapter} is missing")

    def task(self, name: str) -> TaskRecipe | None:
        """A task of the run by name; None if it has no such task."""
        return next((task for task in self.recipe.all_tasks if task.name == name), None)


def open_runs(folders: Sequence[Path]) -> list[DemoRun]:
    """Open finished runs, each with a name of its own.

    Raises:
        ValueError: a folder holds no finished run, or lacks what its models are made of.
    """
    return [DemoRun(folder) for folder in read_runs(list(folders))]


class StageModels:
    """The models of runs' stages. Runs with the same base share its weights, and one thread at a time uses a model."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._bases: dict[tuple[Path, str], nn.Module] = {}
        self._models: OrderedDict[tuple[Path, str], nn.Module] = OrderedDict()

    def get(self, run: DemoRun, stage: Stage) -> nn.Module:
        """The model that a stage left, in eval mode. The caller holds the lock."""
        key = run.folder.folder.resolve(), stage.name
        if key not in self._models:
            adapter = run.training.paths.evaluated_adapter(stage)
            self._models[key] = run.training.method.adapter.load(with_shared_weights(self._base(run)), adapter).eval()
        self._models.move_to_end(key)
        while len(self._models) > MOST_MODELS:
            self._models.popitem(last=False)
        return self._models[key]

    def _base(self, run: DemoRun) -> nn.Module:
        key = Path(run.recipe.model.path).resolve(), run.recipe.model.dtype
        if key not in self._bases:
            self._bases[key] = run.training.base_model()
        return self._bases[key]


def with_shared_weights(model: nn.Module) -> nn.Module:
    """Copy a model's modules around the same parameters and buffers, so that adapters on the copy leave it alone."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
