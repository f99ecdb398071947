"""What one forward of a model routes by, and one `generate()`."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SMoLoRAConfig
from ..engine.ops import CHECK_ENVIRONMENT
from ..routing import Chosen
from .images import Images
from .packing import spread, sums

MISSING = (
    "instruction_embeds must be given to the model's forward or generate(): embeddings of the instructions, one row a "
    "sample, or a vector for all; the adapters route by it, and no default_instruction is configured"
)
CACHES = ("past_key_values", "cache")  # its names in a forward's arguments and outputs


def token_input(inputs: dict[str, Any]) -> Tensor | None:
    """The (B, S) or (B, S, hidden) input of a forward."""
    embeds = inputs.get("inputs_embeds")
    return embeds if embeds is not None else inputs.get("input_ids")


def cache_input(inputs: dict[str, Any]) -> Any:
    """The cache that a forward is given; None if it is given none."""
    return next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)


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
        instruction: (n, e), or (e,) for all; None if it is missing, which the first layer that needs it says.
        valid: bool (B, S), the tokens that are no padding; None for all.
        prompt: bool (B, S), the tokens that `route_over="prompt"` averages; None for all.
        shape: (B, S); None if unknown.
        cu_seqlens: int32 (n + 1,), boundaries of the samples that are packed in rows; None if each row is a sample.
        images: which sample each image belongs to.
        kept: the routes of the forward that this one continues, by layer and adapter; None if it continues none.
        routed: what the adapters decided.
        first, last: the numbers of the forward's autograd nodes, from `first` to before `last`.
        graphs: the backward passes that went through the forward's outputs.
    """

    def __init__(
        self,
        instruction: Tensor | None,
        *,
        valid: Tensor | None = None,
        prompt: Tensor | None = None,
        shape: tuple[int, int] | None = None,
        cu_seqlens: Tensor | None = None,
        images: Images | None = None,
        kept: dict[tuple[str, str], Chosen] | None = None,
        routed: Routed | None = None,
    ) -> None:
        self.instruction = instruction
        self.valid = valid
        if prompt is not None and valid is not None:
            prompt = prompt & valid
        if prompt is not None:  # a sample without a prompt of its own routes by all its tokens
            everything = torch.ones_like(prompt) if valid is None else valid
            has_prompt = spread(sums(prompt, cu_seqlens) > 0, cu_seqlens, prompt.shape)
            prompt = torch.where(has_prompt, prompt, everything)
        self.prompt = valid if prompt is None else prompt
        self.shape, self.cu_seqlens = shape, cu_seqlens
        self.images = Images() if images is None else images
        self.kept = kept
        self.routed = Routed() if routed is None else routed
        self.first = torch.autograd._get_sequence_nr()
        self.last = -1
        self.graphs: set[int] = set()

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
        self, x: Tensor, bounds: Tensor | None, config: SMoLoRAConfig, key: tuple[str, str], images: bool
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
        if config.fusion != "vu":
            found["instruction"] = self._instruction(x.shape[0] if bounds is None else bounds.shape[0] - 1, images)
        mask = None
        if not images and config.route_over != "all":
            mask = self.valid if config.route_over == "valid" else self.prompt
        if mask is not None:
            found["route_mask"] = mask if bounds is None else mask.reshape(1, -1)
        return {name: t if t.device == x.device else t.to(x.device) for name, t in found.items()}

    def _instruction(self, rows: int, images: bool) -> Tensor:
        """The embedding of each instance (rows, e), or (e,) for all of them."""
        if self.instruction is None:
            raise ValueError(MISSING)
        if not images or self.instruction.dim() == 1:
            return self.instruction
        if rows == 0 or self.instruction.shape[0] == 1:
            return self.instruction[:1].expand(rows, -1)
        return self.instruction.index_select(0, self.images.owners(rows).to(self.instruction.device))


class Generation:
    """State of one `generate()` call: what its forwards share."""

    def __init__(self, instruction: Tensor | None, image_to_sample: Tensor | None, keeps_routes: bool) -> None:
        self.instruction = instruction
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
        if self.instruction is not None and self.instruction.dim() == 2:
            self.instruction = self.instruction.repeat_interleave(copies, 0)
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
        return dict(
            instruction=self.instruction, valid=valid, prompt=prompt, shape=(rows, count), kept=self.kept,
            routed=self.routed,
        )  # fmt: skip
