"""What the layers of one forward route by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import MixtureConfig
from ..routing import TopK
from .images import Images
from .packing import spread, sums
from .samples import MISSING, Samples

PromptRoutes = dict[tuple[str, str], TopK]  # by layer and adapter


class Decisions:
    """What each adapter of each layer decided, as attributes, which compiled code can set."""


class RoutingInputs:
    """What the layers of one forward route by: n samples in rows of tokens (B, S), one a row unless they are packed.

    The object outlives the forward, because checkpointed layers are recomputed in the backward; see `context`.

    Attributes:
        samples: what is given of each sample. The first layer that needs what is missing raises.
        valid: bool (B, S), the tokens that are not padding; None for all.
        prompt: bool (B, S), the tokens that `route_over="prompt"` averages; None for all.
        image_tokens: bool (B, S), the tokens that stand for images; None if unknown.
        shape: (B, S); None if unknown.
        cu_seqlens: int32 (n + 1,), boundaries of the samples that are packed in rows; None if each row is a sample.
        images: which sample each image belongs to.
        prompt_routes: the routes of the forward that this one continues; None if it continues none.
        decisions: what the adapters decided.
        first, last: the range [first, last) of the sequence numbers of the forward's autograd nodes.
        backward_passes: the ids of the backward passes that reached the forward's outputs.
        compiled: whether a compiled layer ran in the forward.
        is_off: whether its layers leave their adapters out.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        valid: Tensor | None = None,
        prompt: Tensor | None = None,
        image_tokens: Tensor | None = None,
        shape: tuple[int, int] | None = None,
        cu_seqlens: Tensor | None = None,
        images: Images | None = None,
        prompt_routes: PromptRoutes | None = None,
        decisions: Decisions | None = None,
        is_off: bool = False,
    ) -> None:
        self.samples = samples
        self.is_off = is_off
        self.valid = valid
        if prompt is not None and valid is not None:
            prompt = prompt & valid
        if prompt is not None:  # a sample without a prompt of its own routes by all its tokens
            prompt = _or_else(prompt, torch.ones_like(prompt) if valid is None else valid, cu_seqlens)
        self.prompt = valid if prompt is None else prompt
        self.image_tokens = image_tokens
        self.shape, self.cu_seqlens = shape, cu_seqlens
        self.images = Images() if images is None else images
        self.prompt_routes = prompt_routes
        self.decisions = Decisions() if decisions is None else decisions
        self.first = torch.autograd._get_sequence_nr()
        self.last = -1
        self.backward_passes: set[int] = set()
        self.compiled = False

    def arrange(self, x: Tensor, images: bool) -> tuple[Tensor, Tensor | None]:
        """Lay out a layer's input with one sequence a row, or as (1, T, d) with the boundaries of its sequences.

        Args:
            x: (B, S, d) or (B S, d) in a text layer; in a layer that sees `images`, see `Images.arrange`.

        Raises:
            ValueError: the rows of x are not the forward's.
        """
        if images:
            return self.images.arrange(x)
        if self.cu_seqlens is not None:
            packed = x.reshape(1, -1, x.shape[-1])
            if packed.shape[1] != self.shape[0] * self.shape[1]:
                raise ValueError(
                    f"where samples are packed in rows, a layer must get all of the {self.shape} tokens, got shape "
                    f"{tuple(x.shape)}"
                )
            return packed, self.cu_seqlens
        if x.dim() == 2 and self.shape is not None and x.shape[0] == self.shape[0] * self.shape[1]:
            return x.view(*self.shape, x.shape[1]), None
        return x, None

    def adapter_arguments(
        self, x: Tensor, bounds: Tensor | None, config: MixtureConfig, key: tuple[str, str], images: bool
    ) -> dict[str, Any]:
        """Return the keyword arguments of an adapter's forward over x, which `arrange` gave with `bounds`.

        Args:
            key: the layer and the adapter.

        Raises:
            ValueError: the forward was not given what the adapter needs.
            RuntimeError: the cache that it continues has no routes of this adapter.
        """
        if self.prompt_routes is not None and config.decode_routing == "prompt" and not images:
            if key not in self.prompt_routes:
                raise RuntimeError(
                    f"the cache was started without the adapter {key[1]!r} of {key[0]}, so it has no routes to keep: "
                    "start a new cache after changing adapters"
                )
            return {"routes": self.prompt_routes[key]}
        found: dict[str, Any] = {} if bounds is None else {"cu_seqlens": bounds}
        rows = x.shape[0] if bounds is None else bounds.shape[0] - 1
        for name in config.takes:
            if name != "route_mask" and (config.needs(name) or name == "weights"):
                found[name] = self.by_row(name, rows, images)
        if "route_mask" in config.takes and not images:
            mask = self._route_mask(config)
            if mask is not None:
                found["route_mask"] = mask if bounds is None else mask.reshape(1, -1)
        return {name: t if t is None or t.device == x.device else t.to(x.device) for name, t in found.items()}

    def _route_mask(self, config: MixtureConfig) -> Tensor | None:
        """Return the tokens (B, S) that an adapter routes by; None for all."""
        mask = {"all": None, "valid": self.valid, "prompt": self.prompt}[config.route_over]
        if config.sees_image_tokens and self.image_tokens is not None:
            everything = torch.ones_like(self.image_tokens) if mask is None else mask
            mask = _or_else(self.image_tokens & everything, everything, self.cu_seqlens)
        return mask

    def by_row(self, name: str, rows: int, images: bool) -> Tensor | None:
        """Return what is given of each sample or image, (rows, ...), or what is given for all of them."""
        value = getattr(self.samples, name)
        if value is None:
            if name in MISSING:
                raise ValueError(MISSING[name])
            return None
        if not images or not self.samples.is_by_sample(name):
            return value
        if rows == 0 or value.shape[0] == 1:
            return value[:1].expand(rows, *value.shape[1:])
        return value.index_select(0, self.images.owners(rows).to(value.device))


def _or_else(mask: Tensor, other: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return a mask (B, S), replaced by another one in samples where it selects no token."""
    return torch.where(spread(sums(mask, cu_seqlens) > 0, cu_seqlens, mask.shape), mask, other)
