"""What one forward of a model routes by, and one `generate()`."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..config import MixtureConfig
from ..engine.ops import CHECK_ENVIRONMENT
from ..routing import Chosen
from .images import Images
from .packing import spread, sums
from .samples import MISSING, Samples

CACHES = ("cache", "past_key_values")  # its names in arguments and outputs: of transformers 5.24, and before


def token_input(inputs: dict[str, Any]) -> Tensor | None:
    """The (B, S) or (B, S, hidden) input of a forward."""
    embeds = inputs.get("inputs_embeds")
    return embeds if embeds is not None else inputs.get("input_ids")


def cache_input(inputs: dict[str, Any]) -> Any:
    """The cache that a forward is given; None if it is given none."""
    return next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)


def image_positions(inputs: dict[str, Any], image_token: int | None) -> Tensor | None:
    """The tokens (B, S) that stand for images; None if nothing tells."""
    ids = inputs.get("input_ids")
    return None if ids is None or image_token is None else ids == image_token


def values_are_free(tensor: Tensor) -> bool:
    """Whether reading a tensor's values waits for no device, or is asked for."""
    return tensor.device.type == "cpu" or os.environ.get(CHECK_ENVIRONMENT) == "1"


def checked_map(image_to_sample: Any, samples: int | None) -> Tensor | None:
    """The explicit map of images to samples, checked."""
    if image_to_sample is None:
        return None
    integers = (torch.int32, torch.int64)
    if not isinstance(image_to_sample, Tensor) or image_to_sample.dim() != 1 or image_to_sample.dtype not in integers:
        got = image_to_sample
        if isinstance(got, Tensor):
            got = f"{got.dtype} of shape {tuple(got.shape)}"
        raise ValueError(f"image_to_sample must be an integer tensor (images,), the sample of each image, got {got}")
    if samples is not None and values_are_free(image_to_sample) and image_to_sample.numel():
        low, high = int(image_to_sample.min()), int(image_to_sample.max())
        if low < 0 or high >= samples:
            raise ValueError(f"image_to_sample must lie in 0 to {samples - 1}, got {low} to {high}")
    return image_to_sample.long()


class Routed:
    """What each adapter of each layer decided, as attributes, which compiled code can set."""


class Call:
    """What one forward of a model routes by: n samples in rows of tokens (B, S), one a row unless they are packed.

    Attributes:
        samples: what is given of each sample; what is missing, the first layer that needs it says.
        valid: bool (B, S), the tokens that are no padding; None for all.
        prompt: bool (B, S), the tokens that `route_over="prompt"` averages; None for all.
        image_tokens: bool (B, S), the tokens that stand for images; None if unknown.
        shape: (B, S); None if unknown.
        cu_seqlens: int32 (n + 1,), boundaries of the samples that are packed in rows; None if each row is a sample.
        images: which sample each image belongs to.
        kept: the routes of the forward that this one continues, by layer and adapter; None if it continues none.
        routed: what the adapters decided.
        first, last: the numbers of the forward's autograd nodes, from `first` to before `last`.
        graphs: the backward passes that went through the forward's outputs.
        compiled: whether a compiled layer ran in it.
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
        kept: dict[tuple[str, str], Chosen] | None = None,
        routed: Routed | None = None,
    ) -> None:
        self.samples = samples
        self.valid = valid
        if prompt is not None and valid is not None:
            prompt = prompt & valid
        if prompt is not None:  # a sample without a prompt of its own routes by all its tokens
            prompt = _or_else(prompt, torch.ones_like(prompt) if valid is None else valid, cu_seqlens)
        self.prompt = valid if prompt is None else prompt
        self.image_tokens = image_tokens
        self.shape, self.cu_seqlens = shape, cu_seqlens
        self.images = Images() if images is None else images
        self.kept = kept
        self.routed = Routed() if routed is None else routed
        self.first = torch.autograd._get_sequence_nr()
        self.last = -1
        self.graphs: set[int] = set()
        self.compiled = False

    def arrange(self, x: Tensor, images: bool) -> tuple[Tensor, Tensor | None]:
        """A layer's input with an instance a row, or as (1, T, d) with the boundaries of the instances in it.

        Args:
            x: of a text layer (B, S, d) or (B S, d), or of a layer that sees `images`.
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

    def arguments(
        self, x: Tensor, bounds: Tensor | None, config: MixtureConfig, key: tuple[str, str], images: bool
    ) -> dict[str, Any]:
        """What an adapter's forward takes besides what `arrange` gave, x with `bounds`."""
        if self.kept is not None and config.decode_routing == "prompt" and not images:
            if key not in self.kept:
                raise RuntimeError(
                    f"the cache was started without the adapter {key[1]!r} of {key[0]}, so it has no routes to keep: "
                    "start a new cache after changing adapters"
                )
            return {"routes": self.kept[key]}
        found: dict[str, Any] = {} if bounds is None else {"cu_seqlens": bounds}
        rows = x.shape[0] if bounds is None else bounds.shape[0] - 1
        for name in config.takes:
            if name != "route_mask" and (config.needs(name) or name == "weights"):
                found[name] = self._of_each(name, rows, images)
        if "route_mask" in config.takes and not images:
            mask = self._routed(config)
            if mask is not None:
                found["route_mask"] = mask if bounds is None else mask.reshape(1, -1)
        return {name: t if t is None or t.device == x.device else t.to(x.device) for name, t in found.items()}

    def _routed(self, config: MixtureConfig) -> Tensor | None:
        """The tokens (B, S) that an adapter routes by; None for all."""
        mask = {"all": None, "valid": self.valid, "prompt": self.prompt}[config.route_over]
        if config.sees_image_tokens and self.image_tokens is not None:
            everything = torch.ones_like(self.image_tokens) if mask is None else mask
            mask = _or_else(self.image_tokens & everything, everything, self.cu_seqlens)
        return mask

    def _of_each(self, name: str, rows: int, images: bool) -> Tensor | None:
        """What is given of each instance, sample or image (rows, ...), or of all of them."""
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
    """A mask (B, S), or where a sample has no token in it another."""
    return torch.where(spread(sums(mask, cu_seqlens) > 0, cu_seqlens, mask.shape), mask, other)


class Generation:
    """State of one `generate()` call: what its forwards share."""

    def __init__(
        self, samples: Samples, image_to_sample: Tensor | None, keeps_routes: bool, image_token: int | None = None
    ) -> None:
        self.samples = samples
        self.image_token = image_token  # its id, where an adapter sees the images' tokens
        self.image_to_sample = image_to_sample
        self.keeps_routes = keeps_routes  # every adapter those of the prompt
        self.mask: Tensor | None = None  # (B, length), of the prompt; None if nothing is padded
        self.length = 0  # of the prompt
        self.position = 0  # tokens in the cache
        self.kept: dict[tuple[str, str], Chosen] | None = None
        self.routed = Routed()  # in images, which are encoded once, and in the last step
        self._next: Tensor | None = None

    def expect(self, inputs: dict[str, Any]) -> None:
        """Take the inputs of the next forward: of all that a thread calls meanwhile, that one alone is of this."""
        self._next = token_input(inputs)

    def claims(self, tokens: Tensor | None) -> bool:
        """Whether the forward of these tokens is the one that was expected."""
        if tokens is None or tokens is not self._next:
            return False
        self._next = None
        return True

    def expand(self, copies: int, mask: Tensor | None, length: int) -> None:
        """Take the prompt's mask, and repeat each sample for its beams, as `generate()` does with its inputs."""
        self.mask, self.length = mask, length
        if copies == 1:
            return
        if mask is not None:
            self.mask = mask.repeat_interleave(copies, 0)
        self.samples = self.samples.repeat(copies)
        if self.image_to_sample is not None:
            self.image_to_sample = self.image_to_sample.repeat_interleave(copies, 0) * copies

    def step(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the next forward's `Call`, without its images.

        Raises:
            ValueError: it is the first one, and has a part of the prompt alone.
        """
        tokens = token_input(inputs)
        rows, count = tokens.shape[:2]
        cache = cache_input(inputs)
        start = 0
        if cache is not None:
            start = self.position if self.kept is not None else int(cache.get_seq_length())
            self.position = start + count
        if self.kept is None and not start and count < self.length:
            raise ValueError(
                "prefill_chunk_size must be left out with SMoLoRA adapters, which route a prompt as a whole: the first "
                f"forward has {count} of its {self.length} tokens"
            )
        if self.kept is None and start:  # goes on from a cache the caller has: what is new is this call's prompt
            self.length = max(self.length, start + count)
        prompt = valid = None
        routed = self.kept is None or not self.keeps_routes
        if routed and start + count > self.length:
            position = torch.arange(start, start + count, device=tokens.device)
            prompt = (position < self.length).expand(rows, count)
        if routed and self.mask is not None:
            valid = nn.functional.pad(self.mask.bool(), (0, max(0, start + count - self.mask.shape[1])), value=True)
            valid = valid[:, start : start + count].to(tokens.device)
        return {
            "samples": self.samples,
            "valid": valid,
            "prompt": prompt,
            "image_tokens": image_positions(inputs, self.image_token) if routed else None,
            "shape": (rows, count),
            "kept": self.kept,
            "routed": self.routed,
        }
