"""The hooks of a method: what it does before, in and after the training of a stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ...recipe import Recipe, TaskRecipe
from .stage import Stage, StageWork


class Hooks:
    """Hooks around stages, batches and steps. None of them does anything by default.

    A run has one object of each, and hooks are called in the order of the stages. A killed run starts its unfinished
    stage again, with new objects, and does not repeat finished stages: what later stages need must be in the files that
    `after_stage` writes. A stage that starts again sees the same model, data and files. So a killed run ends as one
    that was never disturbed if hooks depend on nothing else, and draw random numbers from a generator of their own that
    the recipe seeds.

    Args:
        recipe: the recipe of the run.
    """

    only_sequential: ClassVar[bool] = False  # made for one task after another, and for no other course
    half_extra: bool = False  # half of each step's samples are those of `extra_samples`, repeated as needed

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @property
    def passes_between_stages(self) -> bool:
        """Whether it runs the model over data before or after a stage, which needs its parameters whole."""
        return False

    def settings(self) -> dict[str, Any]:
        """Sections of the recipe as they are used, for the results."""
        return {}

    def memory(self, model: nn.Module) -> int:
        """Bytes that it holds on a device besides the model and its optimiser, for the plan.

        Args:
            model: the model that the first stage trains, perhaps without values.
        """
        return 0

    def freeze(self, model: nn.Module, stage: Stage) -> None:
        """Freeze what a stage does not train, before the optimiser is made. The dry run calls it too, without data."""

    def before_stage(self, model: nn.Module, work: StageWork) -> None:
        """Called before a stage is trained, with its data and what earlier stages kept.

        The model is as the stage starts from it, also where the stage goes on from a checkpoint.
        """

    def extra_samples(self, stage: Stage, kept: tuple[Path, ...]) -> list[tuple[TaskRecipe, int]]:
        """Samples to train on besides the stage's own, such as replayed ones: (task, index in its training file) each.

        Args:
            stage: the stage that starts.
            kept: see `StageWork`.
        """
        return []

    def num_extra_samples(self, stage: Stage, sizes: Mapping[str, int]) -> int:
        """Number of samples that `extra_samples` will add, for the plan.

        Args:
            stage: the stage.
            sizes: number of training samples of each task, by name.
        """
        return 0

    def batch_inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Further arguments of the model's forward for a batch that is trained on."""
        return {}

    def loss_term(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor | None:
        """A term for the loss of a micro-batch. Terms are averaged over the micro-batches of a step."""
        return None

    def step_term(self, model: nn.Module, scale: float) -> None:
        """Add the gradient of a term that depends on the parameters alone to their `grad`, times `scale`.

        Called once an optimiser step, after the gradients of all micro-batches and processes are gathered, and before
        they are clipped. So the term does not grow with the number of micro-batches.
        """

    def after_stage(self, model: nn.Module, work: StageWork, folder: Path) -> None:
        """Called after a stage is trained and before its adapter is saved, so it may still change the adapter.

        Every process calls it, with the same trained model; the main process alone writes files.

        Args:
            model: the trained model.
            work: the stage's data.
            folder: an empty folder for what later stages need.
        """

    def figures(self) -> dict[str, float]:
        """Numbers of the last optimiser step, which are logged beside the loss."""
        return {}

    def has(self, name: str) -> bool:
        """Whether a hook does anything."""
        return getattr(type(self), name) is not getattr(Hooks, name)
