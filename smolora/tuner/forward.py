"""The hooks around a model's forward: they make its routing inputs, and keep its routes."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch
from torch import nn
from transformers.utils import TransformersKwargs

from ..config import MixtureConfig
from ..routing import TopK
from .arguments import (
    CACHE_NAMES,
    OWN_KEYWORDS,
    cache_input,
    cache_output,
    check_image_to_sample,
    image_positions,
    read_masks,
    token_input,
)
from .context import CONTEXT, RoutingContext
from .images import Images, images_of
from .packing import boundaries
from .peft_forward import CARRIED
from .routing_inputs import PromptRoutes, RoutingInputs
from .samples import Samples, read_samples
from .selection import fill_missing
from .wrapper import Wrapper

REPLICA = (
    "SMoLoRA adapters do not run in replicas of torch.nn.DataParallel, which would share one model's routes: start one "
    "process a GPU, with torchrun or accelerate launch"
)


class ForwardWrapper(Wrapper):
    """`forward` with our keywords in its signature: `Trainer` drops the columns that a signature does not name.

    `before_forward` takes the keywords, since it stays where others replace the forward.
    """

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.own)
        parameters = list(signature.parameters.values())
        rest = [parameters.pop()] if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
        ours = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in OWN_KEYWORDS]
        return signature.replace(parameters=[*parameters, *ours, *rest])


@torch.compiler.disable
def before_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Take our keywords before the model's own forward sees them.

    Raises:
        TypeError: an unknown keyword is close to one of ours.
    """
    context: RoutingContext = getattr(module, CONTEXT)
    context.thread.enter_forward()  # before anything can raise: `after_forward` always leaves it
    if CARRIED in kwargs:
        kwargs = {**kwargs, "task_ids": kwargs[CARRIED]}
        del kwargs[CARRIED]
    own = {name: kwargs.get(name) for name in OWN_KEYWORDS}
    kwargs = {name: value for name, value in kwargs.items() if name not in OWN_KEYWORDS}
    for name, known in (CACHE_NAMES, CACHE_NAMES[::-1]):  # transformers takes one, and warns of the other or ignores it
        if name in kwargs and known not in kwargs and known in context.forward_names:
            kwargs[known] = kwargs.pop(name)
    for name in kwargs:
        if name not in context.forward_names and name not in TransformersKwargs.__optional_keys__:
            close = difflib.get_close_matches(name, OWN_KEYWORDS, 1, 0.7)
            if close:
                raise TypeError(f"forward got an unexpected keyword {name!r}: did you mean {close[0]!r}?")
    _start(context, module, {**dict(zip(context.forward_names, args, strict=False)), **kwargs}, own)
    return args, kwargs


def _start(context: RoutingContext, module: nn.Module, inputs: dict[str, Any], own: dict[str, Any]) -> None:
    """Set what the forward that this thread has just entered routes by.

    Args:
        inputs: the forward's arguments by name.
        own: our keywords.
    """
    thread, generation, configs = context.thread, context.thread.generation, context.configs()
    frame = thread.frames[-1]
    if generation is not None and generation.claims(token_input(inputs)):
        if generation.prompt_routes is None:
            generation.samples.check_complete(configs)
        frame.generation = generation
        step = generation.step(inputs)
        images = read_images(context, inputs, step["samples"], generation.image_to_sample)
        thread.route_by(RoutingInputs(**step, images=images))
    elif module is not context.model:
        if getattr(module, "_is_replica", False) and configs:
            raise RuntimeError(REPLICA)
        frame.is_inner = True
        thread.route_by(context.running(thread.frames[:-1], frame.backward_pass))
    elif configs:
        thread.route_by(_read_forward(context, inputs, own, configs))


def _read_forward(
    context: RoutingContext, inputs: dict[str, Any], own: dict[str, Any], configs: list[MixtureConfig]
) -> RoutingInputs:
    """Make the routing inputs of a forward that is no step of a `generate()`."""
    tokens = token_input(inputs)
    shape = None if tokens is None else tuple(tokens.shape[:2])
    started = context.caches.find(cache_input(inputs), configs)
    bounds = None if shape is None or started is not None else boundaries(inputs, *shape)
    count = None if shape is None else shape[0] if bounds is None else bounds.shape[0] - 1
    samples = read_samples(own, configs, count, packed=bounds is not None)
    if started is not None:
        samples = samples.fill(started.samples)
    image_to_sample = check_image_to_sample(own["image_to_sample"], count)
    samples = fill_missing(
        context, samples, configs, inputs, own, count, image_to_sample=image_to_sample, bounds=bounds
    )
    samples.check_complete(configs)
    masks = {}
    over = {c.route_over for c in configs if started is None or c.decode_routing != "prompt"}
    if shape is not None and over - {"all"}:
        prompted, training = "prompt" in over, context.model.training
        masks = read_masks(inputs, own["prompt_mask"], shape, prompted=prompted, training=training)
    return RoutingInputs(
        samples,
        shape=shape,
        cu_seqlens=bounds,
        image_tokens=image_positions(inputs, seen_image_token(context, configs)),
        images=read_images(context, inputs, samples, image_to_sample, count, bounds),
        prompt_routes=None if started is None else started.prompt_routes,
        decisions=None if started is None else started.decisions,
        **masks,
    )


def seen_image_token(context: RoutingContext, configs: list[MixtureConfig]) -> int | None:
    """Return the id of the token that stands for a part of an image, where an adapter routes by those tokens."""
    return context.image_token if any(config.sees_image_tokens for config in configs) else None


def read_images(
    context: RoutingContext,
    inputs: dict[str, Any],
    given: Samples,
    image_to_sample: torch.Tensor | None,
    samples: int | None = None,
    bounds: torch.Tensor | None = None,
) -> Images:
    """Return the images of a forward, if an adapter sees any.

    Args:
        inputs: the forward's arguments by name.
        given: what is given of each sample.
        samples: how many there are; None if unknown.
        bounds: of samples that are packed in rows.
    """
    if not any(layer.takes_images and not layer.disable_adapters for layer in context.layers.values()):
        return Images()
    try:
        return images_of(
            context.model,
            inputs,
            given.differ,
            image_to_sample,
            ids=inputs.get("input_ids"),
            token=context.image_token,
            samples=samples,
            cu_seqlens=bounds,
        )
    except ValueError as error:  # raised by the first layer that gets images: the caller may have encoded them before
        return Images(error=error)


@torch.compiler.disable
def after_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Leave a forward: keep its routes for the forwards that continue it, and follow its backward."""
    context: RoutingContext = getattr(module, CONTEXT)
    frame = context.thread.leave_forward()
    routing, generation = frame.routing, frame.generation
    if output is None or frame.is_inner:  # it raised, or is no forward of the model
        return
    context.last = routing
    if routing is None:
        return
    routing.last = torch.autograd._get_sequence_nr()
    cache = None if generation is not None else cache_output(output)
    if routing.prompt_routes is None and generation is not None:
        generation.prompt_routes = _chosen_routes(context, routing)
    elif routing.prompt_routes is None and cache is not None:
        context.caches.start(cache, routing, _chosen_routes(context, routing))
    context.caches.record_length(cache)
    if torch.is_grad_enabled():
        context.follow_backward(routing, output)


def _chosen_routes(context: RoutingContext, routing: RoutingInputs) -> PromptRoutes:
    """Return what the text layers chose in a forward, of adapters that keep the prompt's routes."""
    return {
        (layer.smolora_key, name): TopK(decision[0].ids, decision[0].slot_weights)
        for layer in context.layers.values()
        if not layer.takes_images
        for name in layer.active_in_layer()
        if layer.experts[name].config.decode_routing == "prompt"
        and (decision := layer.decision(routing, name)) is not None
    }
