"""Routes that a cache was started with: in decoding, the forwards that continue it route as its prompt did."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..config import MixtureConfig
from .routing_inputs import PromptRoutes, RoutingInputs
from .samples import Samples


class CacheRoutes:
    """What a cache was started with.

    Args:
        routing: of the forward that started it; None if that used no adapter.
        prompt_routes: what its adapters chose.
    """

    def __init__(self, routing: RoutingInputs | None = None, prompt_routes: PromptRoutes | None = None) -> None:
        self.samples = Samples() if routing is None else routing.samples
        self.packed = routing is not None and routing.cu_seqlens is not None
        self.decisions = None if routing is None else routing.decisions
        self.prompt_routes = prompt_routes or {}
        self._length: tuple[Tensor, int] | None = None

    def record_length(self, length: Any) -> None:
        """Remember the cache's length, where that is a tensor, by its version, which writing in place raises."""
        if isinstance(length, Tensor) and not length.is_inference():  # inference tensors count no versions
            self._length = length, length._version

    def is_current(self, length: Any) -> bool:
        """Return whether nobody has written the length since `record_length`: the cache was not reset."""
        return self._length is not None and self._length[0] is length and self._length[1] == length._version


class StartedCaches:
    """The routes of every cache that forwards of a model have started."""

    def __init__(self) -> None:
        self._routes: weakref.WeakKeyDictionary[Any, CacheRoutes] = weakref.WeakKeyDictionary()

    def find(self, cache: Any, configs: Iterable[MixtureConfig]) -> CacheRoutes | None:
        """Return what a forward's cache was started with; None if it has no cache, or an empty one.

        Raises:
            RuntimeError: the cache holds tokens whose routes are unknown, or packed samples.
        """
        if cache is None or not hasattr(cache, "get_seq_length"):
            return None
        routes, length = self._routes.get(cache), cache.get_seq_length()
        if routes is not None and routes.is_current(length):
            return routes
        if int(length) == 0:  # the length of a static cache is a tensor; reading it syncs, and cannot be captured
            return None
        if routes is None and any(config.decode_routing == "prompt" for config in configs):
            raise RuntimeError(
                "the cache holds tokens, and no forward of this model with these adapters started it, so there "
                "are no routes to keep (a copied cache, or one filled with the adapters disabled): go on with the "
                "cache itself, or configure decode_routing='token'"
            )
        if routes is not None and routes.packed:
            raise RuntimeError(
                "past_key_values was started by rows that several samples were packed in, and nothing tells which of "
                "them goes on: start a cache with one sample a row"
            )
        return routes or CacheRoutes()

    def start(self, cache: Any, routing: RoutingInputs, prompt_routes: PromptRoutes) -> None:
        """Record the routes of the forward that has started a cache."""
        if getattr(cache, "is_compileable", False) and not torch.is_grad_enabled():
            prompt_routes = copy_into_existing(self._routes.get(cache), prompt_routes)
        self._routes[cache] = CacheRoutes(routing, prompt_routes)

    def record_length(self, cache: Any) -> None:
        """Remember the length of a static cache after a forward."""
        if getattr(cache, "is_compileable", False) and cache in self._routes:
            self._routes[cache].record_length(cache.get_seq_length())


def copy_into_existing(existing: CacheRoutes | None, prompt_routes: PromptRoutes) -> PromptRoutes:
    """Copy routes, into the tensors that the cache was started with before if those have the same shapes.

    A static cache that is reset and started anew keeps its memory, and a captured step that reads it continues with the
    new prompt. So it must find the new prompt's routes where it reads the old ones.
    """
    if prompt_routes and existing is not None and existing.prompt_routes.keys() == prompt_routes.keys():
        old, new = tree_leaves(existing.prompt_routes), tree_leaves(prompt_routes)
        if all(a.shape == b.shape and a.is_inference() == b.is_inference() for a, b in zip(old, new, strict=True)):
            torch._foreach_copy_(old, new)
            return existing.prompt_routes
    return tree_map(torch.clone, prompt_routes)
