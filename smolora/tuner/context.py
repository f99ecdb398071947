"""What the adapters of a whole model route by, and how it reaches them.

A model's forward takes `instruction_embeds`, which no layer between it and the adapters knows. One plain object, the
`RoutingContext`, is shared by a model and its adapter layers: a hook before the model's forward fills it with a `Call`,
and the layers read that. It is neither a context variable nor a thread local, since a backward, and with it the
recomputation of checkpointed layers, runs on other threads. A call stays after its forward for that recomputation, and
the backward of its outputs brings it back, whatever other forwards came between; outside of both, a layer refuses to
route. `generate()` is entered through `GenerateEntry`, since it encodes images before its first forward.
"""

from __future__ import annotations

import difflib
import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers.utils import TransformersKwargs

from ..config import SMoLoRAConfig
from ..routing import Chosen
from .call import CACHES, MISSING, Call, Generation, cache_input, checked_map, token_input
from .loading import LoadEntry
from .together import BESIDE, Ahead

if TYPE_CHECKING:
    from .layer import SMoLoRALayer

CONTEXT = "_smolora_context"  # attribute of a model with adapters
FIXED_SIZE_TOWERS = ("clip_vision_model", "siglip_vision_model")  # which take any image of `image_size`
OWN_KEYWORDS = ("instruction_embeds", "image_to_sample")
IGNORED_LABEL = -100


class _Started:
    """What a cache was started with, the instruction and the routes, and the length that our last forward left it."""

    def __init__(self, instruction: Tensor | None, kept: dict[tuple[str, str], Chosen]) -> None:
        self.instruction = instruction
        self.kept = kept
        self._left: tuple[Tensor, int] | None = None

    def leave(self, length: Any) -> None:
        """Remember a length that is a tensor, by its version, which writing in place raises."""
        if isinstance(length, Tensor) and not length.is_inference():  # those count no versions
            self._left = length, length._version

    def goes_on(self, length: Any) -> bool:
        """Whether nobody has written the length since: no reset, so there are tokens."""
        return self._left is not None and self._left[0] is length and self._left[1] == length._version


def _in_place(before: _Started | None, kept: dict[tuple[str, str], Chosen]) -> dict[tuple[str, str], Chosen]:
    """Copies of the routes, written over those that a cache was started with before where they are like these.

    A static cache that is reset and started anew stays where it is, and a captured step that reads it goes on with the
    new prompt. So it has to find the new prompt's routes where it reads the old ones.
    """
    if kept and before is not None and before.kept.keys() == kept.keys():
        old, new = tree_leaves(before.kept), tree_leaves(kept)
        if all(a.shape == b.shape and a.is_inference() == b.is_inference() for a, b in zip(old, new, strict=True)):
            torch._foreach_copy_(old, new)
            return before.kept
    return tree_map(torch.clone, kept)


class RoutingContext:
    """Shared by a model and its adapter layers; see the module.

    Attributes:
        model: the model.
        layers: the adapter layers of the model, by key.
        call: of the forward that runs or ran last, or whose backward runs.
        generation: of the `generate()` that runs.
        ahead: what the layer that was called last has computed for the next one; see `together`.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = inspect.signature(model.forward).parameters
        self.model = model
        self.layers: dict[str, SMoLoRALayer] = {}
        self.call: Call | None = None
        self.generation: Generation | None = None
        self.ahead: Ahead | None = None
        self._forward_names = list(parameters)
        self._image_token = getattr(getattr(model, "config", None), "image_token_id", None)
        self._started: weakref.WeakKeyDictionary[Any, _Started] = weakref.WeakKeyDictionary()
        self._handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled model starts without a call."""
        return {**self.__dict__, "call": None, "generation": None, "ahead": None, "_started": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._started = weakref.WeakKeyDictionary()

    # ------------------------------------------------------------------------------------------- installing, removing

    def install(self) -> None:
        """Hook the context into the model."""
        model = self.model
        setattr(model, CONTEXT, self)
        self._handles = [
            model.register_forward_pre_hook(_before_forward, with_kwargs=True),
            model.register_forward_hook(_after_forward, with_kwargs=True, always_call=True),
        ]
        if hasattr(model, "generate"):
            model.generate = GenerateEntry(model)
        if hasattr(model, "_load_pretrained_model"):
            model._load_pretrained_model = LoadEntry(model)

    def install_anchor(self, decoder: nn.Module) -> None:
        """Have the text decoder tie in the image adapters where a batch has no image; see `_anchor_images`."""
        if CONTEXT in decoder.__dict__ or self.model.config.vision_config.model_type not in FIXED_SIZE_TOWERS:
            return
        setattr(decoder, CONTEXT, self)
        self._handles.append(decoder.register_forward_pre_hook(_anchor_images, with_kwargs=True))

    def remove(self) -> None:
        """Undo `install` and `install_anchor`."""
        model = self.model
        for handle in self._handles:
            handle.remove()
        for name in ("generate", "_load_pretrained_model"):
            model.__dict__.pop(name, None)
        for module in model.modules():
            module.__dict__.pop(CONTEXT, None)

    # --------------------------------------------------------------------------------------------------------- layers

    def current(self) -> Call:
        """The call that a layer routes by.

        Raises:
            RuntimeError: no forward of the model is running, and no backward that recomputes one.
        """
        call = self.call
        if call is None or not (torch.compiler.is_compiling() or call.active or _in_backward()):
            raise RuntimeError(
                "an adapted layer was called outside of its model's forward and generate(), so there is no instruction "
                "to route by (get_image_features() and inner modules cannot be called by themselves): call the model "
                "with instruction_embeds, or do it inside `with model.disable_adapter():`"
            )
        return call

    def configs(self) -> list[SMoLoRAConfig]:
        """The configurations of the adapters in use."""
        found = {}
        for layer in self.layers.values():
            if not layer.disable_adapters:
                found.update((name, layer.smolora_experts[name].config) for name in layer.active_in_layer())
        return list(found.values())

    def beside(self, layer: SMoLoRALayer) -> SMoLoRALayer | None:
        """The layer that is called right after this one with the same input."""
        name = layer.smolora_key.rpartition(".")[2]
        return self.layers.get(layer.smolora_key.removesuffix(name) + BESIDE[name]) if name in BESIDE else None

    # -------------------------------------------------------------------------------------------------------- forward

    def begin(self, inputs: dict[str, Any], own: dict[str, Any]) -> None:
        """Set the call of a forward, from its arguments by name."""
        if self.generation is not None and self.generation.kept is not None:
            self.call = self.generation.step(inputs)
            return
        configs = self.configs()
        if not configs:
            self.call = None
            self.forget()
            return
        if self.generation is not None:
            self._need(self.generation.instruction, configs)
            self.call = self.generation.step(inputs)
            return
        tokens = token_input(inputs)
        batch = None if tokens is None else tokens.shape[0]
        started = self._started_by(cache_input(inputs), configs)
        instruction = own["instruction_embeds"]
        if instruction is None and started is not None:
            instruction = started.instruction
        instruction = self.instruction(instruction, configs, batch)
        self._need(instruction, configs)
        image_to_sample = checked_map(own["image_to_sample"], batch)
        masks = {}
        over = {c.route_over for c in configs if started is None or c.decode_routing != "prompt"}
        if tokens is not None and over - {"all"}:
            masks = self._masks(inputs, *tokens.shape[:2], labelled="prompt" in over)
        if started is None:
            self.forget()
        self.call = Call(
            instruction, ids=inputs.get("input_ids"), image_token=self._image_token, image_to_sample=image_to_sample,
            kept=None if started is None else started.kept, **masks,
        )  # fmt: skip

    def end(self, output: Any) -> None:
        """Close the call of a forward: keep its routes for what continues it, and come back in its backward."""
        self.ahead = None
        call = self.call
        if call is None:
            return
        call.active = False
        if output is None:  # the forward failed
            return
        generation, cache = self.generation, _cache_output(output)
        if call.kept is None and (generation is not None or cache is not None):
            kept = {
                (layer.smolora_key, name): layer.smolora_experts[name].last_chosen()
                for layer in self.layers.values()
                if not layer.takes_images
                for name in layer.active_in_layer()
                if layer.smolora_experts[name].has_routed
            }
            if generation is not None:
                generation.kept = kept
            else:
                if getattr(cache, "is_compileable", False) and not torch.is_grad_enabled():
                    kept = _in_place(self._started.get(cache), kept)
                self._started[cache] = _Started(call.instruction, kept)
        if generation is None and getattr(cache, "is_compileable", False) and cache in self._started:
            self._started[cache].leave(cache.get_seq_length())
        if torch.is_grad_enabled():
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(_Restore(self, call))

    def forget(self) -> None:
        """Drop what layers have of an earlier call."""
        for layer in self.layers.values():
            layer.forget_routing()

    def misses_images(self) -> bool:
        """Whether an image adapter trains that this forward did not run."""
        return any(
            not experts.has_routed and any(p.requires_grad for p in experts.parameters())
            for layer in self.layers.values()
            if layer.takes_images and not layer.disable_adapters
            for experts in (layer.smolora_experts[name] for name in layer.active_in_layer())
        )

    def instruction(self, given: Any, configs: list[SMoLoRAConfig], batch: int | None) -> Tensor | None:
        """The instruction of a call, checked; the configured default, or None, if none is given.

        Raises:
            TypeError, ValueError: it is no embedding of these adapters, or not one for each of `batch` samples.
        """
        configs = [c for c in configs if c.fusion != "vu"]
        if given is None and len(configs) == 1:
            return configs[0].default_embedding()
        if given is None or not configs:
            return None
        if not isinstance(given, Tensor) or not given.is_floating_point():
            got = f"dtype {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"instruction_embeds must be a floating point tensor, got {got}")
        for config in configs:
            e = config.instruction_dim
            rows = "B" if batch is None else batch
            fits = given.dim() == 1 or (given.dim() == 2 and batch in (None, given.shape[0]))
            if not fits or given.shape[-1] != e:
                raise ValueError(
                    f"instruction_embeds must have shape ({rows}, {e}), one row for each sample, or ({e},) for all, "
                    f"got {tuple(given.shape)}"
                )
        return given

    @staticmethod
    def _need(instruction: Tensor | None, configs: list[SMoLoRAConfig]) -> None:
        if instruction is None and any(c.fusion != "vu" for c in configs):
            raise ValueError(MISSING)

    def _started_by(self, cache: Any, configs: list[SMoLoRAConfig]) -> _Started | None:
        """What the cache of a forward was started with; None if it is new or empty."""
        if cache is None or not hasattr(cache, "get_seq_length"):
            return None
        started, length = self._started.get(cache), cache.get_seq_length()
        if started is not None and started.goes_on(length):
            return started
        if int(length) == 0:  # of a static cache a tensor, whose value waits for the device and cannot be captured
            return None
        if started is None and any(c.decode_routing == "prompt" for c in configs):
            raise RuntimeError(
                "the cache holds tokens, and no forward of this model with these adapters started it, so there "
                "are no routes to keep (a copied cache, or one filled with the adapters disabled): go on with the "
                "cache itself, or configure decode_routing='token'"
            )
        return started or _Started(None, {})

    def _masks(self, inputs: dict[str, Any], batch: int, count: int, labelled: bool) -> dict[str, Tensor | None]:
        """The masks of a forward over (batch, count) tokens: which are valid, and which no answer."""
        valid, labels = inputs.get("attention_mask"), inputs.get("labels")
        if valid is not None:
            if not isinstance(valid, Tensor) or valid.dim() != 2 or valid.shape[0] != batch or valid.shape[1] < count:
                got = tuple(valid.shape) if isinstance(valid, Tensor) else type(valid).__name__
                raise ValueError(
                    f"attention_mask must be ({batch}, {count}), which tokens are no padding: the adapters route over "
                    f"those (only route_over='all' needs no mask), got {got}"
                )
            valid = valid[:, valid.shape[1] - count :].bool()
        prompt = None
        if labels is not None and labelled:
            if tuple(labels.shape) != (batch, count):
                raise ValueError(
                    f"labels must be ({batch}, {count}), {IGNORED_LABEL} where a token is no answer: the adapters "
                    f"route over those (route_over='prompt'), got {tuple(labels.shape)}"
                )
            prompt = labels == IGNORED_LABEL
        return {"valid": valid, "prompt": prompt}

    # ------------------------------------------------------------------------------------------------------- generate

    @contextmanager
    def generating(self, inputs: dict[str, Any], own: dict[str, Any]) -> Iterator[None]:
        """Run a `generate()`: no route, mask or embedding of it outlives it, and none of an earlier call gets in."""
        configs = self.configs()
        if not configs:
            yield
            return
        tokens = token_input(inputs)
        batch = None if tokens is None else tokens.shape[0]
        instruction = self.instruction(own["instruction_embeds"], configs, batch)
        image_to_sample = checked_map(own["image_to_sample"], batch)
        self.forget()
        keeps_routes = all(c.decode_routing == "prompt" for c in configs)
        self.generation = generation = Generation(instruction, image_to_sample, self._image_token, keeps_routes)
        # images may be encoded before the first forward, and before the samples are repeated for beams
        self.call = Call(
            instruction, ids=inputs.get("input_ids"), image_token=self._image_token, image_to_sample=image_to_sample
        )  # fmt: skip
        expand = self.model._expand_inputs_for_generation

        def expand_inputs(expand_size: int = 1, **kwargs: Any) -> Any:
            tokens = token_input(kwargs) if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
            mask = kwargs.get("attention_mask")
            generation.expand(expand_size, mask, tokens.shape[1] if mask is None else mask.shape[1])
            return expand(expand_size=expand_size, **kwargs)

        self.model.__dict__["_expand_inputs_for_generation"] = expand_inputs
        try:
            yield
        finally:
            del self.model.__dict__["_expand_inputs_for_generation"]
            self.generation = None
            self.call.active = False


class _Restore:
    """Hook on an output of a forward: its backward, and what is recomputed in it, routes by that forward's call."""

    def __init__(self, context: RoutingContext, call: Call) -> None:
        self.context, self.call = context, call

    def __call__(self, grad: Tensor) -> None:
        self.context.call = self.call


class GenerateEntry:
    """`generate` of a model with adapters. It refers to the model by attribute, so that a copied model gets its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`generate(..., instruction_embeds=(B, e) or (e,), image_to_sample=(images,))`; else as the model's own."""
        model = self.model
        own = {name: kwargs.pop(name, None) for name in OWN_KEYWORDS}
        inputs = dict(kwargs)
        if inputs.get("input_ids") is None:
            inputs["input_ids"] = args[0] if args else kwargs.get("inputs")
        with getattr(model, CONTEXT).generating(inputs, own):
            return type(model).generate(model, *args, **kwargs)


def _cache_output(output: Any) -> Any:
    """The cache that a forward gives; None if it gives none."""
    return next((found for name in CACHES if (found := getattr(output, name, None)) is not None), None)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@torch.compiler.disable
def _before_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Take the keywords that are ours, before the model's own forward sees them.

    Raises:
        TypeError: a keyword that the model does not know is close to one of ours.
    """
    context: RoutingContext = getattr(module, CONTEXT)
    own = {name: kwargs.get(name) for name in OWN_KEYWORDS}
    kwargs = {name: value for name, value in kwargs.items() if name not in OWN_KEYWORDS}
    for name, known in (CACHES, CACHES[::-1]):  # transformers takes one of them, warns of the other, or ignores it
        if name in kwargs and known not in kwargs and known in context._forward_names:
            kwargs[known] = kwargs.pop(name)
    for name in kwargs:
        if name not in context._forward_names and name not in TransformersKwargs.__optional_keys__:
            close = difflib.get_close_matches(name, OWN_KEYWORDS, 1, 0.7)
            if close:
                raise TypeError(f"forward got an unexpected keyword {name!r}: did you mean {close[0]!r}?")
    context.begin({**dict(zip(context._forward_names, args, strict=False)), **kwargs}, own)
    return args, kwargs


@torch.compiler.disable
def _after_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    getattr(module, CONTEXT).end(output)


@torch.compiler.disable
def _anchor_images(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Give the image adapters a gradient of zero where a batch has no image, by encoding a blank one for nothing.

    Processes that train together all have to run the same modules and to give every parameter a gradient, and they
    differ in which batches have images; and one process should update parameters as several do.
    """
    context: RoutingContext = getattr(decoder, CONTEXT)
    embeds = kwargs.get("inputs_embeds")
    if context.call is None or embeds is None or not torch.is_grad_enabled() or not context.misses_images():
        return None
    context.call.image_to_sample = torch.zeros(1, dtype=torch.long, device=embeds.device)
    vision = context.model.config.vision_config
    blank = embeds.new_zeros((1, vision.num_channels, vision.image_size, vision.image_size))
    features = context.model.get_image_features(pixel_values=blank)
    features = getattr(features, "pooler_output", features)
    nothing = sum(feature[:0].sum() for feature in features)
    for layer in context.layers.values():
        if layer.takes_images:
            layer.forget_routing()
    return args, {**kwargs, "inputs_embeds": embeds + nothing.to(embeds)}
