"""Eproj (arXiv:2311.16206): a projector for each task, chosen by keys; nothing else trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import PeftConfig
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ...methods import EprojConfig
from ...methods.eproj import EprojExperts
from ...recipe import Recipe
from ...recipe.schema import SECTION, Natural, Number, Positive, Text
from ...tuner.model import TARGETS
from .stage import Stage, StageWork, in_eval_mode
from .tasked import Tasked, TaskedOptions, alignment_loss, check_one_process


@dataclass(frozen=True, config=SECTION)
class EprojOptions(TaskedOptions):
    """Options of Eproj.

    Args:
        task: as in `TaskedOptions`.
        keys: "closed", the normalised mean of a task's features, which minimises the paper's pull loss; or "trained"
            by that loss, as released.
        key_steps: steps that train a task's keys alone, before its projector; of trained keys.
        key_learning_rate: learning rate of these steps.
        pull: weight of the pull loss, the mean over a batch's samples, while the projector trains; of trained keys.
        target_modules: projectors, as names or a regular expression; None for the model's.
    """

    keys: Literal["closed", "trained"] = "closed"
    key_steps: Natural = 2000
    key_learning_rate: Positive = 5e-3
    pull: Annotated[Number, Field(ge=0)] = 0.1
    target_modules: list[Text] | Text | None = None


class Eproj(Tasked):
    """A projector for each task, which starts as a copy of the base's, and keys that find the task.

    A stage trains its task's projector alone, so that only a wrong choice forgets.

    Raises:
        ValueError: as for `Tasked`; the recipe trains the projector in full, or keys that are not used; or an option
            has no effect.
    """

    name = "eproj"
    only_sequential = True
    refused_add_ons = dict.fromkeys(
        ("replay", "ewc", "ewc-tir"),
        "a stage trains a projector that no earlier task uses, and those of earlier tasks are frozen",
    )
    default_targets = TARGETS["projector"]
    options_class = EprojOptions
    options: EprojOptions

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        if recipe.training.full_projector:
            raise ValueError(
                "training.full_projector must be false for eproj, which trains a projector for each task, got true"
            )
        if self.is_told and self.options.keys == "trained":
            raise ValueError(
                "methods.eproj.keys must be 'closed' where task is 'oracle', which uses none, got 'trained'"
            )
        if self.options.keys == "closed":
            self.check_unused("where keys are 'closed'", "key_steps", "key_learning_rate", "pull")

    def config(self, base: nn.Module) -> PeftConfig:
        return EprojConfig(
            num_tasks=self.recipe.num_task_ids,
            instruction_dim=self.recipe.adapter_config().instruction_dim,
            keys=self.options.keys,
            target_modules=self.targets(base),
            exclude_modules=self.recipe.adapter.get("exclude_modules"),
        )

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "baseline": {}}

    def freeze(self, model: nn.Module, stage: Stage) -> None:
        """Freeze the projectors of other tasks."""
        own = {self.recipe.task_id(task) for task in stage.train}
        for experts in (module for module in model.modules() if isinstance(module, EprojExperts)):
            for task, projector in enumerate(experts.projectors):
                projector.requires_grad_(task in own)

    def before_stage(self, model: Any, work: StageWork) -> None:
        """Train the keys of the stage's task alone. A stage that goes on from a checkpoint has them there.

        Raises:
            ValueError: there are several processes.
        """
        if self.options.keys != "trained":
            return
        check_one_process(self.name, work)
        if not work.goes_on:
            self._train_keys(model, work)

    def _train_keys(self, model: Any, work: StageWork) -> None:
        """Take steps on the pull loss, each with as many samples as a step of the stage."""
        options, parts = self.options, []
        with in_eval_mode(model):
            for batch in work.batches():
                image, text = model.sample_features(**batch)
                parts.append((batch["task_ids"], torch.zeros(0) if image is None else image, text))
        dim = max(image.shape[-1] for _, image, _ in parts)
        tasks = torch.cat([task for task, _, _ in parts])
        images = torch.cat([image if len(image) else text.new_zeros(len(text), dim) for _, image, text in parts])
        texts = torch.cat([text for _, _, text in parts])
        selector, draw = model.selector(), torch.Generator().manual_seed(self.recipe.seed)
        optimizer = torch.optim.Adam(selector.parameters(), options.key_learning_rate)
        size = self.recipe.of_stage(work.stage.train).training.batch_size
        for _ in range(options.key_steps):
            rows = torch.randint(len(tasks), (size,), generator=draw).to(tasks.device)
            optimizer.zero_grad()
            (selector(tasks[rows], images[rows], texts[rows]) / size).backward()
            optimizer.step()
        optimizer.zero_grad()

    def loss_term(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor | None:
        if self.options.keys != "trained":
            return None
        return self.options.pull * alignment_loss(model, batch)

    def after_stage(self, model: Any, work: StageWork, folder: Path) -> None:
        """Give the stage's task its keys in closed form."""
        if self.options.keys == "closed":
            super().after_stage(model, work, folder)
