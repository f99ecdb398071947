"""LiLoRA (arXiv:2508.06202): one A and one B for all tasks, and a low-rank pair for each task within B."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..arguments import check_int
from ..config import TaskConfig
from ..spec import Bank, Slots
from .base import DropIn, Mixture, MixtureExperts, Prepared
from .checks import check_task, reads_values
from .selector import TaskSelector


@dataclass
class LiLoRAConfig(TaskConfig, method="lilora"):
    """Configuration of LiLoRA.

    Args:
        task_r: rank of a task's pair.
        num_tasks: number of tasks.
        instruction_dim, image_dim, keys: of the `TaskSelector`, as in `TaskConfig`.
        r, lora_alpha, lora_dropout, target_modules, exclude_modules, modules_to_save: as in `MixtureConfig`.
    """

    takes: ClassVar[tuple[str, ...]] = ("task",)

    task_r: int = field(default=8, metadata={"help": "rank of a task's pair"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("task_r", self.task_r)


class LiLoRAExperts(MixtureExperts):
    """One LiLoRA adapter on one linear layer: y = W x + b + s B' A x with B' = a B + (1 - a) task_B task_A.

    a = sigmoid(task_logit). A forward forms B' once for each task in the batch.

    Parameters:
        A (r, d) Kaiming, B (k, r) = 0, task_A (tasks, task_r, r) Kaiming, task_B (tasks, k, task_r) = 0,
        task_logit (tasks,) ~ N(0, 1). The pairs of tasks that are not in the batch keep their values under any
        optimiser.
    """

    config: LiLoRAConfig
    config_class = LiLoRAConfig
    A: Tensor
    B: Tensor
    task_A: Tensor
    task_B: Tensor
    task_logit: Tensor
    sliced = ("task_A", "task_B", "task_logit")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        c, d, k = self.config, self.in_features, self.out_features
        return {
            "A": (c.r, d),
            "B": (k, c.r),
            "task_A": (c.num_tasks, c.task_r, c.r),
            "task_B": (c.num_tasks, k, c.task_r),
            "task_logit": (c.num_tasks,),
        }

    def reset_parameter(self, name: str, parameter: Tensor) -> None:
        if name == "task_logit":
            nn.init.normal_(parameter)
        elif name.endswith("A"):  # Kaiming with a = sqrt(5), as in nn.Linear and LoRA
            bound = parameter.shape[-1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound)
        else:
            nn.init.zeros_(parameter)

    def prepare(
        self,
        x: Tensor,
        task: int | Tensor,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Prepared:
        """Check a call and translate it for the engine.

        Args:
            x: (B, S, d), or packed (T, d) or (1, T, d) with `cu_seqlens`.
            task: an int for all n sequences, or int (n,).
            cu_seqlens: int32 (n + 1,), boundaries of packed sequences.

        Raises:
            TypeError, ValueError: see `MixtureExperts.prepare`.
        """
        batch = self.batch(x, cu_seqlens)
        task = check_task(task, batch.tokens.num_seqs, self.config.num_tasks, self.A.device)
        if isinstance(task, int):
            return Prepared(batch, [Bank(self.A[None], self.up(task)[None])], {})
        present = torch.arange(self.config.num_tasks, device=task.device)
        ids = task
        if reads_values(task):
            present, ids = torch.unique(task, return_inverse=True)
        up = self.up(present)
        return Prepared(batch, [Bank(self.A[None], up)], {"slots": Slots(ids.int().view(-1, 1, 1))})

    def up(self, task: int | Tensor) -> Tensor:
        """Return the up projection B' of a task (k, r), or of several (tasks, k, r)."""
        if isinstance(task, int):
            share = torch.sigmoid(self.task_logit[task])
            return share * self.B + (1 - share) * (self.task_B[task] @ self.task_A[task])
        share = torch.sigmoid(self.task_logit.index_select(0, task))[:, None, None]
        pair = torch.bmm(self.task_B.index_select(0, task), self.task_A.index_select(0, task))
        return share * self.B + (1 - share) * pair

    def regulariser(self, task: int, previous: int, previous_B: Tensor) -> Tensor:
        """Return the paper's L_reg = (1 - cos(P_t, P_t-1)) |B_t - B_t-1|_F^2 with P = task_B task_A, of two tasks.

        A task whose pair is unlike that of the task before is to leave B where it was. Where P_t is zero, as it starts,
        the cosine counts as 0. P_t-1 and B_t-1 get no gradient.

        Args:
            task, previous: t and t - 1.
            previous_B: (k, r), B as the task before left it.
        """
        A, B = self.task_A[task], self.task_B[task]
        before_A, before_B = self.task_A[previous].detach(), self.task_B[previous].detach()
        inner = _inner(A, B, before_A, before_B)
        for norm in (_inner(A, B, A, B), _inner(before_A, before_B, before_A, before_B)):  # squared
            is_zero = norm <= 0
            inner = torch.where(is_zero, 0, inner * torch.rsqrt(torch.where(is_zero, 1, norm)))
        return (1 - inner) * (self.B - previous_B).square().sum()

    def trained_slices(self) -> dict[str, int]:
        """Return one slice of each, since tasks train one at a time."""
        return dict.fromkeys(self.sliced, 1)

    def facts(self) -> dict[str, Any]:
        return {"task_r": self.config.task_r, "tasks": self.config.num_tasks}


def _inner(A: Tensor, B: Tensor, other_A: Tensor, other_B: Tensor) -> Tensor:
    """Return the inner product of B A and other_B other_A (k, r), without forming these."""
    return ((B.mT @ other_B) * (A @ other_A.mT)).sum()


class FusedLiLoRA(DropIn, LiLoRAExperts):
    """A linear layer with a LiLoRA adapter, a drop-in for the `nn.Linear` it wraps."""


LILORA = Mixture(
    "lilora",
    LiLoRAConfig,
    LiLoRAExperts,
    FusedLiLoRA,
    "LiLoRA cannot be merged into the base: its up projection depends on the task",
    selector=TaskSelector.of_adapter,
)
