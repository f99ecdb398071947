"""What stands in the place of methods of a model with adapters, so that routing inputs reach the adapters.

Each refers to its model by attribute, so that a copied model gets its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import GenerationMixin

from .call import token_input

if TYPE_CHECKING:
    from .context import RoutingContext

OWN_KEYWORDS = ("instruction_embeds", "image_to_sample", "prompt_mask")
PACKED_GENERATION = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class Entry:
    """Stands in the place of a model's method.

    Args:
        context: of the model with adapters.
        model: this model, or one within it.
        name: of the method.
    """

    def __init__(self, context: RoutingContext, model: nn.Module, name: str) -> None:
        self.context, self.model, self.name = context, model, name
        self.own: Callable = getattr(model, name)  # the class's, or what somebody else has put there
        self.was_replaced = name in model.__dict__

    def install(self) -> None:
        self.model.__dict__[self.name] = self

    def remove(self) -> None:
        if self.model.__dict__.get(self.name) is self:
            del self.model.__dict__[self.name]
            if self.was_replaced:
                self.model.__dict__[self.name] = self.own

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs)


class ForwardEntry(Entry):
    """`forward`, whose signature has the keywords that are ours: `Trainer` drops the columns that it does not name.

    The keywords are taken by a hook before the forward, which stays where others put a forward in this one's place.
    """

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.own)
        parameters = list(signature.parameters.values())
        rest = [parameters.pop()] if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
        ours = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in OWN_KEYWORDS]
        return signature.replace(parameters=[*parameters, *ours, *rest])


class GenerateEntry(Entry):
    """`generate`, which encodes images before its first forward, and repeats samples for beams."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`generate(..., instruction_embeds=(B, e) or (e,), image_to_sample=(images,))`; else as the model's own."""
        own = {name: kwargs.pop(name, None) for name in OWN_KEYWORDS}
        names = [name for name in inspect.signature(self.own).parameters if name not in ("args", "kwargs")]
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        if inputs.get("input_ids") is None and inputs.get("inputs") is not None:
            inputs["input_ids"] = inputs["inputs"]
        with self.context.generating(inputs, own):
            return self.own(*args, **kwargs)


class PrepareEntry(Entry):
    """`prepare_inputs_for_generation`: what it gives is the next forward of the `generate()` that runs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.own(*args, **kwargs)
        generation = self.context.here.generation
        if generation is not None:
            generation.expect(inputs)
        return inputs


class ExpandEntry(Entry):
    """`_expand_inputs_for_generation`, which repeats samples for their beams."""

    def __call__(self, expand_size: int = 1, **kwargs: Any) -> Any:
        generation = self.context.here.generation
        if generation is not None:
            tokens = token_input(kwargs) if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
            mask = kwargs.get("attention_mask")
            generation.expand(expand_size, mask, tokens.shape[1] if mask is None else mask.shape[1])
        return self.own(expand_size=expand_size, **kwargs)


class PackedEntry(Entry):
    """Continuous batching, which is refused: it packs the tokens of changing requests into one row."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, if no adapter is in use.

        Raises:
            RuntimeError: an adapter is.
        """
        if self.context.configs():
            raise RuntimeError(
                f"{self.name}() must not be used with SMoLoRA adapters: it packs the tokens of several requests into "
                "one row, and nothing tells which request's instruction and routes a token has; use generate()"
            )
        return self.own(*args, **kwargs)


def generators(model: nn.Module) -> list[nn.Module]:
    """The modules whose forwards make up a model's `generate()`: itself, or what it leaves that to (BLIP-2 does)."""
    if not isinstance(model, GenerationMixin):
        return []
    if type(model).generate is GenerationMixin.generate:
        return [model]
    return [module for module in model.modules() if isinstance(module, GenerationMixin)]


def entries(context: RoutingContext) -> list[Entry]:
    """All that a model needs."""
    model = context.model
    found: list[Entry] = [ForwardEntry(context, model, "forward")]
    if hasattr(model, "generate"):
        found.append(GenerateEntry(context, model, "generate"))
    found += [PackedEntry(context, model, name) for name in PACKED_GENERATION if hasattr(model, name)]
    for module in generators(model):
        found.append(PrepareEntry(context, module, "prepare_inputs_for_generation"))
        found.append(ExpandEntry(context, module, "_expand_inputs_for_generation"))
    return found
