"""Preparation of recipes on a benchmark in small: its data, and the base model aligned on its kinds of pictures.

    prepare: {minicvit: {data: DIR, base: DIR, tasks: [NAME, ...], backbone: KIND}}
    prepare: {minicvit_20: {data: DIR, base: DIR, tasks: [NAME, ...], backbone: KIND}}
    prepare: {minicoin: {data: DIR, base: DIR, tasks: [NAME, ...], backbone: KIND}}

Both are made once and kept for later runs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..extras import require_extra
from ..io.files import user_path
from .base_model import make_base
from .files import Benchmark
from .kinds import KINDS, BaseSettings
from .minicoin import MINICOIN, MINICOIN_BASE, MINICOIN_PICTURES
from .pictures import MINICVIT_PICTURES, Curriculum
from .tasks import MINICVIT
from .twenty import MINICVIT_20


class Options(NamedTuple):
    """The options of a preparation."""

    data: Path
    base: Path
    tasks: list[str]
    backbone: str


class Preparation(NamedTuple):
    """The preparation of a benchmark and of its base model.

    Attributes:
        name: its name in a recipe's `prepare`.
        benchmark: the benchmark.
        base: hyperparameters of the base model.
        curriculum: what the base model learns from.
    """

    name: str
    benchmark: Benchmark
    base: BaseSettings
    curriculum: Curriculum

    def planned(self, options: dict[str, Any]) -> dict[Path, int | None]:
        """Return the paths that `prepare` makes, each with its number of records if it has any.

        Raises:
            MissingExtraError: a package that drawing needs is not installed.
            ValueError: an option is unknown, or has a wrong value.
        """
        require_extra("minicvit", user=f"prepare.{self.name}")
        data, base, tasks, _ = self._options(options)
        paths: dict[Path, int | None] = {base: None, data / "images": None, data / "annotations": None}
        for tree in self.benchmark.settings:
            for name in tasks:
                task, files = self.benchmark.tasks[name], self.benchmark.training_files(name)
                paths[data / tree / name / task.test_file] = task.test
                paths.update({data / tree / name / file: count for file, count in files.items()})
        return paths

    def prepare(self, options: dict[str, Any]) -> None:
        """Make the data and the base model, unless they are there.

        Raises:
            ValueError: an option is unknown or has a wrong value, or the base's folder holds something else.
        """
        data, base, tasks, backbone = self._options(options)
        self.benchmark.make(data, tasks)
        make_base(base, replace(self.base, backbone=backbone), self.curriculum)

    def _options(self, options: dict[str, Any]) -> Options:
        prefix, known = f"prepare.{self.name}", self.benchmark.tasks
        unknown = sorted(options.keys() - {"data", "base", "tasks", "backbone"})
        if unknown:
            raise ValueError(f"{prefix} has data, base, tasks and backbone, got {', '.join(unknown)} too")
        folders = []
        for name in ("data", "base"):
            if not isinstance(options.get(name), str) or not options[name]:
                raise ValueError(f"{prefix}.{name} must be a folder, got {options.get(name)!r}")
            try:
                folders.append(Path(user_path(options[name])))
            except ValueError as error:
                raise ValueError(f"{prefix}.{name}: {error}") from error
        tasks = options.get("tasks", list(known))
        if not isinstance(tasks, list) or not tasks or not all(task in known for task in tasks):
            raise ValueError(f"{prefix}.tasks must be a list of {', '.join(known)}, got {tasks!r}")
        backbone = options.get("backbone", self.base.backbone)
        if not isinstance(backbone, str) or backbone not in KINDS:
            raise ValueError(f"{prefix}.backbone must be one of {', '.join(KINDS)}, got {backbone!r}")
        data, base = folders
        return Options(data, base, tasks, backbone)


minicvit = Preparation("minicvit", MINICVIT, BaseSettings(), MINICVIT_PICTURES)
minicvit_20 = Preparation("minicvit_20", MINICVIT_20, BaseSettings(), MINICVIT_PICTURES)
minicoin = Preparation("minicoin", MINICOIN, MINICOIN_BASE, MINICOIN_PICTURES)
