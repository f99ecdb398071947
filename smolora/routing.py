"""Routing decisions, as callers see them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """Routes of one forward over n instances and T tokens; a branch that the fusion leaves out has None.

    Pairs are (VU, IF). With `top_k` 1 the routes are (n,), as `FusedSMoLoRA.forward` takes them.
    """

    routes: tuple[Tensor | None, Tensor | None]  # chosen experts, int32, (n,) or (n, top_k)
    logits: tuple[Tensor | None, Tensor | None]  # (n, M) and (n, N); None when the routes were given
    gates: tuple[Tensor | None, Tensor | None]  # weights of the chosen experts (n, top_k)
    alpha: Tensor | None = None  # (T,), the VU branch's share of each token, when it was kept
    beta: Tensor | None = None  # (T,), the IF branch's


class TopK(NamedTuple):
    """The top-k experts of n instances and their gates, as the passes take them, in b branches."""

    routes: Tensor  # int32 (n, b, top_k)
    gates: Tensor  # (n, b, top_k), in the dtype of the reductions
