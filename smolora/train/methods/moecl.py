"""MoE-CL: a shared and a task's expert on whole feed-forward blocks, and a discriminator of tasks."""

from __future__ import annotations

from typing import Annotated, Any

from peft import PeftConfig
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ...methods import MoECLConfig
from ...recipe import Recipe
from ...recipe.schema import SECTION, Flag, Number, Text
from ...tuner.block import discriminator_loss
from ...tuner.model import TARGETS
from .adapter import baseline_rank
from .tasked import Tasked, TaskedOptions


@dataclass(frozen=True, config=SECTION)
class MoECLOptions(TaskedOptions):
    """Options of MoE-CL.

    Args:
        task: as in `TaskedOptions`.
        discriminator_weight: w, the weight of the discriminator's loss; 0 leaves the discriminator out.
        double_softmax: whether that loss takes the softmax of probabilities, as released, or of logits.
        target_modules: feed-forward blocks, as names or a regular expression; None for those of the language model.
    """

    discriminator_weight: Annotated[Number, Field(ge=0)] = 1.0
    double_softmax: Flag = True
    target_modules: list[Text] | Text | None = None


class MoECL(Tasked):
    """MoE-CL. The two experts that train in a stage split the baselines' rank, which makes as many numbers a layer.

    Layers outside of the language model's feed-forward blocks get no adapter, and the router and discriminator of each
    block come on top.
    """

    name = "moecl"
    default_targets = TARGETS["block"]
    options_class = MoECLOptions
    options: MoECLOptions

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        if not self.options.discriminator_weight:
            self.check_unused("where discriminator_weight is 0", "double_softmax")

    def config(self, base: nn.Module) -> PeftConfig:
        rank, alpha = baseline_rank(self.recipe)
        if rank % 2:
            raise ValueError(
                f"baseline.rank must be even for moecl, whose two experts in training split it, got {rank}"
            )
        return MoECLConfig(
            r=rank // 2,
            lora_alpha=alpha / 2,
            lora_dropout=self.recipe.adapter_config().lora_dropout,
            num_tasks=self.recipe.num_task_ids,
            instruction_dim=self.recipe.adapter_config().instruction_dim,
            discriminator_weight=self.options.discriminator_weight,
            double_softmax=self.options.double_softmax,
            target_modules=self.targets(base),
            exclude_modules=self.recipe.adapter.get("exclude_modules"),
        )

    def loss_term(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor | None:
        """The discriminators' loss; see `MoECLExperts.discriminator_loss` for who lowers and who raises it."""
        return discriminator_loss(model) if self.options.discriminator_weight else None
