"""BranchLoRA: one A, branches B of which the most used are frozen, and a router and keys for each task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import PeftConfig
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ...methods import BranchLoRAConfig
from ...methods.branchlora import BranchLoRAExperts
from ...recipe.schema import SECTION, Count, Flag, Natural, Number
from .adapter import Adapter, baseline_rank
from .stage import Stage, StageWork, in_eval_mode
from .tasked import NewKeys, alignment_loss, check_one_process


@dataclass(frozen=True, config=SECTION)
class BranchLoRAOptions:
    """Options of BranchLoRA. Where the paper leaves a point open, the default is the first choice listed.

    Args:
        branches: number of branches N; None: as many as the experts of moelora.
        top_k: branches that a sample uses, chosen by its router.
        router_input: what a router sees of a sample: its "first" token, the "mean" of its prompt, the "last" token of
            it, or the first "image" token.
        renormalize: make the weights of the chosen branches sum to 1.
        freeze: branches of each layer that are frozen after a task, those that it used most: true for `top_k` of them,
            false for none, or a number.
        freeze_pool: count the most used of "all" branches, frozen ones too, or of those that are still "tunable".
        freeze_A_after: number of tasks after which A is frozen; None: never.
        routers: a router for each "task", chosen by its keys, or one "shared" by all, without keys.
        keys: "closed", the normalised mean of a task's features, or "trained" by the alignment loss.
        alignment: weight (the paper's lambda) of the alignment loss, the mean over a batch's samples.
    """

    branches: Count | None = None
    top_k: Count = 2
    router_input: Literal["first", "mean", "last", "image"] = "first"
    renormalize: Flag = False
    freeze: Flag | Natural = True
    freeze_pool: Literal["all", "tunable"] = "all"
    freeze_A_after: Count | None = None
    routers: Literal["task", "shared"] = "task"
    keys: Literal["closed", "trained"] = "closed"
    alignment: Annotated[Number, Field(ge=0)] = field(default=1.0)


class BranchLoRA(Adapter):
    """One A, N branches B, and a router and keys for each task, which answer without a task id.

    A branch has 1/N of the baselines' rank, as in CoIN an expert of moelora has, and the same scaling.

    Raises:
        ValueError: the rank is no multiple of N; more branches than N are chosen or frozen; or an option has no effect.
    """

    name = "branchlora"
    options_class = BranchLoRAOptions
    options: BranchLoRAOptions

    def __init__(self, recipe: Any) -> None:
        super().__init__(recipe)
        self.has_tasks = self.options.routers == "task"
        self.takes_task_ids = self.has_tasks
        self.text = "question" if self.has_tasks else None
        options = self.options
        if options.routers == "shared":
            self.check_unused("where routers are 'shared', which have no keys", "keys", "alignment")
        if options.keys == "closed":
            self.check_unused("where keys are 'closed'", "alignment")
        if not self.frozen_each():
            self.check_unused("where no branch is frozen", "freeze_pool")
        rank, _ = baseline_rank(recipe)
        N = self.branches()
        if rank % N:
            raise ValueError(f"baseline.rank must be a multiple of the {N} branches of branchlora, got {rank}")
        for key, value in (("top_k", options.top_k), ("freeze", self.frozen_each())):
            if value > N:
                raise ValueError(f"methods.branchlora.{key} must be at most the {N} branches, got {value}")

    def branches(self) -> int:
        """Number of branches N."""
        config = self.recipe.adapter_config()
        return self.options.branches or self.recipe.baseline.experts or config.num_vu_experts + config.num_if_experts

    def frozen_each(self) -> int:
        """Number of branches that are frozen after a task."""
        if isinstance(self.options.freeze, bool):
            return self.options.top_k if self.options.freeze else 0
        return self.options.freeze

    def config(self, base: nn.Module) -> PeftConfig:
        rank, alpha = baseline_rank(self.recipe)
        N, options = self.branches(), self.options
        return BranchLoRAConfig(
            r=rank // N,
            lora_alpha=alpha / N,
            lora_dropout=self.recipe.adapter_config().lora_dropout,
            num_branches=N,
            top_k=options.top_k,
            num_tasks=self.recipe.num_task_ids if self.has_tasks else 1,
            instruction_dim=self.recipe.adapter_config().instruction_dim,
            keys=options.keys,
            router_input=options.router_input,
            renormalize=options.renormalize,
            freeze_pool=options.freeze_pool,
            target_modules=self.targets(base),
            exclude_modules=self.recipe.adapter.get("exclude_modules"),
        )

    def used_options(self) -> dict[str, Any]:
        return {**super().used_options(), "branches": self.branches(), "freeze": self.frozen_each()}

    @property
    def has_closed_keys(self) -> bool:
        """Whether tasks get their keys after their stage."""
        return self.has_tasks and self.options.keys == "closed"

    @property
    def passes_between_stages(self) -> bool:
        return self.frozen_each() > 0 or self.has_closed_keys

    # ---- hooks

    def before_stage(self, model: nn.Module, work: StageWork) -> None:
        """Refuse what cannot be trained.

        Raises:
            ValueError: several processes are to train keys.
        """
        if self.has_tasks and self.options.keys == "trained":
            check_one_process(self.name, work)

    def freeze(self, model: nn.Module, stage: Stage) -> None:
        after = self.options.freeze_A_after
        if after is not None and stage.number >= after:
            for experts in adapted(model):
                experts.A.requires_grad_(False)

    def loss_term(self, model: Any, batch: dict[str, Any], outputs: Any) -> Tensor | None:
        if not self.has_tasks or self.options.keys != "trained":
            return None
        return self.options.alignment * alignment_loss(model, batch)

    @torch.no_grad()
    def after_stage(self, model: Any, work: StageWork, folder: Path) -> None:
        """Give the stage's tasks their keys, and freeze the branches of each layer that they used most."""
        if not self.passes_between_stages:
            return
        layers, counts = list(adapted(model)), self.frozen_each() > 0
        keys = NewKeys(model.selector()) if self.has_closed_keys else None
        for experts in layers:
            experts.reset_usage()
        with in_eval_mode(model):
            for batch in work.batches():
                if keys is not None:
                    keys.add(batch["task_ids"], model.sample_features(**batch))
                if counts:
                    model(**batch)
        if keys is not None:
            keys.give(work)
        for experts in layers if counts else ():
            usage = work.total(experts.usage())
            frozen = most_used(usage, experts.frozen_branches, self.frozen_each(), self.options.freeze_pool)
            experts.freeze_branches(frozen)


def adapted(model: nn.Module) -> Iterator[BranchLoRAExperts]:
    """The adapter of each layer, in the model's order."""
    return (module for module in model.modules() if isinstance(module, BranchLoRAExperts))


def most_used(usage: Tensor, frozen: Tensor, count: int, pool: str) -> Tensor:
    """Choose the branches that were used most.

    Args:
        usage: int64 (N,), how often each was chosen. Branches that were never chosen are left out.
        frozen: bool (N,), those that are frozen already.
        count: how many to choose, or fewer where there are no more.
        pool: choose among "all", or among those that are still "tunable".

    Returns:
        bool (N,). Of branches that were used as often, the lower ones are chosen.
    """
    usage = usage.masked_fill(frozen, 0) if pool == "tunable" else usage
    order = usage.argsort(descending=True, stable=True)[:count]
    chosen = torch.zeros_like(frozen)
    chosen[order] = usage[order] > 0
    return chosen
