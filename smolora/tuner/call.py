"""What one forward of a model routes by, and one `generate()`."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SMoLoRAConfig
from ..ops import CHECK_ENVIRONMENT
from ..routing import Chosen

MISSING = (
    "instruction_embeds must be given to the model's forward or generate(): embeddings of the instructions, one row a "
    "sample, or a vector for all; the adapters route by it, and no default_instruction is configured"
)
CACHES = ("cache", "past_key_values")  # its names in a forward's arguments and outputs, of transformers 5.24 and before


def token_input(inputs: dict[str, Any]) -> Tensor | None:
    """The (B, S) or (B, S, hidden) input of a forward."""
    embeds = inputs.get("inputs_embeds")
    return embeds if embeds is not None else inputs.get("input_ids")


def cache_input(inputs: dict[str, Any]) -> Any:
    """The cache that a forward is given; None if it is given none."""
    return next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)


def _values_are_free(tensor: Tensor) -> bool:
    """Whether reading a tensor's values waits for no device, or is asked for."""
    return tensor.device.type == "cpu" or os.environ.get(CHECK_ENVIRONMENT) == "1"


def checked_map(image_to_sample: Any, batch: int | None) -> Tensor | None:
    """The explicit map of images to samples, checked."""
    if image_to_sample is None:
        return None
    integers = (torch.int32, torch.int64)
    if not isinstance(image_to_sample, Tensor) or image_to_sample.dim() != 1 or image_to_sample.dtype not in integers:
        got = image_to_sample
        if isinstance(got, Tensor):
            got = f"{got.dtype} of shape {tuple(got.shape)}"
        raise ValueError(f"image_to_sample must be an integer tensor (images,), the sample of each image, got {got}")
    if batch is not None and _values_are_free(image_to_sample) and image_to_sample.numel():
        low, high = int(image_to_sample.min()), int(image_to_sample.max())
        if low < 0 or high >= batch:
            raise ValueError(f"image_to_sample must lie in 0 to {batch - 1}, got {low} to {high}")
    return image_to_sample.long()


class Call:
    """What one forward of a model routes by: B samples of S tokens.

    Attributes:
        instruction: (B, e), or (e,) for all; None if it is missing, which the first layer that needs it says.
        valid: bool (B, S), the tokens that are no padding; None for all.
        prompt: bool (B, S), the tokens that `route_over="prompt"` averages; None for all.
        ids: (B, S), in which `image_token` stands for a part of an image; None if either is unknown.
        image_to_sample: (images,), the sample of each image, where it is given.
        kept: the routes of the forward that this one continues, by layer and adapter; None if it continues none.
        active: whether its forward is running.
    """

    def __init__(
        self,
        instruction: Tensor | None,
        *,
        valid: Tensor | None = None,
        prompt: Tensor | None = None,
        ids: Tensor | None = None,
        image_token: int | None = None,
        image_to_sample: Tensor | None = None,
        kept: dict[tuple[str, str], Chosen] | None = None,
    ) -> None:
        self.instruction = instruction
        self.valid = valid
        if prompt is not None and valid is not None:
            prompt = prompt & valid
        if prompt is not None:  # a sample without a prompt of its own routes by all its tokens
            everything = torch.ones_like(prompt) if valid is None else valid
            prompt = torch.where(prompt.any(1, keepdim=True), prompt, everything)
        self.prompt = valid if prompt is None else prompt
        self.ids, self.image_token = ids, image_token
        self.image_to_sample = image_to_sample
        self.kept = kept
        self.active = True

    def arguments(self, x: Tensor, config: SMoLoRAConfig, key: tuple[str, str], images: bool) -> dict[str, Any]:
        """What an adapter's forward takes besides its input x (B, S, d), or (images, patches, d) if `images`."""
        if self.kept is not None and config.decode_routing == "prompt" and not images:
            if key not in self.kept:
                raise RuntimeError(
                    f"the cache was started without the adapter {key[1]!r} of {key[0]}, so it has no routes to keep: "
                    "start a new cache after changing adapters"
                )
            return {"routes": self.kept[key]}
        instruction = None
        if config.fusion != "vu":
            instruction = self._instruction(x.shape[0], images)
            if instruction.device != x.device:
                instruction = instruction.to(x.device)
        if images or config.route_over == "all":
            return {"instruction": instruction}
        mask = self.valid if config.route_over == "valid" else self.prompt
        if mask is not None and mask.device != x.device:
            mask = mask.to(x.device)
        return {"instruction": instruction, "route_mask": mask}

    @cached_property
    def image_tokens(self) -> Tensor | None:
        """The placeholders of images in each sample (B,); None if unknown. Counted where there are images."""
        if self.ids is None or self.image_token is None:
            return None
        return (self.ids == self.image_token).sum(1)

    def _instruction(self, rows: int, images: bool) -> Tensor:
        """The embedding of each row (rows, e), or (e,) for all of them."""
        if self.instruction is None:
            raise ValueError(MISSING)
        if not images or self.instruction.dim() == 1:
            return self.instruction
        if rows == 0 or self.instruction.shape[0] == 1:
            return self.instruction[:1].expand(rows, -1)
        return self.instruction.index_select(0, self._samples(rows))

    def _samples(self, images: int) -> Tensor:
        """The sample (images,) of each image.

        Raises:
            ValueError: nothing tells it, or the placeholders in the text do not fit the images.
        """
        if self.image_to_sample is not None:
            if self.image_to_sample.shape[0] != images:
                raise ValueError(
                    f"image_to_sample must name the sample of each of the {images} images, "
                    f"got {self.image_to_sample.shape[0]} entries"
                )
            return self.image_to_sample
        counts = self.image_tokens
        if counts is None:
            raise ValueError(
                f"image_to_sample must be given, the sample of each of the {images} images: without input_ids nothing "
                "tells which instruction an image belongs to"
            )
        if images and _values_are_free(counts):
            each, rest = divmod(int(counts.sum()), images)
            if rest or not each or bool((counts % max(each, 1)).any()):
                raise ValueError(
                    f"{images} images do not fit the image tokens in input_ids, {counts.tolist()} in each sample: "
                    "give image_to_sample, the sample of each image"
                )
        each = counts.sum() // max(images, 1)
        first = torch.arange(images, device=counts.device) * each  # an image's first placeholder
        return torch.searchsorted(counts.cumsum(0), first, right=True).clamp_(max=counts.shape[0] - 1)


class Generation:
    """State of one `generate()` call: what its forwards share."""

    def __init__(
        self, instruction: Tensor | None, image_to_sample: Tensor | None, image_token: int | None, keeps_routes: bool
    ) -> None:
        self.instruction = instruction
        self.image_to_sample = image_to_sample
        self.image_token = image_token
        self.keeps_routes = keeps_routes  # every adapter those of the prompt
        self.mask: Tensor | None = None  # (B, length), of the prompt; None if nothing is padded
        self.length = 0  # of the prompt
        self.position = 0  # tokens in the cache
        self.kept: dict[tuple[str, str], Chosen] | None = None

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

    def step(self, inputs: dict[str, Any]) -> Call:
        """The call of the next forward.

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
        return Call(
            self.instruction, valid=valid, prompt=prompt, ids=inputs.get("input_ids"), image_token=self.image_token,
            image_to_sample=self.image_to_sample, kept=self.kept,
        )  # fmt: skip
