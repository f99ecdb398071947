"""How a model is given a routing context, and how that is taken away again."""

from __future__ import annotations

from torch import nn

from .context import CONTEXT, RoutingContext
from .forward import ForwardWrapper, after_forward, before_forward
from .generate import generate_wrappers, generators
from .image_anchor import takes_blank_image, touch_image_adapters
from .loading import LoadWrapper


def install(model: nn.Module) -> RoutingContext:
    """Hook a new context into a model."""
    context = RoutingContext(model)
    setattr(model, CONTEXT, context)
    context.wrappers = [ForwardWrapper(model, "forward"), *generate_wrappers(context)]
    for wrapper in context.wrappers:
        wrapper.install()
    for module in {model, *generators(model)}:
        module.__dict__.setdefault(CONTEXT, context)
        context.handles += [
            module.register_forward_pre_hook(before_forward, with_kwargs=True),
            module.register_forward_hook(after_forward, with_kwargs=True, always_call=True),
        ]
    if hasattr(model, "_load_pretrained_model"):
        model._load_pretrained_model = LoadWrapper(model)  # type: ignore[assignment]
    return context


def install_image_anchor(context: RoutingContext, decoder: nn.Module) -> None:
    """Have the text decoder give image adapters a gradient where a batch has no image; see `touch_image_adapters`."""
    if CONTEXT in decoder.__dict__ or not takes_blank_image(context.model):
        return
    setattr(decoder, CONTEXT, context)
    context.handles.append(decoder.register_forward_pre_hook(touch_image_adapters, with_kwargs=True))


def remove(context: RoutingContext) -> None:
    """Undo `install` and `install_image_anchor`."""
    for handle in context.handles:
        handle.remove()
    for wrapper in context.wrappers:
        wrapper.remove()
    context.model.__dict__.pop("_load_pretrained_model", None)
    for module in context.model.modules():
        module.__dict__.pop(CONTEXT, None)
