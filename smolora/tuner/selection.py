"""Arguments that a forward was not given, found by the adapter's selector from features of image and text.

`fill_missing` is the only place where a forward or a `generate()` asks a `Selector`.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..config import MixtureConfig, SMoLoRAConfig, TaskConfig
from ..methods.base import Mixture
from ..methods.routers import ExpertRouters
from ..methods.selector import Selector
from .context import RoutingContext
from .features import image_dim, read_features, read_router_features
from .layer import MixtureLayer
from .samples import Samples

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
    if isinstance(config, SMoLoRAConfig) and config.computes_routes:
        _set_up_routers(model, config, adapter_name)
    device = getattr(model, "device", torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device  # of an offloaded base
    selector = mixture.selector(config, device)
    if selector is None:
        return
    if SELECTORS not in model._modules:
        model.add_module(SELECTORS, SelectorLayer())
    getattr(model, SELECTORS).add(mixture, adapter_name, selector)


def _set_up_routers(model: nn.Module, config: SMoLoRAConfig, adapter_name: str) -> None:
    """Set the sizes of what an adapter's VU routers see, and which of them is each layer's.

    Raises:
        ValueError: the model has no vision tower to see.
    """
    found = (module for module in model.modules() if isinstance(module, MixtureLayer))
    layers = [layer for layer in found if adapter_name in layer.experts]
    for row, layer in enumerate(layers):
        layer.experts[adapter_name].router_row = row
    vision, whole = image_dim(model), getattr(model, "config", None)
    if "vision" in config.router_features and "vu" in config.computed_branches and not vision:
        raise ValueError(
            f"router_features must be 'hidden' or 'layer' for a {type(model).__name__}, which has no vision tower, got "
            f"{config.router_features!r}"
        )
    config.router_sizes = {
        "layer": [layer.in_features for layer in layers],
        "vision": [vision],
        "vision+instruction": [vision + config.instruction_dim],
        "hidden": [getattr(getattr(whole, "text_config", whole), "hidden_size", 0)],
    }[config.router_features]


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
    if by_task and samples.task is None and all(isinstance(c, TaskConfig) and c.num_tasks == 1 for c in by_task):
        return samples._replace(task=torch.zeros(count or 1, dtype=torch.long))
    samples = _experts_of_tasks(context, samples)
    if context.model.training:
        return samples
    asked = [name for name in active_selectors(context) if _is_asked(context, name, samples)]
    if len(asked) > 1:
        raise ValueError(
            f"task_ids (or experts) must be given where several active adapters would choose, {asked} would"
        )
    if not asked:
        return samples
    selector, text = active_selectors(context)[asked[0]], own["instruction_embeds"]
    where: dict[str, Any] = {"image_to_sample": image_to_sample, "bounds": bounds}
    features: Any
    if isinstance(selector, ExpertRouters):
        mask, reads = own.get("prompt_mask"), selector.reads
        features = read_router_features(context, asked[0], inputs, text, count, reads=reads, prompt_mask=mask, **where)
    else:
        features = read_features(context, asked[0], inputs, text, count, **where)
    return samples.fill(Samples(**selector.choose(features)))


def _experts_of_tasks(context: RoutingContext, samples: Samples) -> Samples:
    """Return what is given of each sample, with the experts of given tasks where an adapter computes its routes.

    Raises:
        ValueError: a task is not fitted, or several active adapters compute their routes.
    """
    routers = {name: s for name, s in active_selectors(context).items() if isinstance(s, ExpertRouters)}
    if len(routers) > 1:
        raise ValueError(f"one adapter whose routers are computed can be active at a time, got {list(routers)}")
    if samples.task is None or samples.routes is not None:
        return samples
    for selector in routers.values():
        samples = samples.fill(Samples(**selector.of_tasks(samples.task)))
    return samples


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
