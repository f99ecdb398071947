"""EWC with task-similarity-informed regularisation (TIR; He et al., arXiv 2311.16206)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ...data.format import read_conversations
from ...io.tensors import read_tensors, write_tensors
from ...recipe import Recipe
from ...recipe.schema import SECTION, Count, Flag, PathText
from .ewc import EWC, EWCOptions, named
from .fisher import Tensors, trained
from .stage import StageWork, strided
from .task_vectors import KINDS, image_vector, similarity, text_encoder, text_vector


@dataclass(frozen=True, config=SECTION)
class EWCTIROptions(EWCOptions):
    """Options of EWC with TIR.

    Args:
        weight, scale, samples, fisher: as in `EWCOptions`. The released scale, where a task's importances sum to 1, is
            "mean1" with a weight as many times smaller as there are trained parameters.
        vector_samples: training samples of a task that its vectors are the mean of, at even distances in its file.
        encoder: folder of a BERT whose class token embeds instructions and answers; None for the sentence encoder.
        compound: keep the importances as a stage damped them, as released, so that damping adds up over the stages.
    """

    vector_samples: Count = 1000
    encoder: PathText | None = None
    compound: Flag = False


class EWCTIR(EWC):
    """The penalty weight / 2 * sum of G (theta - theta_start)^2, where similar tasks hold parameters less.

    A parameter's importance G is its largest Fisher information over the earlier tasks, times 1 - sim of that task and
    the stage's: see `similarity`. theta_start are the values that the stage starts from.

    Raises:
        ValueError: the encoder is no folder.
    """

    name = "ewc-tir"
    options_class = EWCTIROptions
    options: EWCTIROptions
    _vectors: list[tuple[Tensor, ...]]  # of each task so far and of the stage's, one of each kind
    _damped: Tensors  # importances as this stage uses them

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        own = self.options.encoder is not None
        folder = self.options.encoder if own else recipe.instructions.encoder
        if folder is not None and not Path(folder).is_dir():
            key = f"methods.{self.name}.encoder" if own else "instructions.encoder"
            raise ValueError(f"{key} must be the folder of an encoder, got {folder!r}")

    def before_stage(self, model: nn.Module, work: StageWork) -> None:
        """Find how similar the task is to each earlier one, and damp a copy of the importances."""
        found = work.once("task-vectors", lambda: self._find_vectors(model, work))
        self._vectors = [tuple(torch.tensor(found[kind], dtype=torch.float64) for kind in KINDS)]
        self._damped = {}
        if not work.kept:
            return
        importance, owner, vectors = self._read(work)
        self._vectors = [*vectors, *self._vectors]
        freed = 1 - similarity(self._vectors).float()
        self._damped = {name: value * freed[owner[name].long()] for name, value in importance.items()}
        start = {name: parameter.detach().float().clone() for name, parameter in trained(model).items()}
        self.pull_to(model, self._damped, start)

    def after_stage(self, model: nn.Module, work: StageWork, folder: Path) -> None:
        """Keep the largest importances so far, the tasks that they are of, and the tasks' vectors."""
        if work.stage.is_downstream:
            return
        fisher = self.fisher(model, work)
        if not work.process.is_main_process:
            return
        importance, owner = self._read(work)[:2] if work.kept else ({}, {})
        if self.options.compound:
            importance = self._damped
        number = len(self._vectors) - 1
        importance, owner = dict(importance), dict(owner)
        for name, new in fisher.items():
            old = importance.get(name, torch.full_like(new, -1.0))
            before = owner.get(name, torch.zeros(new.shape, dtype=torch.uint8))
            importance[name], owner[name] = torch.maximum(old, new), before.masked_fill(new > old, number)
        tensors = {f"importance.{name}": value for name, value in importance.items()}
        tensors |= {f"task.{name}": value for name, value in owner.items()}
        for kind, of_tasks in zip(KINDS, zip(*self._vectors, strict=True), strict=True):
            tensors[f"vectors.{kind}"] = torch.stack(of_tasks)
        write_tensors(folder / f"{self.name}.safetensors", tensors)

    def _read(self, work: StageWork) -> tuple[Tensors, Tensors, list[tuple[Tensor, ...]]]:
        """Importances, the tasks that they are of, and the vectors of the tasks, as the stage before left them."""
        tensors, _ = read_tensors(work.kept[-1] / f"{self.name}.safetensors")
        vectors = zip(*(tensors[f"vectors.{kind}"] for kind in KINDS), strict=True)
        return named(tensors, "importance"), named(tensors, "task"), list(vectors)

    def _find_vectors(self, model: Any, work: StageWork) -> dict[str, list[float]]:
        """The vectors of the stage's task, by kind."""
        (task,) = work.stage.train  # of a stage of one task after another
        chosen = strided(len(work), self.options.vector_samples)
        records = read_conversations(self.recipe.train_file(task))
        encode = text_encoder(self.recipe, self.options.encoder, work.process.device)
        texts = {"instruction": [records[i].text for i in chosen], "answer": [records[i].answer for i in chosen]}
        vectors = {"image": image_vector(model, work, chosen)}
        vectors |= {kind: text_vector(of_kind, encode) for kind, of_kind in texts.items()}
        return {kind: vector.tolist() for kind, vector in vectors.items()}
