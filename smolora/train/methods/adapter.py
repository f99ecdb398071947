"""What a method puts into the model: the interface of adapters, and the base model without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import TypeAdapter, ValidationError
from torch import nn

from ...backbones.families import no_default
from ...config import SMoLoRAConfig
from ...recipe import Recipe, TaskRecipe
from ...recipe.messages import invalid_section
from ...recipe.schema import ADAPTER_KEYS
from ...tuner.model import TARGETS
from ..projector import projector_family, train_projector_in_full
from .hooks import Hooks

Options = TypeVar("Options")

# of an adapter that trains other parameters in each stage: the add-ons that mean nothing with it, and why
NEW_PARAMETERS = dict.fromkeys(("ewc", "ewc-tir"), "each stage trains parameters of its own, so none drifts")


class Adapter(Hooks):
    """What a method puts into the model.

    Its `options` are its section of the recipe, `methods.<name>`.

    Args:
        recipe: the recipe of the run.

    Raises:
        ValueError: a key of its section is unknown, or a value does not fit; or `adapter.target_modules` is given to an
            adapter that has the option `target_modules`, and the option is not.
    """

    name: ClassVar[str]
    text: Literal["instruction", "question"] | None = None  # what `instruction_embeds` of a sample embeds
    takes_task_ids: bool = False
    undecayed: ClassVar[tuple[str, ...]] = ()  # parts of the names of parameters that get no weight decay
    refused_add_ons: ClassVar[Mapping[str, str]] = {}  # names of add-ons that mean nothing with it, each with why
    default_targets: ClassVar[Mapping[str, str]] = TARGETS["linear"]  # modules that get adapters, by type of the model
    options_class: ClassVar[type] = dict
    options: Any

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.options = read_options(recipe, self.name, self.options_class)
        chosen = recipe.adapter.get("target_modules")
        if self._has_own_targets and self.options.target_modules is None and chosen is not None:
            raise ValueError(
                f"methods.{self.name}.target_modules must be given where adapter.target_modules is, which {self.name} "
                f"does not use: set it to {self.default_targets['llava']!r} or other modules, got "
                f"adapter.target_modules {chosen!r}"
            )

    def check_unused(self, why: str, *keys: str) -> None:
        """Check that options without an effect are left at their defaults.

        Args:
            why: when they have none, such as "where keys are 'closed'".
            keys: their names.

        Raises:
            ValueError: one has another value.
        """
        defaults = self.options_class()
        for key in keys:
            value = getattr(self.options, key)
            if value != getattr(defaults, key):
                raise ValueError(f"methods.{self.name}.{key} has no effect {why}: leave it out, got {value!r}")

    def config(self, base: nn.Module) -> PeftConfig | None:
        """The configuration of a new adapter; None for a method without adapters."""
        raise NotImplementedError  # there is no default

    def start(self, base: nn.Module, previous: Path | None) -> nn.Module:
        """The model that a stage trains.

        Args:
            base: the base model, on its device.
            previous: folder of the adapter to start from; None for a new one.

        Raises:
            ValueError: the method trains nothing, or the recipe needs a projector that is not known.
        """
        in_full = self.recipe.training.full_projector
        if self.recipe.training.projector_learning_rate is not None:
            projector_family(base, "training.projector_learning_rate")
        if previous is not None:
            if in_full:
                train_projector_in_full(base, None)
            return PeftModel.from_pretrained(base, previous, is_trainable=True)
        config = self.config(base)
        if config is None:
            raise ValueError(f"the adapter {self.name} trains nothing")
        if in_full:
            train_projector_in_full(base, config)
        return get_peft_model(base, config)

    def load(self, base: nn.Module, folder: Path | None) -> nn.Module:
        """The model that is evaluated after a stage."""
        return base if folder is None else PeftModel.from_pretrained(base, folder)

    def answers_as(self, task: TaskRecipe) -> int | None:
        """The task id that a test set's questions are answered with; None where the model is given none."""
        return None

    @property
    def task_source(self) -> Literal["given", "selector"] | None:
        """Who says at test which task a question is of: the caller, a selector, or nobody."""
        if not self.takes_task_ids:
            return None
        return "selector" if self.answers_as(self.recipe.tasks[0]) is None else "given"

    @property
    def has_task_slots(self) -> bool:
        """Whether the number of tasks, `recipe.num_task_ids`, decides the shapes of its parameters."""
        return self.takes_task_ids

    @property
    def _has_own_targets(self) -> bool:
        """Whether `target_modules` is one of its options."""
        return hasattr(self.options, "target_modules")

    def targets(self, base: nn.Module) -> Any:
        """The modules that get adapters: its option `target_modules`, or else those of all methods."""
        own = self._has_own_targets
        chosen = self.options.target_modules if own else self.recipe.adapter.get("target_modules")
        config: Any = base.config
        kind = config.model_type
        if chosen is None and kind not in self.default_targets:
            section = f"methods.{self.name}" if own else "adapter"
            raise ValueError(no_default(f"{section}.target_modules", kind, self.default_targets))
        return chosen or self.default_targets[kind]

    def used_options(self) -> dict[str, Any]:
        """Its options as it uses them, empty if it has none."""
        return dataclasses.asdict(self.options) if dataclasses.is_dataclass(self.options_class) else {}

    def settings(self) -> dict[str, Any]:
        """Sections of the recipe as this adapter uses them, for the results."""
        rank, alpha = baseline_rank(self.recipe)
        options = self.used_options()
        methods = {"methods": {self.name: options}} if options else {}
        return {"adapter": {}, "baseline": {"rank": rank, "alpha": alpha}, **methods}


class NoAdapter(Adapter):
    """The base model without adapters."""

    name = "none"

    def config(self, base: nn.Module) -> PeftConfig | None:
        return None

    def settings(self) -> dict[str, Any]:
        return {"adapter": {}, "baseline": {}}


def adapter_section(config: SMoLoRAConfig) -> dict[str, Any]:
    """Return the section `adapter` of a recipe that gives a configuration."""
    values = {key: getattr(config, key) for key in ADAPTER_KEYS}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}


def baseline_rank(recipe: Recipe) -> tuple[int, float]:
    """Rank and alpha of a baseline's LoRA.

    By default the rank is r (M + N), as many trainable parameters as SMoLoRA's experts have, and alpha gives the same
    scaling.
    """
    config = recipe.adapter_config()
    rank = recipe.baseline.rank or config.r * (config.num_vu_experts + config.num_if_experts)
    return rank, recipe.baseline.alpha or config.scaling * rank


def read_options(recipe: Recipe, name: str, kind: type[Options]) -> Options:
    """Read `methods.<name>` of a recipe.

    Args:
        recipe: the recipe.
        name: of the adapter or schedule.
        kind: a pydantic dataclass of its keys.

    Raises:
        ValueError: a key is unknown, or a value does not fit. The message names the key.
    """
    section = recipe.methods.get(name) or {}
    if kind is dict and section:
        raise ValueError(f"methods.{name} must be left out: {name} has no options, got {section}")
    try:
        return TypeAdapter(kind).validate_python(section)
    except ValidationError as error:
        raise ValueError(invalid_section(error, kind, f"methods.{name}")) from error
