"""EWC (Kirkpatrick et al. 2017): parameters that mattered for earlier tasks are pulled back to where they were."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ...io.tensors import read_tensors, write_tensors
from ...recipe import Recipe
from ...recipe.schema import SECTION, Count, Number
from ...tuner.counts import num_trainable
from .add_on import AddOn
from .fisher import Tensors, add_pull, joined, squared_gradients, trained
from .stage import StageWork, strided


@dataclass(frozen=True, config=SECTION)
class EWCOptions:
    """Options of EWC.

    Args:
        weight: lambda, the weight of the penalty. The default is the best of a sweep on MiniCVIT.
        scale: "mean1" divides a task's Fisher information by its mean over the trained parameters, so that lambda is
            the mean pull per unit of drift; "raw" takes it as it is, far smaller after training than at its start.
        samples: training samples of a task whose gradients are squared, at even distances in its file, or all where it
            has fewer.
        fisher: "sample" squares the gradient of each sample's -log p(answer); "batch" that of the mean loss over the
            tokens of `training.batch_size` samples, as Prism does, which is smaller by about that size.
    """

    weight: Annotated[Number, Field(ge=0)] = 0.1
    scale: Literal["raw", "mean1"] = "mean1"
    samples: Count = 200
    fisher: Literal["sample", "batch"] = "sample"


class EWC(AddOn):
    """The penalty weight / 2 * sum over earlier tasks k of F_k (theta - theta_k)^2 on the adapter's parameters.

    F_k is the diagonal of the empirical Fisher information at the end of task k. Two tensors of a parameter's shape
    stand for all tasks, see `joined`. The penalty's gradient is added once a step, and Fisher information is that of
    the model's likelihood alone.

    Raises:
        ValueError: a parameter's shape changes from stage to stage.
    """

    name = "ewc"
    only_sequential = True
    options_class = EWCOptions
    options: Any

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._importance: Tensors = {}  # what pulls in this stage, on the model's device
        self._anchor: Tensors = {}
        self._penalty: Tensor | None = None  # of the last step

    @property
    def passes_between_stages(self) -> bool:
        return True

    def memory(self, model: nn.Module) -> int:
        """Two float32 numbers for each parameter that trains."""
        return 8 * num_trainable(model)

    # ---- hooks

    def before_stage(self, model: nn.Module, work: StageWork) -> None:
        """Load what pulls.

        Raises:
            ValueError: a parameter has another shape than in the stage before.
        """
        past = self.past(work)
        if past is not None:
            self.pull_to(model, *past)

    def step_term(self, model: nn.Module, scale: float) -> None:
        if not self._importance:
            return
        weight = self.options.weight
        drift = add_pull(trained(model), self._importance, self._anchor, scale * weight)
        self._penalty = weight / 2 * drift

    def figures(self) -> dict[str, float]:
        """The penalty, as it counts in the loss."""
        return {} if self._penalty is None else {"penalty": float(self._penalty)}

    def after_stage(self, model: nn.Module, work: StageWork, folder: Path) -> None:
        """Add the task's Fisher information to that of earlier tasks."""
        if work.stage.is_downstream:
            return
        fisher = self.fisher(model, work)
        if work.process.is_main_process:
            importance, anchor = joined(self.past(work), fisher, _on_cpu(trained(model)))
            parts = {"importance": importance, "anchor": anchor}
            tensors = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
            write_tensors(folder / f"{self.name}.safetensors", tensors)

    # ---- parts

    def past(self, work: StageWork) -> tuple[Tensors, Tensors] | None:
        """F and a of all earlier tasks, as the stage before left them; None in the first stage."""
        if not work.kept:
            return None
        tensors, _ = read_tensors(work.kept[-1] / f"{self.name}.safetensors")
        return named(tensors, "importance"), named(tensors, "anchor")

    def pull_to(self, model: nn.Module, importance: Tensors, anchor: Tensors) -> None:
        """Pull the parameters that train to an anchor, in this stage.

        Raises:
            ValueError: a parameter has another shape than its importance.
        """
        for name, parameter in trained(model).items():
            if name not in importance:
                continue
            before, now = tuple(importance[name].shape), tuple(parameter.shape)
            if before != now:
                raise ValueError(
                    f"{self.name} needs parameters that keep their shape from stage to stage: {name} was {before} and "
                    f"is {now}"
                )
            self._importance[name], self._anchor[name] = (
                part[name].to(parameter.device) for part in (importance, anchor)
            )

    def fisher(self, model: nn.Module, work: StageWork) -> Tensors:
        """A task's Fisher information by parameter, scaled as the options say; float32, on the CPU.

        Raises:
            ValueError: it is not finite, or 0 everywhere.
        """
        self._importance, self._anchor = {}, {}  # their memory is free for the sums
        options, chosen = self.options, strided(len(work), self.options.samples)
        size = 1 if options.fisher == "sample" else self.recipe.training.batch_size
        sums = squared_gradients(model, work.groups(chosen, size), per_token=options.fisher == "batch")
        count = -(-len(chosen) // size)
        fisher = _on_cpu({name: work.total(total) / count for name, total in sums.items()})
        mean = sum(float(part.double().sum()) for part in fisher.values()) / num_trainable(model)
        if not 0 < mean < float("inf"):
            raise ValueError(f"{self.name}: the mean of the Fisher information must be positive, got {mean}")
        return fisher if options.scale == "raw" else {name: part / mean for name, part in fisher.items()}


def named(tensors: Tensors, part: str) -> Tensors:
    """The tensors `<part>.<parameter>`, by parameter."""
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}


def _on_cpu(tensors: Any) -> Tensors:
    return {name: value.detach().to("cpu", torch.float32) for name, value in tensors.items()}
