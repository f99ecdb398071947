"""Gradients of zero for the image adapters, where a batch has no image.

Processes that train together must run the same modules and give every parameter a gradient, but only some of their
batches have images. And one process should update parameters as several do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .context import CONTEXT, RoutingContext
from .images import blank_image, images_of
from .routing_inputs import RoutingInputs


@torch.compiler.disable
def touch_image_adapters(
    decoder: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Encode a blank image for a batch without images, and add nothing of it to the text decoder's input."""
    context: RoutingContext = getattr(decoder, CONTEXT)
    embeds, frames = kwargs.get("inputs_embeds"), context.thread.frames
    routing = frames[-1].routing if frames else None
    if routing is None or embeds is None or not torch.is_grad_enabled() or not _misses_images(context, routing):
        return None
    image = blank_image(context.model, embeds)
    routing.images = images_of(context.model, image, told=False, given=None, samples=1)
    features = context.model.get_image_features(**image)
    # what the text decoder reads, and no hidden states of the tower: under ZeRO-3 another rank's backward would not
    # gather its modules in the same order
    read = [getattr(features, "pooler_output", features), getattr(features, "deepstack_features", None)]
    nothing = sum(t[:0].sum() for t in tree_leaves(read) if isinstance(t, Tensor) and t.requires_grad)
    for layer in context.layers.values():
        if layer.takes_images:
            layer.forget_decisions(routing)
    return args, {**kwargs, "inputs_embeds": embeds + nothing.to(embeds)}


def _misses_images(context: RoutingContext, routing: RoutingInputs) -> bool:
    """Return whether an image adapter trains that a forward did not run."""
    return any(
        layer.decision(routing, name) is None and any(p.requires_grad for p in layer.experts[name].parameters())
        for layer in context.layers.values()
        if layer.takes_images and not layer.disable_adapters
        for name in layer.active_in_layer()
    )
