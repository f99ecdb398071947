"""Arguments that a forward was not given, found by the adapter's selector from features of image and text.

`fill_missing` is the only place where a forward or a `generate()` asks a `Selector`. The image features are the pooled
output of the frozen vision tower, without adapters; the text features are the call's `instruction_embeds`.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..config import MixtureConfig
from ..methods.base import Mixture
from ..methods.selector import Features, Selector
from .context import RoutingContext
from .images import Images, images_of
from .routing_inputs import RoutingInputs
from .samples import Samples, check_text

SELECTORS = "adapter_selectors"  # attribute of a model with adapters


class SelectorLayer(nn.Module, BaseTunerLayer):
    """The selectors of a model's adapters, by method and adapter name. PEFT saves and loads them with the adapters."""

    other_param_names = ()

    def __init__(self) -> None:
        super().__init__()
        self.adapter_layer_names: tuple[str, ...] = ()

    def add(self, mixture: Mixture, adapter_name: str, selector: Selector) -> None:
        """Add the selector of an adapter."""
        name = f"{mixture.name}_selector"
        if name not in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
            self.adapter_layer_names += (name,)
        getattr(self, name)[adapter_name] = selector
        self._freeze()

    def find(self, adapter_name: str) -> Selector | None:
        """Return the selector of an adapter; None if it has none."""
        found = (getattr(self, name) for name in self.adapter_layer_names)
        return next((selectors[adapter_name] for selectors in found if adapter_name in selectors), None)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._freeze()

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Stay where it was made: there is no base layer."""

    def _freeze(self) -> None:
        """Freeze again what no loss of the model trains, after PEFT has unfrozen the whole adapter."""
        for name in self.adapter_layer_names:
            for selector in getattr(self, name).values():
                if not selector.trains:
                    selector.requires_grad_(False)


def add_selector(model: nn.Module, mixture: Mixture, config: Any, adapter_name: str) -> None:
    """Give a model the selector of a new adapter, if its method has one for its configuration."""
    if mixture.selector is None:
        return
    if getattr(config, "image_dim", 0) is None:
        config.image_dim = image_dim(model)
    device = getattr(model, "device", torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device  # of an offloaded base
    selector = mixture.selector(config, device)
    if selector is None:
        return
    if SELECTORS not in model._modules:
        model.add_module(SELECTORS, SelectorLayer())
    getattr(model, SELECTORS).add(mixture, adapter_name, selector)


def image_dim(model: Any) -> int:
    """Return the size of a model's image features; 0 for a text model."""
    vision = getattr(getattr(model, "config", None), "vision_config", None)
    # Qwen2-VL calls the size of its tower embed_dim, and hidden_size that of the text model
    return 0 if vision is None else int(getattr(vision, "embed_dim", None) or vision.hidden_size)


# ---- choice


def fill_missing(
    context: RoutingContext,
    samples: Samples,
    configs: list[MixtureConfig],
    inputs: dict[str, Any],
    own: dict[str, Any],
    count: int | None,
    *,
    image_to_sample: Tensor | None = None,
    bounds: Tensor | None = None,
) -> Samples:
    """Return what is given of each sample, with what the adapter's selector finds for a model in eval mode.

    Args:
        samples: what is given.
        configs: of the adapters in use.
        inputs: the arguments of the forward or `generate()` by name.
        own: our keywords.
        count: number of samples; None if unknown.
        image_to_sample: (images,), the sample of each image, where it is given.
        bounds: of samples that are packed in rows.

    Raises:
        TypeError, ValueError: the features do not fit, or several active adapters would choose.
    """
    by_task = [config for config in configs if config.needs("task")]
    if by_task and samples.task is None and all(config.num_tasks == 1 for config in by_task):
        return samples._replace(task=torch.zeros(count or 1, dtype=torch.long))
    if context.model.training:
        return samples
    asked = [name for name in active_selectors(context) if _is_asked(context, name, samples)]
    if len(asked) > 1:
        raise ValueError(
            f"task_ids (or experts) must be given where several active adapters would choose, {asked} would"
        )
    if not asked:
        return samples
    features = read_features(
        context, asked[0], inputs, own["instruction_embeds"], count, image_to_sample=image_to_sample, bounds=bounds
    )
    found = active_selectors(context)[asked[0]].choose(features)
    return samples.fill(Samples(**found))


def _is_asked(context: RoutingContext, name: str, samples: Samples) -> bool:
    """Return whether an adapter's selector has to find something, and can."""
    selector = active_selectors(context)[name]
    return getattr(samples, selector.finds[0]) is None and selector.is_ready


def check_given(context: RoutingContext, samples: Samples) -> None:
    """Check that an adapter has learned what the samples of a `generate()` are given.

    Raises:
        ValueError: it has not.
    """
    given = dict(samples.given())
    for selector in active_selectors(context).values():
        if selector.finds[0] in given:
            selector.check(given)


def active_selectors(context: RoutingContext) -> dict[str, Selector]:
    """Return the selectors of the adapters in use, by adapter."""
    layer = context.model._modules.get(SELECTORS)
    if not isinstance(layer, SelectorLayer):
        return {}
    found = {name: layer.find(name) for name in context.active()}
    return {name: selector for name, selector in found.items() if selector is not None}


# ---- features


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
    thread = context.thread
    thread.enter_forward()
    thread.route_by(RoutingInputs(Samples(), is_off=True))
    try:
        return run_tower(context.model, inputs)
    finally:
        thread.leave_forward()


def run_tower(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """Return last hidden states and pooled output of a model's vision tower for a forward's images.

    The model's own `get_image_features` calls the tower, since families differ in how.

    Raises:
        ValueError: the model has no vision tower that can be told.
    """
    tower = model.get_encoder("image")
    untold = ValueError(
        f"task_ids (or experts) must be given to a {type(model).__name__}: they would be found by the output of its "
        "vision tower, which cannot be told"
    )
    if tower is model or not hasattr(model, "get_image_features"):
        raise untold
    outputs: list[Any] = []
    caller = threading.get_ident()

    def record(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == caller:
            found = (getattr(output, name, None) for name in ("last_hidden_state", "pooler_output"))
            outputs.append(tuple(found))  # now: the model may put its projector's output in the pooled one's place

    names = ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images", "pixel_attention_mask")
    handle = tower.register_forward_hook(record)
    try:
        model.get_image_features(**{name: inputs[name] for name in names if inputs.get(name) is not None})
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
