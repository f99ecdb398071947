"""BranchLoRA (Zhang et al., ACL 2025): one A and several branches B, chosen by a router for each task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..arguments import check_choice, check_int
from ..config import TaskConfig
from ..routing import TopK
from ..spec import Bank, Mixed, Router, Slots, Tokens, accurate_dtype
from .base import Decision, DropIn, Mixture, MixtureExperts, Prepared, is_recomputed
from .checks import check_ids, check_task, check_tensor
from .routedlora import SlotRouting
from .selector import TaskSelector
from .slices import FreezesExperts

CHOICES = {
    "router_input": ("first", "mean", "last", "image"),
    "freeze_pool": ("all", "tunable"),
    "route_over": ("prompt", "valid", "all"),
    "decode_routing": ("prompt", "token"),
}


@dataclass
class BranchLoRAConfig(TaskConfig, method="branchlora"):
    """Configuration of BranchLoRA. Where the paper leaves a point open, the first choice listed is the default.

    Args:
        num_branches: number of branches B (the paper's N).
        top_k: branches that a sequence uses.
        router_input: what the router sees of a sequence: its "first" routed token, the "mean" of them, the "last", or,
            in a whole model, the first "image" token (the first routed one of a sample without an image). Under a
            template with a fixed opening the first token is the same for every sample, so the weights of "first" are
            then a learned constant a task.
        renormalize: make the weights of the chosen branches sum to 1.
        freeze_pool: which branches may be frozen after a task: the most used of "all", or of those still "tunable".
        freeze_A_after: A learns while `num_tasks` is at most this, for streams whose configuration grows with each
            task; None: always.
        route_over: tokens of a whole model that are routed: "prompt" (valid tokens that are no answer), "valid" (all
            but padding) or "all".
        decode_routing: "prompt" keeps the branches and weights of a `generate()` call's first forward; "token" routes
            every new token by itself.
        num_tasks: number of tasks, each with a router.
        instruction_dim, image_dim, keys: of the `TaskSelector`, as in `TaskConfig`.
        r, lora_alpha, lora_dropout, target_modules, exclude_modules, modules_to_save: as in `MixtureConfig`.
    """

    takes: ClassVar[tuple[str, ...]] = ("task", "route_mask")

    num_branches: int = field(default=8, metadata={"help": "number of branches"})
    top_k: int = field(default=2, metadata={"help": "branches that a sequence uses"})
    router_input: Literal["first", "mean", "last", "image"] = field(
        default="first", metadata={"help": "what the router sees of a sequence"}
    )
    renormalize: bool = field(default=False, metadata={"help": "weights of the chosen branches sum to 1"})
    freeze_pool: Literal["all", "tunable"] = field(
        default="all", metadata={"help": "branches of which the most used are frozen after a task"}
    )
    freeze_A_after: int | None = field(default=None, metadata={"help": "num_tasks up to which A learns"})
    route_over: Literal["prompt", "valid", "all"] = field(  # type: ignore[misc]
        default="prompt", metadata={"help": "tokens of a whole model that are routed"}
    )
    decode_routing: Literal["prompt", "token"] = field(  # type: ignore[misc]
        default="prompt", metadata={"help": "route once a generate() call, or every new token"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_branches", "top_k"):
            check_int(name, getattr(self, name))
        if self.top_k > self.num_branches:
            raise ValueError(f"top_k must be at most num_branches = {self.num_branches}, got {self.top_k}")
        if self.freeze_A_after is not None:
            check_int("freeze_A_after", self.freeze_A_after)
        if not isinstance(self.renormalize, bool):
            raise ValueError(f"renormalize must be True or False, got {self.renormalize!r}")
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)

    @property
    def sees_image_tokens(self) -> bool:
        return self.router_input == "image"


class BranchLoRAExperts(FreezesExperts, MixtureExperts):
    """One BranchLoRA adapter on one linear layer: y = W x + b + s sum_b pi_b B_b A x over the k largest pi.

    pi = softmax(router[task] x_r) of the sequence, x_r being what `router_input` names.

    Parameters (N branches):
        A (r, d) ~ N(0, 0.01^2), B (N, k, r) = 0, router (tasks, N, d) as `nn.Linear`. Frozen branches, and routers of
        tasks that are not in the batch, keep their values under any optimiser.

    Buffers:
        frozen_branches: bool (N,), saved with the state.
    """

    config: BranchLoRAConfig
    config_class = BranchLoRAConfig
    A: Tensor
    B: Tensor
    router: Tensor
    frozen_branches: Tensor
    _usage: Tensor
    sliced = ("B", "router")
    mask_name = "frozen_branches"

    def __init__(self, *args: Any, device: torch.device | None = None, **kwargs: Any) -> None:
        super().__init__(*args, device=device, **kwargs)
        N = self.config.num_branches
        self._add_mask(N, device)
        self.register_buffer("_usage", torch.zeros(N, dtype=torch.int64, device=device), persistent=False)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        c, d, k = self.config, self.in_features, self.out_features
        return {"A": (c.r, d), "B": (c.num_branches, k, c.r), "router": (c.num_tasks, c.num_branches, d)}

    def trains(self, name: str) -> bool:
        after = self.config.freeze_A_after
        return name != "A" or after is None or self.config.num_tasks <= after

    def prepare(
        self,
        x: Tensor,
        task: int | Tensor | None = None,
        *,
        routes: tuple[Tensor, Tensor] | SlotRouting | TopK | None = None,
        route_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Prepared:
        """Check a call and translate it for the engine.

        Args:
            x: (B, S, d), or packed (T, d) or (1, T, d) with `cu_seqlens`.
            task: an int for all n sequences, or int (n,). Needed unless the routes are given.
            routes: (ids (n, k) int, weights (n, k)), instead of routing, or the result of `last_routing()`.
            route_mask: bool, x's shape without d: the tokens that a router may see (default: all).
            cu_seqlens: int32 (n + 1,), boundaries of packed sequences.

        Raises:
            TypeError, ValueError: see `MixtureExperts.prepare`.
        """
        batch = self.batch(x, cu_seqlens, route_mask)
        banks = [Bank(self.A[None], self.B, trained=self._trained())]
        if routes is not None:
            return Prepared(batch, banks, {"slots": self._as_slots(routes, batch)})
        n = batch.tokens.num_seqs
        if task is None:
            raise ValueError(f"task must be given, an int or int of shape ({n},): the router is the task's; got None")
        rows = check_task(task, n, self.config.num_tasks, self.A.device)
        if isinstance(rows, int):
            router = Router(self.router[rows], True)
        else:
            router = Router(self.router, True, rows)
        gate = "chosen" if self.config.renormalize else "all"
        seen = batch._replace(tokens=seen_tokens(batch.tokens, batch.x.shape[0], self.config.router_input, x.device))
        how = {"routers": [router], "top_k": self.config.top_k, "gate": gate, "gate_grad": gate}
        return Prepared(seen, banks, how)

    def finish(self, x: Tensor, mixed: Mixed, decision: Decision | None = None) -> Tensor:
        if mixed.logits is not None and mixed.ids is not None and not is_recomputed():  # routed, not given
            number = torch.arange(self.config.num_branches, device=x.device)
            self._usage += (mixed.ids.reshape(-1, 1) == number).sum(0)
        return super().finish(x, mixed, decision)

    def _as_slots(self, routes: tuple[Tensor, Tensor] | SlotRouting | TopK, batch: Any) -> Slots:
        """Check given branches and weights; return them for the engine.

        Raises:
            TypeError, ValueError: they do not fit.
        """
        if isinstance(routes, TopK):
            if routes.routes.shape[0] != batch.tokens.num_seqs:
                raise ValueError(
                    f"routes must be those of {batch.tokens.num_seqs} sequences, got {routes.routes.shape[0]}"
                )
            return Slots(*routes)
        if not isinstance(routes, (tuple, list)) or len(routes) < 2:
            raise ValueError(f"routes must be a pair (ids, weights), got {type(routes).__name__}")
        ids, weights = routes[:2]
        shape = (batch.tokens.num_seqs, self.config.top_k)
        ids = check_ids(
            "routes[0]", ids, (shape,), self.A.device, below=self.config.num_branches, what="a branch"
        ).int()
        check_tensor("routes[1]", weights, self.A.device)
        if weights is None or not weights.is_floating_point() or tuple(weights.shape) != shape:
            got = None if weights is None else f"{weights.dtype} of {tuple(weights.shape)}"
            raise ValueError(f"routes[1] must be floating point of shape {shape}, got {got}")
        return Slots(ids[:, None].contiguous(), weights[:, None].to(accurate_dtype(batch.x.dtype)).contiguous())

    def last_routing(self) -> SlotRouting:
        """Return the branches and weights of the last forward, and the router's logits.

        Raises:
            RuntimeError: there was no forward yet.
        """
        last = self._decided("last_routing()")
        assert last.ids is not None and last.slot_weights is not None  # a branch is a slot
        return SlotRouting(last.ids[:, 0], last.slot_weights[:, 0], last.logits)

    def freeze_branches(self, frozen: Tensor) -> None:
        """Freeze branches for good; branches that are frozen already stay frozen.

        Args:
            frozen: bool (N,).

        Raises:
            TypeError, ValueError: it is not.
        """
        self._freeze(frozen)

    def usage(self) -> Tensor:
        """Return how often each branch was chosen since `reset_usage()`, int64 (N,).

        Given routes do not count, nor does a forward that activation checkpointing repeats in the backward.
        """
        return self._usage.clone()

    def reset_usage(self) -> None:
        """Reset the counts of `usage()` to 0."""
        self._usage.zero_()

    def trained_slices(self) -> dict[str, int]:
        """Return the branches that are not frozen, and one router, since tasks train one at a time."""
        return {"B": self._num_trained_experts(), "router": 1}

    def facts(self) -> dict[str, Any]:
        c = self.config
        return {
            "branches": c.num_branches,
            "top_k": c.top_k,
            "tasks": c.num_tasks,
            "router_input": repr(c.router_input),
        }


def seen_tokens(tokens: Tokens, T: int, which: str, device: torch.device) -> Tokens:
    """Narrow the route mask to the tokens that a router sees: the first routed one, the last, or all.

    Args:
        which: as `router_input`; with "image", the mask selects the image's tokens already.
    """
    if which == "mean":
        return tokens
    n, cu, mask = tokens
    if mask is None:
        mask = torch.ones(T, dtype=torch.bool, device=device)
    count = mask.cumsum(0)
    if cu is None:
        ends = torch.arange(1, n + 1, device=device) * (T // max(n, 1))
        starts = ends - T // max(n, 1)
        seq = torch.arange(n, device=device).repeat_interleave(T // max(n, 1), output_size=T)
    else:
        starts, ends = cu[:-1].long(), cu[1:].long()
        seq = torch.searchsorted(ends, torch.arange(T, device=device), right=True).clamp(max=max(n - 1, 0))
    total = torch.cat([count.new_zeros(1), count])
    edge = total[starts] + 1 if which in ("first", "image") else total[ends]
    return tokens._replace(route_mask=mask & (count == edge.index_select(0, seq)))


class FusedBranchLoRA(DropIn, BranchLoRAExperts):
    """A linear layer with a BranchLoRA adapter, a drop-in for the `nn.Linear` it wraps."""


BRANCHLORA = Mixture(
    "branchlora",
    BranchLoRAConfig,
    BranchLoRAExperts,
    FusedBranchLoRA,
    "BranchLoRA cannot be merged into the base: which branches a sample uses depends on its task and tokens",
    selector=TaskSelector.of_adapter,
)
