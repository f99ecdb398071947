"""Routers that are computed from sums over each task's samples, so that they forget nothing.

A feature h is normalised and gets a 1 behind it. The sum Σ h of every task is kept: the task's column of Q = Σ h y^T,
with y its one-hot number. A ridge router keeps C = Σ h h^T over all tasks as well. Features are rounded to multiples of
2^-20, so the sums are integers: the order of tasks, batches and processes changes no bit of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..arguments import check_int
from ..config import SMoLoRAConfig
from .checks import reads_values
from .selector import Selector

UNIT = 2.0**20  # features are integers in units of 1 / UNIT
AT_ONCE = 4096  # samples whose products sum up exactly in float64: 4096 UNIT^2 is below 2^53
TEMPERATURE = 0.1  # of the softmax over the scores of mixed experts
BRANCHES = ("vu", "if")


class RouterFeatures(NamedTuple):
    """Features of n samples, of the frozen base without adapters; None where no router reads them."""

    image: Tensor | None = None  # (n, e_i), pooled by the vision tower; a row of zeros: this sample has no image
    text: Tensor | None = None  # (n, e_t), the embeddings of the instructions
    hidden: Tensor | None = None  # (n, d), the mean of the language model's last hidden states over the routed tokens
    layers: list[Tensor] | None = None  # (n, d_l) of each adapted layer, the mean of its input over the routed tokens


class Moments(NamedTuple):
    """Sums over samples, int64: in units of 2^-20, and of 2^-40."""

    total: Tensor  # (d + 1,), of h
    outer: Tensor  # (d + 1, d + 1), of h h^T; (0, 0) where nobody needs it


def extended(features: Tensor) -> Tensor:
    """Return normalised features (n, d) with a 1 behind them: float64 (n, d + 1)."""
    normal = nn.functional.normalize(features.double())
    return torch.cat([normal, normal.new_ones((len(normal), 1))], 1)


def moments(features: Tensor, outer: bool) -> Moments:
    """Sum up features (n, d), exactly after they are rounded."""
    size = features.shape[1] + 1
    total = torch.zeros(size, dtype=torch.int64, device=features.device)
    products = total.new_zeros((size, size) if outer else (0, 0))
    for part in extended(features).mul_(UNIT).round_().split(AT_ONCE):
        total += part.sum(0).long()
        if outer:
            products += (part.mT @ part).long()  # float64 sums of integers below 2^53
    return Moments(total, products)


def prototypes(totals: Tensor) -> Tensor:
    """Return the weights (T, d + 1) whose scores are the cosines to the means of tasks, from their sums (T, d + 1)."""
    return nn.functional.pad(nn.functional.normalize(totals[:, :-1].double()), (0, 1))


def ridge_regression(totals: Tensor, outer: Tensor, strength: float) -> Tensor:
    """Return the weights (T, d + 1) of the ridge regression of one-hot tasks on features: W^T = (C + γ I)^-1 Q.

    All tasks weigh the same, however many samples they have: C is the covariance within tasks, over all samples, and
    the mean of μ μ^T over the tasks' means μ; Q has μ / T. Where tasks have equally many samples, that is the
    regression over all samples. Otherwise a task of few samples would hardly be found beside one of many.

    Args:
        totals: int64 (T, d + 1), sums of the tasks' features; those of a task without samples are zeros.
        outer: int64 (d + 1, d + 1), the sum of h h^T over all samples.
        strength: γ as a share of the mean of C's diagonal.
    """
    sums = totals.double() / UNIT
    counts = sums[:, -1:]  # of samples, each of which has a 1 there
    means, num_tasks = sums / counts.clamp(min=1), (counts > 0).sum()
    C = (outer.double() / UNIT**2 - sums.mT @ means) / counts.sum() + means.mT @ means / num_tasks
    C.diagonal().add_(strength * C.diagonal().mean())
    return torch.cholesky_solve(means.mT / num_tasks, torch.linalg.cholesky(C)).mT.contiguous()


class TaskExperts(NamedTuple):
    """The experts of a task; None in a branch whose router is random or not in use."""

    vu: int | None
    if_: int | None


class ExpertRouters(Selector):
    """The computed routers of a SMoLoRA adapter: they find the experts of a sample whose task nobody tells.

    A router scores each task: by the cosine to the mean of its features (a prototype), or by ridge regression. An
    expert that several tasks share has the largest of their cosines, or the sum of their regressions, which is the
    regression of the expert itself. With `router_features="layer"` the VU branch has a router for each layer.

    Buffers (T tasks; of each computed branch, and of its router i, one, or one a layer):
        vu_experts, if_experts: int64 (T,), the expert of each task; -1 for a task that is not fitted.
        vu_0_totals (T, d + 1), vu_0_outer (d + 1, d + 1): int64, see the module; `outer` for ridge regression alone.

    Args:
        config: the adapter's configuration, whose `router_sizes` are known.
        device: of the buffers.
    """

    finds = ("task", "routes", "gates", "margins")
    vu_experts: Tensor
    if_experts: Tensor

    def __init__(self, config: SMoLoRAConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.config = config
        assert config.router_sizes is not None  # the model has set them
        self.sizes = {"vu": list(config.router_sizes), "if": [config.instruction_dim]}
        self._weights: dict[tuple[str, int], Tensor] = {}
        T = config.num_tasks
        for branch in BRANCHES:
            self.register_buffer(f"{branch}_experts", torch.full((T,), -1, dtype=torch.int64, device=device))
        for branch in config.computed_branches:
            for i, d in enumerate(self.sizes[branch]):
                zeros = torch.zeros((T, d + 1), dtype=torch.int64, device=device)
                self.register_buffer(f"{branch}_{i}_totals", zeros)
                if config.router_kind(branch) == "ridge":
                    self.register_buffer(f"{branch}_{i}_outer", zeros.new_zeros((d + 1, d + 1)))

    @classmethod
    def of_adapter(cls, config: SMoLoRAConfig, device: torch.device) -> ExpertRouters | None:
        """Return the routers of a new adapter; None if its routers are random."""
        return cls(config, device) if config.computes_routes else None

    @property
    def num_tasks(self) -> int:
        """Number of tasks, with those that are not fitted."""
        return self.vu_experts.shape[0]

    @property
    def fitted(self) -> Tensor:
        """Which tasks are fitted, bool (T,)."""
        return (self.vu_experts >= 0) | (self.if_experts >= 0)

    @property
    def is_ready(self) -> bool:
        return bool(self.fitted.any())

    @property
    def reads(self) -> set[str]:
        """The fields of `RouterFeatures` that the routers read."""
        read = {
            "layer": {"layers"},
            "vision": {"image"},
            "vision+instruction": {"image", "text"},
            "hidden": {"hidden"},
        }
        of_vu = read[self.config.router_features] if "vu" in self.config.computed_branches else set()
        return of_vu | ({"text"} if "if" in self.config.computed_branches else set())

    # ---- fitting

    def inputs(self, features: RouterFeatures) -> dict[str, list[Tensor]]:
        """Return what the routers of each computed branch see, (n, d) each.

        Raises:
            ValueError: features are missing, of another size or not finite.
        """
        found: dict[str, list[Tensor]] = {}
        for branch in self.config.computed_branches:
            names = ["text"]
            if branch == "vu":
                names = sorted(self.reads - {"text"} | ({"text"} if "+" in self.config.router_features else set()))
            parts: list[Any] = [getattr(features, name) for name in names]
            if any(part is None for part in parts):
                raise ValueError(
                    f"{names[parts.index(None)]} features must be given: the {branch.upper()} router reads them, got "
                    "None"
                )
            if names == ["layers"]:
                found[branch] = parts[0]
            else:
                joint = [nn.functional.normalize(part.double()) for part in parts]
                found[branch] = [torch.cat([part.to(joint[0].device) for part in joint], 1)]
            sizes = [seen.shape[1] for seen in found[branch]]
            if sizes != self.sizes[branch]:
                raise ValueError(
                    f"features of the {branch.upper()} routers must have sizes {self.sizes[branch]}, got {sizes}"
                )
            for seen in found[branch]:
                if reads_values(seen) and not bool(seen.isfinite().all()):
                    raise ValueError(f"{' and '.join(names)} features must be finite, got NaN or infinity")
        return found

    @torch.no_grad()
    def moments(self, features: RouterFeatures) -> list[Moments]:
        """Return the sums of samples, of each branch and router.

        Raises:
            ValueError: as for `inputs`.
        """
        return [
            moments(seen, outer=self.config.router_kind(branch) == "ridge")
            for branch, inputs in self.inputs(features).items()
            for seen in inputs
        ]

    def no_moments(self) -> list[Moments]:
        """Return the sums of no sample."""
        return [
            moments(torch.zeros((0, d), device=self.vu_experts.device), self.config.router_kind(branch) == "ridge")
            for branch in self.config.computed_branches
            for d in self.sizes[branch]
        ]

    @torch.no_grad()
    def add(self, task: int, sums: list[Moments]) -> None:
        """Add the results of `moments` to a task; its experts come with `assign`.

        Raises:
            ValueError: the task is no number from 0.
        """
        check_int("task", task, least=0)
        self._grow(max(self.num_tasks, task + 1))
        places = [(branch, i) for branch in self.config.computed_branches for i in range(len(self.sizes[branch]))]
        for (branch, i), own in zip(places, sums, strict=True):
            self.get_buffer(f"{branch}_{i}_totals")[task] += own.total.to(self.vu_experts.device)
            if own.outer.numel():
                self.get_buffer(f"{branch}_{i}_outer").add_(own.outer.to(self.vu_experts.device))
        self._weights = {}

    def assign(self, task: int) -> TaskExperts:
        """Choose the experts of a task that `add` has seen; a task that has some keeps them.

        In each branch it is the expert of the task that looks most like it, if the cosine of their mean features is at
        least `vu_share` or `if_share`. Otherwise it is one that no task has, which may be one more than the
        configuration has with `experts="grow"`; where there is none left, it is the former all the same.
        """
        chosen: dict[str, int | None] = dict.fromkeys(BRANCHES)
        for branch in self.config.computed_branches:
            experts = self.get_buffer(f"{branch}_experts")
            if experts[task] < 0:
                experts[task] = self._choose_expert(branch, task, experts.tolist())
            chosen[branch] = int(experts[task])
        self._weights = {}
        return TaskExperts(chosen["vu"], chosen["if"])

    def _choose_expert(self, branch: str, task: int, experts: list[int]) -> int:
        share, count = self.config.share(branch), self.config.num_experts(branch)
        nearest, cosine = -1, -1.0
        alike = self.similarity(branch)[task].tolist()
        for other, expert in enumerate(experts):
            if expert >= 0 and alike[other] > cosine:
                nearest, cosine = expert, alike[other]
        if nearest >= 0 and share is not None and cosine >= share:
            return nearest
        free = next(expert for expert in range(len(experts) + 1) if expert not in experts)
        limit = self.config.max_experts
        if free < count or (self.config.experts == "grow" and (limit is None or free < limit)):
            return free
        return nearest

    def similarity(self, branch: str) -> Tensor:
        """Return the cosines between the mean features of tasks, float64 (T, T), averaged over the branch's routers."""
        cosines = []
        for i in range(len(self.sizes[branch])):
            means = prototypes(self.get_buffer(f"{branch}_{i}_totals"))
            cosines.append(means @ means.mT)
        return torch.stack(cosines).mean(0)

    def trained_experts(self, task: int, branch: str) -> Tensor:
        """Return which experts training on a task changes, bool (E,): all, or with frozen shared ones its own alone."""
        experts = self.get_buffer(f"{branch}_experts")
        number = torch.arange(self.config.num_experts(branch), device=experts.device)
        if self.config.shared_experts == "train" or branch not in self.config.computed_branches:
            return torch.ones_like(number, dtype=torch.bool)
        users = experts == experts[task]
        return (number == experts[task]) & (users.sum() == 1)

    def table(self) -> dict[str, Any]:
        """Return the experts of each task and the cosines between tasks, as JSON has them, of computed branches."""
        of_branch = {}
        for branch in self.config.computed_branches:
            experts = self.get_buffer(f"{branch}_experts").tolist()
            of_branch[branch] = {"experts": experts, "similarity": self.similarity(branch).tolist()}
        return {"tasks": list(range(self.num_tasks)), **of_branch}

    # ---- choice

    @torch.no_grad()
    def task_scores(self, features: RouterFeatures) -> dict[str, Tensor]:
        """Return the score of each task of each computed branch, float64 (n, routers, T); -inf where it is not fitted.

        Raises:
            ValueError: as for `inputs`.
        """
        found = {}
        for branch, inputs in self.inputs(features).items():
            scores = [extended(seen) @ self._weight(branch, i).to(seen.device).mT for i, seen in enumerate(inputs)]
            fitted = self.get_buffer(f"{branch}_experts") >= 0
            found[branch] = torch.stack([score.to(scores[0].device) for score in scores], 1)
            found[branch].masked_fill_(~fitted.to(scores[0].device), -torch.inf)
        return found

    def _weight(self, branch: str, i: int) -> Tensor:
        """Return the weights (T, d + 1) of a router, which are kept until the sums change."""
        if (branch, i) not in self._weights:
            totals = self.get_buffer(f"{branch}_{i}_totals")
            if self.config.router_kind(branch) == "prototype":
                self._weights[branch, i] = prototypes(totals)
            else:
                outer = self.get_buffer(f"{branch}_{i}_outer")
                self._weights[branch, i] = ridge_regression(totals, outer, self.config.router_ridge)
        return self._weights[branch, i]

    def expert_scores(self, branch: str, scores: Tensor) -> Tensor:
        """Return the scores of experts (n, routers, E) from those of tasks; -inf where no task has the expert."""
        experts = self.get_buffer(f"{branch}_experts").to(scores.device)
        found = scores.new_full((*scores.shape[:2], self.config.num_experts(branch)), -torch.inf)
        add = self.config.router_kind(branch) == "ridge"
        for expert in experts[experts >= 0].unique().tolist():
            own = scores[..., experts == expert]
            found[..., expert] = own.sum(-1) if add else own.amax(-1)
        return found

    def choose(self, features: Any) -> dict[str, Tensor]:
        """Return what is found of n samples.

        Returns:
            task: int64 (n,), the task that looks most like it, for reports.
            routes, gates: int32 and float (n, routers, 2, K), the VU and IF experts and their weights; K is `top_k`
                where unseen samples mix experts, else 1. Empty slots and those of a random router are -1.
            margins: (n, routers, 2), how much higher the score of the best expert is than the second best's.
        """
        scores = self.task_scores(features)
        n, device = next(iter(scores.values())).shape[0], next(iter(scores.values())).device
        routers = max(score.shape[1] for score in scores.values())
        K = self.config.top_k if self.config.unseen == "mix" else 1
        routes = torch.full((n, routers, 2, K), -1, dtype=torch.int32, device=device)
        gates = torch.zeros(routes.shape, dtype=torch.float64, device=device)
        margins = torch.zeros((n, routers, 2), dtype=torch.float64, device=device)
        for branch, of_tasks in scores.items():
            b = BRANCHES.index(branch)
            ranked, order = torch.sort(self.expert_scores(branch, of_tasks), dim=-1, descending=True, stable=True)
            best, used = ranked[..., 0], int(ranked[0, 0].isfinite().sum()) if n else 0
            ids, weights = _slots(order[..., :K], ranked[..., :K], best < self.config.unseen_below, self.config.unseen)
            there = ids.shape[-1]  # fewer than K where a branch has fewer experts: the other slots are empty
            routes[:, :, b, :there], gates[:, :, b, :there] = ids.int(), weights
            margins[:, :, b] = best - ranked[..., 1] if used > 1 else best
        first = scores["vu" if "vu" in scores else "if"]
        return {"task": first.mean(1).argmax(1), "routes": routes, "gates": gates, "margins": margins}

    def of_tasks(self, task: Tensor) -> dict[str, Tensor]:
        """Return the experts of given tasks (n,), as `choose` does: `routes` (n, 1, 2, 1), and `gates` of 1.

        Raises:
            ValueError: a task is not fitted.
        """
        if reads_values(task) and not bool(self._is_fitted(task).all()):
            known = self.fitted.nonzero().flatten().tolist()
            raise ValueError(
                f"task_ids must be of tasks that smolora.fit_routers has seen, {known}, got {task.tolist()}"
            )
        experts = torch.stack([self.vu_experts, self.if_experts], 1).to(task.device)
        routes = experts.index_select(0, task.long())[:, None, :, None].int()
        return {"routes": routes, "gates": (routes >= 0).double()}

    def _is_fitted(self, task: Tensor) -> Tensor:
        fitted = self.fitted.to(task.device)
        return fitted[task.clamp(0, max(len(fitted) - 1, 0)).long()] & (task < len(fitted)) if len(fitted) else task < 0

    # ---- sizes

    def _grow(self, tasks: int) -> None:
        """Make room for tasks."""
        self.config.num_tasks = tasks
        for name, old in list(self.named_buffers()):
            if not name.endswith("_outer") and old.shape[0] < tasks:
                new = old.new_full((tasks, *old.shape[1:]), -1 if name.endswith("_experts") else 0)
                new[: old.shape[0]] = old
                setattr(self, name, new)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._weights = {}

    def extra_repr(self) -> str:
        kinds = ", ".join(f"{branch}={self.config.router_kind(branch)!r}" for branch in BRANCHES)
        return f"{kinds}, features={self.config.router_features!r}, num_tasks={self.num_tasks}"


def _slots(order: Tensor, ranked: Tensor, is_far: Tensor, unseen: str) -> tuple[Tensor, Tensor]:
    """Return the experts of K slots and their weights: the best expert's is 1, unless the sample is far from all tasks.

    Args:
        order, ranked: experts (n, routers, K) and their scores, the best first; -inf: no task has the expert.
        is_far: bool (n, routers).
        unseen: what a sample that is far does.
    """
    alone = torch.zeros_like(ranked)
    alone[..., 0] = 1
    far = {
        "nearest": alone,
        "mix": torch.softmax(ranked / TEMPERATURE, -1),
        "none": torch.zeros_like(ranked),
    }[unseen]
    return order, torch.where(is_far[..., None], far, alone)
