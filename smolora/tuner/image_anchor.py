"""Gradients of zero for the image adapters, where a batch has no image.

Processes that train together must run the same modules and give every parameter a gradient, but only some of their
batches have images. And one process should update parameters as several do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..backbones.families import family_of
from .context import CONTEXT, RoutingContext
from .images import encoder_arguments, image_rows, images_of, tiles_of
from .routing_inputs import RoutingInputs

BLANK_ARGUMENTS = ("self", "pixel_values", "image_sizes", "image_grid_thw")  # of an encoder, which `blank_image` makes


@torch.compiler.disable
def touch_image_adapters(
    decoder: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Encode a blank image for a batch without images, and add nothing of it to the text decoder's input."""
    context: RoutingContext = getattr(decoder, CONTEXT)
    frames = context.thread.frames
    routing = frames[-1].routing if frames else None
    if routing is None or not torch.is_grad_enabled() or not _misses_images(context, routing):
        return None
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        embeds = decoder.get_input_embeddings()(kwargs["input_ids"])
        kwargs = {**kwargs, "input_ids": None}
    image = blank_image(context.model, embeds)
    routing.images = images_of(context.model, image, told=False, given=None, samples=1)
    features = encode_blank(context.model, image)
    nothing = sum(t[:0].sum() for t in tree_leaves(features) if isinstance(t, Tensor) and t.requires_grad)
    for layer in context.layers.values():
        if layer.takes_images:
            layer.forget_decisions(routing)
    kwargs = {**kwargs, "inputs_embeds": embeds + nothing.to(embeds)}
    if image_rows(context.model) == "samples":  # layers of the decoder that run only where there are images
        rows, count, hidden = embeds.shape
        kwargs["cross_attention_states"] = embeds.new_zeros((rows, 1, hidden)) + nothing.to(embeds)
        kwargs["cross_attention_mask"] = embeds.new_zeros((rows, 1, count, 1))
        kwargs["full_text_row_masked_out_mask"] = embeds.new_zeros((rows, 1, count, 1))
    return args, kwargs


def _misses_images(context: RoutingContext, routing: RoutingInputs) -> bool:
    """Return whether an image adapter trains that a forward did not run."""
    return any(
        layer.decision(routing, name) is None and any(p.requires_grad for p in layer.experts[name].parameters())
        for layer in context.layers.values()
        if layer.takes_images and not layer.disable_adapters
        for name in layer.active_in_layer()
    )


def takes_blank_image(model: nn.Module) -> bool:
    """Return whether `blank_image` knows the images that a model takes."""
    if family_of(model.config) is not None:
        return True
    required = (
        name for name, p in encoder_arguments(model).items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD
    )
    return set(required) <= set(BLANK_ARGUMENTS) and hasattr(model.config.vision_config, "image_size")


def blank_image(model: Any, like: Tensor) -> dict[str, Any]:
    """Return the arguments of `encode_blank` for one small blank image, in like's dtype and on its device."""
    config, vision, rows = model.config, model.config.vision_config, image_rows(model)
    if rows == "grid":
        merge, channels = vision.spatial_merge_size, getattr(vision, "in_channels", 3)
        patch = channels * vision.temporal_patch_size * vision.patch_size**2
        grid = torch.tensor([[1, merge, merge]], device=like.device)
        return {"pixel_values": like.new_zeros((merge**2, patch)), "image_grid_thw": grid}
    side = vision.image_size
    if rows == "sizes":
        side = 2 * vision.patch_size * getattr(config, "spatial_merge_size", 1)  # Mistral 3 fails on a single token
    height, width = side if isinstance(side, list | tuple) else (side, side)
    shape = (getattr(vision, "num_channels", 3), height, width)
    if rows == "padded":
        return {"pixel_values": like.new_ones((1, 1, *shape))}  # zeros are padding
    if rows == "samples":
        tiles = torch.arange(vision.max_num_tiles, device=like.device)
        return {
            "pixel_values": like.new_zeros((1, 1, len(tiles), *shape)),
            "aspect_ratio_ids": torch.ones_like(tiles)[None, :1],
            "aspect_ratio_mask": (tiles == 0).long()[None, None],
        }
    size = torch.tensor([[height, width]])
    if rows == "tiles":
        (tiles,) = tiles_of(config, size, None)
        shape = (tiles, *shape)
    inputs = {"pixel_values": like.new_zeros((1, *shape))}
    if rows in ("sizes", "tiles"):
        inputs["image_sizes"] = size.to(like.device)
    return inputs


def encode_blank(model: Any, image: dict[str, Any]) -> Any:
    """Return what the text decoder reads of a blank image.

    It is no hidden state of the tower: under ZeRO-3 another rank's backward would not gather its modules in the same
    order.
    """
    inner, rows = getattr(model, "model", model), image_rows(model)
    if rows == "samples":
        return inner.multi_modal_projector(inner.vision_model(**image).last_hidden_state)
    if rows == "flat":  # older transformers' get_image_features wants an argument that it does not use
        return inner.multi_modal_projector(inner.vision_model(**image).last_hidden_state.flatten(0, -2))
    features = model.get_image_features(**image)
    return [getattr(features, "pooler_output", features), getattr(features, "deepstack_features", None)]
