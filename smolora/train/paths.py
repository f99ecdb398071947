"""The files of a run. `smolora.report.layout` describes those that the report reads. A stage has besides:

RUN_DIR/recipe.yaml           the recipe with all its defaults
RUN_DIR/stage-2-TextVQA/
  checkpoints/                while it trains, and notes/ on what the method found before its first step; loggers of
                              training.arguments.report_to write here too
  adapter/                    exists once its training is done
  log.json                    the trainer's log
  training.json               samples, steps, trained parameters, and "timing"
  kept/                       what the method keeps for later stages, if anything
  checksums.json              SHA-256 of each file of adapter/ and kept/
  evaluation.json             "timing" of the answers
RUN_DIR/downstream-few-shot/
  Places365, 5-shot/          the adapter of a task that is trained downstream, and the files that go with it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..io.files import read_text
from .methods import Stage


class RunPaths:
    """Paths in the folder of a run.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe = root / "recipe.yaml"
        self.results = root / "results.json"
        self.lock = root / "run.lock"

    def stage(self, stage: Stage) -> Path:
        """Folder of a stage."""
        return self.root / stage.name

    def evaluation(self, stage: Stage) -> Path:
        """Folder of a stage's answers and scores."""
        return self.root / (stage.table or stage.name)

    def adapter(self, stage: Stage) -> Path:
        """Adapter of a stage, which exists once its training is done."""
        return self.stage(stage) / "adapter"

    def checkpoints(self, stage: Stage) -> Path:
        """Checkpoints of a stage while it trains."""
        return self.stage(stage) / "checkpoints"

    def notes(self, stage: Stage) -> Path:
        """What the method found out before a stage's first step, while it trains."""
        return self.checkpoints(stage) / "notes"

    def kept(self, stage: Stage) -> Path:
        """What the method keeps of a stage for later ones."""
        return self.stage(stage) / "kept"

    def checksums(self, stage: Stage) -> Path:
        """Checksums of the files of a stage that later ones read."""
        return self.stage(stage) / "checksums.json"

    def evaluated_adapter(self, stage: Stage) -> Path | None:
        """The adapter that answers a stage's questions: its own or the one it starts from; None for the base model."""
        if stage.train:
            return self.adapter(stage)
        return None if stage.starts_from is None else self.evaluated_adapter(stage.starts_from)

    def scores(self, stage: Stage) -> dict[str, Any]:
        """Scores of a stage so far, by task."""
        return read_if_exists(self.evaluation(stage) / "scores.json")


def read(path: Path) -> Any:
    """Read a JSON file of the run."""
    return json.loads(read_text(path))


def read_if_exists(path: Path) -> dict[str, Any]:
    """Read a JSON file of the run, empty where there is none."""
    return read(path) if path.exists() else {}
