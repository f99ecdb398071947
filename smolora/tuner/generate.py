"""`generate()`: its wrappers give each step the state of its call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from .arguments import OWN_KEYWORDS, check_image_to_sample, token_input
from .context import RoutingContext
from .forward import read_images, seen_image_token
from .generation_state import GenerationState
from .packing import boundaries
from .routing_inputs import RoutingInputs
from .samples import read_samples
from .selection import check_given, fill_missing
from .wrapper import Wrapper

CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class ContextWrapper(Wrapper):
    """A wrapper that knows the context of the model with adapters."""

    def __init__(self, context: RoutingContext, model: nn.Module, name: str) -> None:
        super().__init__(model, name)
        self.context = context


class GenerateWrapper(ContextWrapper):
    """`generate`, which encodes images before its first forward and repeats samples for beams."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take our keywords besides the model's own: `generate(..., instruction_embeds=(B, e) or (e,))`."""
        own = {name: kwargs.pop(name, None) for name in OWN_KEYWORDS}
        names = [name for name in inspect.signature(self.own).parameters if name not in ("args", "kwargs")]
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        if inputs.get("input_ids") is None and inputs.get("inputs") is not None:
            inputs["input_ids"] = inputs["inputs"]
        with generating(self.context, inputs, own):
            return self.own(*args, **kwargs)


class PrepareWrapper(ContextWrapper):
    """`prepare_inputs_for_generation`, whose result is the input of the next step."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.own(*args, **kwargs)
        generation = self.context.thread.generation
        if generation is not None:
            generation.expect(inputs)
        return inputs


class ExpandWrapper(ContextWrapper):
    """`_expand_inputs_for_generation`, which repeats samples for their beams."""

    def __call__(self, expand_size: int = 1, **kwargs: Any) -> Any:
        generation = self.context.thread.generation
        if generation is not None:
            tokens: Tensor = token_input(kwargs) if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
            mask = kwargs.get("attention_mask")
            generation.expand(expand_size, mask, tokens.shape[1] if mask is None else mask.shape[1])
        return self.own(expand_size=expand_size, **kwargs)


class ContinuousBatchingWrapper(ContextWrapper):
    """Continuous batching, which packs the tokens of changing requests into one row."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's own method if no adapter is in use.

        Raises:
            RuntimeError: an adapter is in use.
        """
        if self.context.configs():
            raise RuntimeError(
                f"{self.name}() must not be used with SMoLoRA adapters: it packs the tokens of several requests into "
                "one row, and nothing tells which request's instruction and routes a token has; use generate()"
            )
        return self.own(*args, **kwargs)


def generators(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose forwards a model's `generate()` runs: itself, or a module within it as in BLIP-2."""
    if not isinstance(model, GenerationMixin):
        return []
    if type(model).generate is GenerationMixin.generate:
        return [model]
    return [module for module in model.modules() if isinstance(module, GenerationMixin)]


def generate_wrappers(context: RoutingContext) -> list[Wrapper]:
    """Return the wrappers that a model's `generate()` needs."""
    model = context.model
    found: list[Wrapper] = []
    if hasattr(model, "generate"):
        found.append(GenerateWrapper(context, model, "generate"))
    found += [ContinuousBatchingWrapper(context, model, name) for name in CONTINUOUS_BATCHING if hasattr(model, name)]
    for module in generators(model):
        found.append(PrepareWrapper(context, module, "prepare_inputs_for_generation"))
        found.append(ExpandWrapper(context, module, "_expand_inputs_for_generation"))
    return found


@contextmanager
def generating(context: RoutingContext, inputs: dict[str, Any], own: dict[str, Any]) -> Iterator[None]:
    """Run a `generate()`. No route, mask or embedding outlives it, and none of an earlier call reaches it.

    Args:
        inputs: its arguments by name.
        own: our keywords.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    thread, configs = context.thread, context.configs()
    generation = routing = None
    if configs:
        if own["prompt_mask"] is not None:
            raise ValueError("prompt_mask must be left out of generate(), whose input is all prompt")
        tokens, image_to_sample = token_input(inputs), own["image_to_sample"]
        batch = None if tokens is None else tokens.shape[0]
        if tokens is not None and boundaries(inputs, *tokens.shape[:2]) is not None:
            raise ValueError(
                "generate() must be given one sample a row, but position_ids restart within a row (or "
                "cu_seq_lens_q, seq_idx or attention_mask say so)"
            )
        if tokens is None and isinstance(inputs.get("pixel_values"), Tensor):  # BLIP-2 writes a prompt for each image
            batch = inputs["pixel_values"].shape[0]
            image_to_sample = torch.arange(batch) if image_to_sample is None else image_to_sample
        samples = read_samples(own, configs, batch)
        check_given(context, samples)
        image_to_sample = check_image_to_sample(image_to_sample, batch)
        samples = fill_missing(context, samples, configs, inputs, own, batch, image_to_sample=image_to_sample)
        samples.check_complete(configs)
        keeps_routes = all(c.decode_routing == "prompt" for c in configs if "route_mask" in c.takes)
        generation = GenerationState(samples, image_to_sample, keeps_routes, seen_image_token(context, configs))
        # images may be encoded before the first forward, and before the samples are repeated for beams
        images = read_images(context, inputs, samples, image_to_sample, batch)
        routing = RoutingInputs(samples, images=images, decisions=generation.decisions)
    thread.generations.append(generation)
    thread.enter_forward()
    thread.route_by(routing)
    try:
        yield
    finally:
        thread.leave_forward()
        thread.generations.pop()
