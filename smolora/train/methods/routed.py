"""SMoLoRA with computed routers, and a LoRA for each task that such a router finds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from peft import PeftConfig
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from ...config import MAX_RANK
from ...io.files import write_json
from ...methods.routers import ExpertRouters
from ...methods.smolora import BRANCHES
from ...recipe import Recipe
from ...recipe.schema import SECTION, Count, Number, Positive
from ...tuner import fit_routers
from .adapter import NEW_PARAMETERS, Adapter, adapter_section, baseline_rank
from .stage import StageWork

RANKS_AT_ONCE = 4  # float32 numbers of B that a kernel loads at once, where the rank is a multiple of it


@dataclass(frozen=True, config=SECTION)
class RouterOptions:
    """Options of an adapter with computed routers, which `SMoLoRAConfig` explains.

    Args:
        r: rank of an expert; None for the largest with which a stage trains no more than SMoLoRA, see
            `task_expert_rank`.
        lora_alpha: its alpha; None for the one that gives the recipe's scaling, lora_alpha / r.
        features: what the VU router sees, `router_features`.
        ridge: strength of ridge regression, `router_ridge`.
        vu_share, if_share: cosines from which tasks share an expert.
        shared_experts: whether a task trains the experts of other tasks.
        max_experts: most experts of a branch; None: one more for each task that shares none.
        unseen, unseen_below: what a sample does that is far from all tasks.
        importance: importance vectors of each "expert", or "shared" by those of a branch.
    """

    r: Annotated[Count, Field(le=MAX_RANK)] | None = None
    lora_alpha: Positive | None = None
    features: Literal["layer", "vision", "vision+instruction", "hidden"] = "hidden"
    ridge: Positive = 1e-3
    vu_share: Number | None = None
    if_share: Number | None = 0.99
    shared_experts: Literal["freeze", "train"] = "freeze"
    max_experts: Count | None = None
    unseen: Literal["nearest", "mix", "none"] = "nearest"
    unseen_below: Number = 0.5
    importance: Literal["expert", "shared"] = "expert"


def task_expert_rank(recipe: Recipe) -> int:
    """Return the rank of experts of which a stage trains one in each branch, at SMoLoRA's cost.

    SMoLoRA trains all experts of the recipe in each stage, r (M + N) (d + k) numbers in a layer of d inputs and k
    outputs. Here it is the largest rank R with which 2 R (d + k) and the importance vectors, 2 k, are no more than
    that, whatever d and k are; rounded down to a multiple of 4, which kernels read best, and at most 128.
    """
    config = recipe.adapter_config()
    branches = BRANCHES[config.fusion]
    experts = sum((config.num_vu_experts, config.num_if_experts)[branch] for branch in branches)
    largest = config.r * experts // len(branches) - (config.fusion == "adaptive")  # k / (d + k) is below 1
    rounded = largest // RANKS_AT_ONCE * RANKS_AT_ONCE
    return min(rounded or max(largest, 1), MAX_RANK)


class SMoLoRARidge(Adapter):
    """SMoLoRA whose experts are those of tasks, found by ridge regression on features of the frozen base.

    Before a stage is trained, its samples are added to the routers' sums, and its task gets its experts. Answers are
    given without a task id.
    """

    name = "smolora-ridge"
    kind: ClassVar[str] = "ridge"
    text = "instruction"
    takes_task_ids = True
    only_sequential = True
    refused_add_ons: ClassVar = NEW_PARAMETERS
    options_class: ClassVar[type] = RouterOptions
    options: RouterOptions

    def changes(self) -> dict[str, Any]:
        """How the adapter's configuration differs from the recipe's."""
        o = self.options
        rank, alpha = self.rank()
        return {
            "r": rank,
            "lora_alpha": alpha,
            "vu_router_kind": self.kind,
            "if_router_kind": self.kind,
            "num_vu_experts": 1,
            "num_if_experts": 1,
            "experts": "grow",
            "router_features": o.features,
            "router_ridge": o.ridge,
            **{
                name: getattr(o, name)
                for name in (
                    "vu_share",
                    "if_share",
                    "shared_experts",
                    "max_experts",
                    "unseen",
                    "unseen_below",
                    "importance",
                )
            },
        }

    def rank(self) -> tuple[int, float]:
        """Rank and alpha of an expert."""
        rank = self.options.r or task_expert_rank(self.recipe)
        return rank, self.options.lora_alpha or self.recipe.adapter_config().scaling * rank

    def config(self, base: nn.Module) -> PeftConfig:
        return self.recipe.adapter_config(target_modules=self.targets(base), **self.changes())

    def used_options(self) -> dict[str, Any]:
        rank, alpha = self.rank()
        return {**super().used_options(), "r": rank, "lora_alpha": alpha}

    def settings(self) -> dict[str, Any]:
        adapter = adapter_section(self.recipe.adapter_config(**self.changes()))
        return {"adapter": adapter, "baseline": {}, "methods": {self.name: self.used_options()}}

    @property
    def has_task_slots(self) -> bool:
        return False  # adapters grow

    @property
    def passes_between_stages(self) -> bool:
        return True

    def before_stage(self, model: nn.Module, work: StageWork) -> None:
        """Compute the routers with the stage's samples, and give its task its experts."""
        (task,) = work.stage.train
        number = self.recipe.task_id(task)
        assert number is not None  # it is trained
        fit_routers(model, work.batches(), number)

    def after_stage(self, model: Any, work: StageWork, folder: Path) -> None:
        """Write which experts each task has, and how alike the tasks are."""
        routers = model.base_model.selector()
        assert isinstance(routers, ExpertRouters)  # of this configuration
        if work.process.is_main_process:
            write_json(folder / "routers.json", routers.table())


class SMoLoRAPrototype(SMoLoRARidge):
    """As `SMoLoRARidge`, by the cosine to the means of tasks."""

    name = "smolora-prototype"
    kind = "prototype"


@dataclass(frozen=True, config=SECTION)
class RoutedOptions:
    """Options of a LoRA for each task, found by a computed router; see `RouterOptions`.

    Args:
        router: "ridge" or "prototype".
        features, ridge, unseen, unseen_below: as there.
    """

    router: Literal["ridge", "prototype"] = "ridge"
    features: Literal["layer", "vision", "vision+instruction", "hidden"] = "hidden"
    ridge: Positive = 1e-3
    unseen: Literal["nearest", "mix", "none"] = "nearest"
    unseen_below: Number = 0.5


class Routed(SMoLoRARidge):
    """A LoRA for each task, as `dirlora` has, with the rank of the baselines. A computed router finds the task."""

    name = "routed"
    options_class = RoutedOptions
    options: RoutedOptions  # type: ignore[assignment]

    def rank(self) -> tuple[int, float]:
        return baseline_rank(self.recipe)

    def used_options(self) -> dict[str, Any]:
        return Adapter.used_options(self)  # its rank is no option

    def changes(self) -> dict[str, Any]:
        o = self.options
        rank, alpha = self.rank()
        return {
            "fusion": "vu",
            "r": rank,
            "lora_alpha": alpha,
            "vu_router_kind": o.router,
            "num_vu_experts": 1,
            "num_if_experts": 1,
            "experts": "grow",
            "router_features": o.features,
            "router_ridge": o.ridge,
            "unseen": o.unseen,
            "unseen_below": o.unseen_below,
        }
