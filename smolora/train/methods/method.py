"""A method is an adapter and a schedule; `METHODS` names the usual pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from ...recipe import Recipe, TaskRecipe
from ...recipe.messages import not_one_of, shortened
from .adapter import Adapter, NoAdapter
from .branchlora import BranchLoRA
from .clora import CLoRA
from .dmole import DMoLE
from .dora import DoRA
from .eproj import Eproj
from .ewc import EWC
from .ewc_tir import EWCTIR
from .hooks import Hooks
from .lilora import LiLoRA
from .lora import LoRA
from .moecl import MoECL
from .moelora import MoELoRA
from .replay import Replay
from .routed import Routed, SMoLoRAPrototype, SMoLoRARidge
from .schedules import Joint, NoTraining, OnePerTask, Sequential
from .smolora import SMoLoRA, SMoLoRAInstruction, SMoLoRAMean, SMoLoRAVisual
from .stage import Stage, StageWork

ADAPTERS: dict[str, type[Adapter]] = {
    adapter.name: adapter
    for adapter in (
        NoAdapter,
        LoRA,
        DoRA,
        CLoRA,
        SMoLoRA,
        SMoLoRAVisual,
        SMoLoRAInstruction,
        SMoLoRAMean,
        SMoLoRARidge,
        SMoLoRAPrototype,
        Routed,
        MoELoRA,
        BranchLoRA,
        DMoLE,
        LiLoRA,
        MoECL,
        Eproj,
    )
}
COURSES: dict[str, type[Sequential]] = {
    "sequential": Sequential,
    "one-per-task": OnePerTask,
    "joint": Joint,
    "none": NoTraining,
}
ADD_ONS: dict[str, type[Hooks]] = {
    "replay": Replay,
    "ewc": EWC,
    "ewc-tir": EWCTIR,
}


class Parts(NamedTuple):
    """An adapter and a schedule: at most one course, by default "sequential", and add-ons."""

    adapter: str
    schedule: Sequence[str] = ()


METHODS: dict[str, Parts] = {
    "zeroshot": Parts("none", ["none"]),
    "seqlora": Parts("lora"),
    "dirlora": Parts("lora", ["one-per-task"]),
    "multitask": Parts("lora", ["joint"]),
    "dora": Parts("dora"),
    "clora": Parts("clora"),
    "replay": Parts("lora", ["replay"]),
    "ewc": Parts("lora", ["ewc"]),
    "ewc-tir": Parts("lora", ["ewc-tir"]),
    "moelora": Parts("moelora"),
    "branchlora": Parts("branchlora"),
    "dmole": Parts("dmole"),
    "lilora": Parts("lilora"),
    "moecl": Parts("moecl"),
    "eproj": Parts("eproj"),
    "smolora": Parts("smolora"),
    "smolora-vu": Parts("smolora-vu"),
    "smolora-if": Parts("smolora-if"),
    "smolora-mean": Parts("smolora-mean"),
    "smolora-ridge": Parts("smolora-ridge"),
    "smolora-prototype": Parts("smolora-prototype"),
    "routed": Parts("routed"),
}


class Method:
    """The method of a run, made of an adapter, the course of its stages, and add-ons.

    Args:
        recipe: the recipe. Its `method` is a name of `METHODS`, or an adapter and a schedule.

    Attributes:
        adapter: what is put into the model.
        course: its stages.
        course_name: the course's name in `COURSES`.
        hooks: the adapter and the add-ons, whose hooks are called in this order.

    Raises:
        ValueError: a name is unknown (the message has the nearest one), or the parts do not fit together.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.name = recipe.method_name
        parts = _parts(recipe)
        if parts.adapter not in ADAPTERS:
            raise ValueError(not_one_of("method.adapter", parts.adapter, ADAPTERS))
        for name in parts.schedule:
            if name not in {**COURSES, **ADD_ONS}:
                raise ValueError(not_one_of("method.schedule", name, [*COURSES, *ADD_ONS]))
        courses = [name for name in parts.schedule if name in COURSES]
        add_ons = [name for name in parts.schedule if name in ADD_ONS]
        if len(courses) > 1 or len(set(add_ons)) < len(add_ons):
            raise ValueError(
                f"method.schedule must have at most one of {', '.join(COURSES)}, and no name twice, got "
                f"{list(parts.schedule)}"
            )
        self.course_name = course = courses[0] if courses else "sequential"
        if (parts.adapter == "none") != (course == "none"):
            raise ValueError(
                "method: the schedule 'none' goes with the adapter 'none' and no other, got adapter "
                f"{parts.adapter!r} and schedule {course!r}"
            )
        kinds: dict[str, type[Hooks]] = {f"adapter {parts.adapter!r}": ADAPTERS[parts.adapter]}
        kinds |= {f"add-on {name!r}": ADD_ONS[name] for name in add_ons}
        for part, kind in kinds.items():
            if kind.only_sequential and course != "sequential":
                raise ValueError(
                    f"method.schedule must be 'sequential' for the {part}, which is made for one task after another, "
                    f"got {course!r}"
                )
        if {"ewc", "ewc-tir"} <= set(add_ons):
            raise ValueError(
                "method.schedule must have one of 'ewc' and 'ewc-tir', which pull the same parameters, got "
                f"{list(parts.schedule)}"
            )
        for name in add_ons:
            if name in ADAPTERS[parts.adapter].refused_add_ons:
                raise ValueError(
                    f"method.schedule must not have {name!r} for the adapter {parts.adapter!r}: "
                    f"{ADAPTERS[parts.adapter].refused_add_ons[name]}"
                )
        for name in recipe.methods:
            if name not in {**ADAPTERS, **ADD_ONS}:
                raise ValueError(not_one_of("methods", name, [*ADAPTERS, *ADD_ONS]))
        self.adapter = ADAPTERS[parts.adapter](recipe)
        self.hooks: list[Hooks] = [self.adapter, *(ADD_ONS[name](recipe) for name in add_ons)]
        for name in ("deepspeed", "fsdp"):
            sharded = recipe.training.arguments.get(name)
            for part, hooks in zip(kinds, self.hooks, strict=True):
                if sharded and (hooks.passes_between_stages or hooks.has("step_term")):
                    why = (
                        "whose passes over the data between stages are not made for sharded parameters"
                        if hooks.passes_between_stages
                        else "which adds to whole gradients once a step"
                    )
                    raise ValueError(
                        f"training.arguments.{name} must be left out for the {part}, {why}, got {shortened(sharded)}"
                    )
        self.course = COURSES[course](recipe)

    @property
    def task_source(self) -> Literal["given", "selector"] | None:
        """Who says at test which task a question is of; an adapter for each task is told."""
        return "given" if self.course_name == "one-per-task" else self.adapter.task_source

    @property
    def adds_to_gradients(self) -> bool:
        """Whether a hook adds to the gradients once a step."""
        return any(hooks.has("step_term") for hooks in self.hooks)

    @property
    def half_extra(self) -> bool:
        """Whether half of each step's samples are those of `extra_samples`."""
        return any(hooks.half_extra for hooks in self.hooks)

    def settings(self) -> dict[str, Any]:
        """Sections of the recipe as the parts use them, for the results."""
        sections: dict[str, Any] = {}
        for hooks in self.hooks:
            for name, section in hooks.settings().items():
                sections[name] = {**sections.get(name, {}), **section}
        return sections

    def memory(self, model: nn.Module) -> int:
        """The sum of each `memory`."""
        return sum(hooks.memory(model) for hooks in self.hooks)

    def freeze(self, model: nn.Module, stage: Stage) -> None:
        """Freeze what a stage does not train."""
        for hooks in self.hooks:
            hooks.freeze(model, stage)

    def before_stage(self, model: nn.Module, work: StageWork) -> None:
        """Call each `before_stage`."""
        for hooks in self.hooks:
            hooks.before_stage(model, work)

    def extra_samples(self, stage: Stage, kept: tuple[Path, ...]) -> list[tuple[TaskRecipe, int]]:
        """The samples of each `extra_samples`."""
        return [sample for hooks in self.hooks for sample in hooks.extra_samples(stage, kept)]

    def num_extra_samples(self, stage: Stage, sizes: Mapping[str, int]) -> int:
        """The sum of each `num_extra_samples`."""
        return sum(hooks.num_extra_samples(stage, sizes) for hooks in self.hooks)

    def batch_inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The arguments of each `batch_inputs`."""
        return {name: value for hooks in self.hooks for name, value in hooks.batch_inputs(batch).items()}

    def loss_term(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor | None:
        """The sum of each `loss_term`; None if there is none."""
        terms = [hooks.loss_term(model, batch, outputs) for hooks in self.hooks]
        given = [term for term in terms if term is not None]
        return sum(given[1:], given[0]) if given else None

    def step_term(self, model: nn.Module, scale: float) -> None:
        """Call each `step_term`."""
        for hooks in self.hooks:
            hooks.step_term(model, scale)

    def figures(self) -> dict[str, float]:
        """The numbers of each `figures`."""
        return {name: value for hooks in self.hooks for name, value in hooks.figures().items()}

    def after_stage(self, model: nn.Module, work: StageWork, folder: Path) -> None:
        """Call each `after_stage`."""
        for hooks in self.hooks:
            hooks.after_stage(model, work, folder)


def _parts(recipe: Recipe) -> Parts:
    """The parts of a recipe's method."""
    chosen = recipe.method
    if isinstance(chosen, str):
        if chosen not in METHODS:
            raise ValueError(not_one_of("method", chosen, METHODS))
        return METHODS[chosen]
    return Parts(chosen.adapter, chosen.schedule)
