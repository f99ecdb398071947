"""What the forwards of one `generate()` call share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .arguments import cache_input, image_positions, token_input
from .routing_inputs import Decisions, PromptRoutes
from .samples import Samples


class GenerationState:
    """The state of one `generate()` call.

    Args:
        samples: what is given of each sample.
        image_to_sample: (images,), the sample of each image, where it is given.
        keeps_routes: whether every adapter keeps the prompt's routes while decoding.
        image_token: the id of the token that stands for a part of an image, where an adapter routes by those.

    Attributes:
        mask: (B, length), of the prompt; None if nothing is padded.
        length: of the prompt, in tokens.
        position: how many tokens the cache holds.
        prompt_routes: None before the first forward has ended.
        decisions: of the image layers, which run once, and of the last step.
    """

    def __init__(
        self, samples: Samples, image_to_sample: Tensor | None, keeps_routes: bool, image_token: int | None = None
    ) -> None:
        self.samples = samples
        self.image_token = image_token
        self.image_to_sample = image_to_sample
        self.keeps_routes = keeps_routes
        self.mask: Tensor | None = None
        self.length = 0
        self.position = 0
        self.prompt_routes: PromptRoutes | None = None
        self.decisions = Decisions()
        self._next: Tensor | None = None

    def expect(self, inputs: dict[str, Any]) -> None:
        """Take the inputs of the next step. A thread may run other forwards meanwhile, which are not of this call."""
        self._next = token_input(inputs)

    def claims(self, tokens: Tensor | None) -> bool:
        """Return whether the forward of these tokens is the expected step."""
        if tokens is None or tokens is not self._next:
            return False
        self._next = None
        return True

    def expand(self, copies: int, mask: Tensor | None, length: int) -> None:
        """Take the prompt's mask, and repeat each sample for its beams, as `generate()` repeats its inputs."""
        self.mask, self.length = mask, length
        if copies == 1:
            return
        if mask is not None:
            self.mask = mask.repeat_interleave(copies, 0)
        self.samples = self.samples.repeat(copies)
        if self.image_to_sample is not None:
            self.image_to_sample = self.image_to_sample.repeat_interleave(copies, 0) * copies

    def step(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the next step's `RoutingInputs`, without its images.

        Raises:
            ValueError: it is the first step, and has only a part of the prompt.
        """
        tokens = token_input(inputs)
        rows, count = tokens.shape[:2]
        cache = cache_input(inputs)
        start = 0
        if cache is not None:
            start = self.position if self.prompt_routes is not None else int(cache.get_seq_length())
            self.position = start + count
        if self.prompt_routes is None and not start and count < self.length:
            raise ValueError(
                "prefill_chunk_size must be left out with SMoLoRA adapters, which route a prompt as a whole: the first "
                f"forward has {count} of its {self.length} tokens"
            )
        if self.prompt_routes is None and start:  # it continues the caller's cache: the new tokens are the prompt
            self.length = max(self.length, start + count)
        prompt = valid = None
        routes = self.prompt_routes is None or not self.keeps_routes
        if routes and start + count > self.length:
            position = torch.arange(start, start + count, device=tokens.device)
            prompt = (position < self.length).expand(rows, count)
        if routes and self.mask is not None:
            valid = nn.functional.pad(self.mask.bool(), (0, max(0, start + count - self.mask.shape[1])), value=True)
            valid = valid[:, start : start + count].to(tokens.device)
        return {
            "samples": self.samples,
            "valid": valid,
            "prompt": prompt,
            "image_tokens": image_positions(inputs, self.image_token) if routes else None,
            "shape": (rows, count),
            "prompt_routes": self.prompt_routes,
            "decisions": self.decisions,
        }
