"""Features of a forward's samples, by which selectors choose: always of the frozen base, without adapters.

This is the only place where they are gathered.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.families import family_of
from ..config import MixtureConfig
from ..methods.routers import RouterFeatures
from ..methods.selector import Features
from .arguments import CACHE_NAMES, read_masks, token_input
from .context import RoutingContext
from .images import Images, encoder_arguments, images_of
from .routing_inputs import RoutingInputs
from .samples import Samples, check_text

ENCODER_ARGUMENTS = (  # of a forward, that some model's `get_image_features` takes
    "pixel_values",
    "image_sizes",
    "image_grid_thw",
    "batch_num_images",
    "pixel_attention_mask",
    "qformer_input_ids",
    "qformer_attention_mask",
)


def image_dim(model: Any) -> int:
    """Return the size of a model's image features; 0 for a text model."""
    config = getattr(model, "config", None)
    vision, family = getattr(config, "vision_config", None), family_of(config)
    return 0 if vision is None else int(getattr(vision, "hidden_size" if family is None else family.tower_size))


@torch.no_grad()
def read_features(
    context: RoutingContext,
    adapter: str,
    inputs: dict[str, Any],
    text: Any,
    count: int | None,
    *,
    image_to_sample: Tensor | None = None,
    bounds: Tensor | None = None,
) -> Features:
    """Return the features of a forward's samples.

    Args:
        adapter: the one whose selector they are for.
        text: the embeddings of the samples' questions, `instruction_embeds`.
        inputs, count, image_to_sample, bounds: as for `fill_missing`.

    Raises:
        TypeError, ValueError: an argument does not fit, or there are neither images nor texts.
    """
    if text is not None:
        check_text(text, context.active()[adapter].instruction_dim, count, packed=bounds is not None)
        text = text.expand(count or 1, -1) if text.dim() == 1 else text
    image = None
    if inputs.get("pixel_values") is not None:
        images = images_of(
            context.model,
            inputs,
            count != 1,
            image_to_sample,
            ids=inputs.get("input_ids"),
            token=context.image_token,
            samples=count,
            cu_seqlens=bounds,
        )
        pooled = _pooled(*tower_output(context, inputs), images)
        owners = images.owners(pooled.shape[0]).to(pooled.device)
        rows = 1 + int(owners.max()) if count is None else count
        image = pooled.new_zeros((rows, pooled.shape[1])).index_add_(0, owners, nn.functional.normalize(pooled))
        image = nn.functional.normalize(image)
    if image is None and text is None:
        raise ValueError(
            "instruction_embeds or pixel_values must be given, by which the adapter finds the task_ids or experts that "
            "the call lacks, got neither"
        )
    return Features(image, text)


def tower_output(context: RoutingContext, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """Return last hidden states and pooled output of the vision tower for a forward's images, without adapters.

    Raises:
        ValueError: as for `run_tower`.
    """
    with without_adapters(context):
        return run_tower(context.model, inputs)


def vision_tower(model: Any) -> nn.Module | None:
    """Return the module whose output `run_tower` returns; None where there is none, or it cannot be told."""
    tower = model.get_encoder("image")
    return None if tower is model or not hasattr(model, "get_image_features") else tower


def run_tower(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """Return last hidden states and pooled output of a model's vision tower for a forward's images.

    The model's own `get_image_features` calls the tower, since families differ in how.

    Raises:
        ValueError: the model has no vision tower that can be told.
    """
    tower = vision_tower(model)
    untold = ValueError(
        f"task_ids (or experts) must be given to a {type(model).__name__}: they would be found by the output of its "
        "vision tower, which cannot be told"
    )
    if tower is None:
        raise untold
    outputs: list[Any] = []
    caller = threading.get_ident()

    def record(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == caller:
            found = (getattr(output, name, None) for name in ("last_hidden_state", "pooler_output"))
            outputs.append(tuple(found))  # now: the model may put its projector's output in the pooled one's place

    given = {name: inputs[name] for name in ENCODER_ARGUMENTS if inputs.get(name) is not None}
    strategy = encoder_arguments(model).get("vision_feature_select_strategy")
    if strategy is not None and strategy.default is strategy.empty:  # older transformers' Llama 4, which ignores it
        given[strategy.name] = "full"
    handle = tower.register_forward_hook(record)
    try:
        model.get_image_features(**given)
    finally:
        handle.remove()
    if len(outputs) != 1 or outputs[0][0] is None:
        raise untold
    return outputs[0]


def _pooled(hidden: Tensor, pooled: Any, images: Images) -> Tensor:
    """Return the features of each image (or tile), float32 (rows, e): the tower's pooled output, or the mean."""
    if images.packed is None and isinstance(pooled, Tensor) and pooled.shape == (hidden.shape[0], hidden.shape[-1]):
        return pooled.float()
    rows, bounds = images.arrange(hidden)
    if bounds is None:
        return rows.float().mean(1)
    lengths = bounds.diff().to(rows.device)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=rows.device), lengths)
    total = rows.new_zeros((len(lengths), rows.shape[-1]), dtype=torch.float32).index_add_(0, owner, rows[0].float())
    return total / lengths[:, None]


# ---- what computed routers see


@torch.no_grad()
def read_router_features(
    context: RoutingContext,
    adapter: str,
    inputs: dict[str, Any],
    text: Any,
    count: int | None,
    *,
    reads: set[str],
    prompt_mask: Any = None,
    image_to_sample: Tensor | None = None,
    bounds: Tensor | None = None,
) -> RouterFeatures:
    """Return the features of a forward's samples that an adapter's computed routers read.

    Args:
        adapter: the one whose routers they are for.
        inputs, count, image_to_sample, bounds: as for `fill_missing`.
        text: the embeddings of the samples' instructions, `instruction_embeds`.
        reads: fields of `RouterFeatures`.
        prompt_mask: of the forward.

    Raises:
        TypeError, ValueError: an argument does not fit, or a feature cannot be had.
    """
    config: Any = context.active()[adapter]
    found: dict[str, Any] = {}
    if "text" in reads:
        text = config.default_embedding() if text is None else text
        if text is None:
            raise ValueError(
                "instruction_embeds must be given, by which the adapter's computed routers find experts, got None"
            )
    if reads & {"text", "image"}:
        both = None
        if ("image" in reads and inputs.get("pixel_values") is not None) or "text" in reads:
            own = inputs if "image" in reads else {}
            own_text = text if "text" in reads else None
            both = read_features(context, adapter, own, own_text, count, image_to_sample=image_to_sample, bounds=bounds)
        rows = count or 1 if both is None or both.text is None else len(both.text)
        image = None if both is None else both.image
        if "image" in reads and image is None:
            image = torch.zeros((rows, image_dim(context.model)))
        found |= {"image": image, "text": None if both is None else both.text}
    if reads & {"hidden", "layers"}:
        if bounds is not None:
            raise ValueError(
                f"router_features must not be {config.router_features!r} where several samples are packed in a row and "
                "no task_ids are given"
            )
        found |= _run_base(context, adapter, inputs, reads, prompt_mask, image_to_sample)
    return RouterFeatures(**{name: found[name] for name in reads})


def _run_base(
    context: RoutingContext,
    adapter: str,
    inputs: dict[str, Any],
    reads: set[str],
    prompt_mask: Any,
    image_to_sample: Tensor | None,
) -> dict[str, Any]:
    """Run the base without adapters; return the means over the routed tokens, `hidden` and `layers`."""
    tokens = token_input(inputs)
    if tokens is None:
        raise ValueError(
            "input_ids or inputs_embeds must be given: the adapter's computed routers read the base's hidden states, "
            "got neither"
        )
    rows = tokens.shape[0]
    mask = _routed(context.active()[adapter], inputs, prompt_mask, tokens)
    base = getattr(context.model, "base_model", context.model)  # without the language model's head
    names = set(inspect.signature(base.forward).parameters) - {*CACHE_NAMES, "labels", "use_cache", "return_dict"}
    given = {name: value for name, value in inputs.items() if name in names and value is not None}
    layers = [layer for layer in context.layers.values() if adapter in layer.experts]
    images = Images()
    if any(layer.takes_images for layer in layers) and inputs.get("pixel_values") is not None:
        ids, token = inputs.get("input_ids"), context.image_token
        images = images_of(context.model, inputs, rows != 1, image_to_sample, ids=ids, token=token, samples=rows)
    means: dict[int, Tensor] = {}
    caller = threading.get_ident()

    def record(layer: Any, args: Any) -> None:
        if threading.get_ident() == caller:
            means[id(layer)] = _image_mean(args[0], images, rows) if layer.takes_images else _mean(args[0], mask)

    handles = [layer.register_forward_pre_hook(record) for layer in layers] if "layers" in reads else []
    try:
        with without_adapters(context):
            output = base.forward(**given, use_cache=False, return_dict=True)
    finally:
        for handle in handles:
            handle.remove()
    of_layers = [means.get(id(layer), tokens.new_zeros((rows, layer.in_features)).float()) for layer in layers]
    return {"hidden": _mean(output.last_hidden_state, mask), "layers": of_layers}


def _routed(config: MixtureConfig, inputs: dict[str, Any], prompt_mask: Any, tokens: Tensor) -> Tensor:
    """Return the tokens (B, S) that an adapter routes by, of a model that answers or is fitted."""
    shape = (tokens.shape[0], tokens.shape[1])
    prompted = config.route_over == "prompt"
    found: dict[str, Any] = read_masks(inputs, prompt_mask, shape, prompted=prompted, training=False)
    masks = RoutingInputs(Samples(), **found)
    mask = {"all": None, "valid": masks.valid, "prompt": masks.prompt}[config.route_over]
    return torch.ones(shape, dtype=torch.bool, device=tokens.device) if mask is None else mask.to(tokens.device)


@contextmanager
def without_adapters(context: RoutingContext) -> Iterator[None]:
    """Run modules of the model on this thread without adapters."""
    thread = context.thread
    thread.enter_forward()
    thread.route_by(RoutingInputs(Samples(), is_off=True))
    try:
        yield
    finally:
        thread.leave_forward()


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean (B, d) of x (B, S, d) or (B S, d) over the tokens of a mask (B, S), in float32."""
    rows = x.reshape(*mask.shape, x.shape[-1]).float()
    mask = mask.to(x.device)
    total = rows.masked_fill(~mask[..., None], 0).sum(1)
    return total / mask.sum(1, keepdim=True).clamp(min=1)


def _image_mean(x: Tensor, images: Images, samples: int) -> Tensor:
    """Return the mean (B, d) over the images of each sample; zeros for a sample without an image."""
    rows, bounds = images.arrange(x)
    if bounds is not None:
        raise ValueError(
            "router_features must not be 'layer' where images have patches of different numbers and a layer with an "
            "adapter sees them"
        )
    owners = images.owners(rows.shape[0]).to(rows.device)
    total = rows.new_zeros((samples, rows.shape[-1]), dtype=torch.float32).index_add_(0, owners, rows.float().mean(1))
    return total / torch.bincount(owners, minlength=samples).clamp(min=1)[:, None]
