"""What the adapters of a whole model route by, and how it reaches them.

A model's forward takes `instruction_embeds`, which no layer between it and the adapters knows. A hook before the
forward makes a `Call` of it, and the layers read that from the `RoutingContext` that a model and its layers share. A
call belongs to one forward: each thread has a stack of those that it runs, so that neither other threads nor a forward
within another one see it. `generate()` claims the forwards that it prepares (see `entries`), and no others.

A backward runs on other threads than its forward, and with it the recomputation of checkpointed layers. It brings the
call back itself: a hook on the forward's outputs marks the backward pass with it, and of several such calls the numbers
of the autograd nodes tell which one a layer belongs to. Where nothing tells, a layer refuses to route.
"""

from __future__ import annotations

import difflib
import inspect
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import Cache
from transformers.utils import TransformersKwargs

from ..config import MixtureConfig
from ..data.prompts import IGNORED_LABEL
from ..routing import Chosen
from .call import CACHES, Call, Generation, cache_input, checked_map, image_positions, token_input
from .entries import OWN_KEYWORDS, Entry, entries, generators
from .frames import Frame, Here
from .images import Images, blank_image, images_of
from .loading import LoadEntry
from .packing import boundaries
from .peft_forward import CARRIED
from .samples import Samples, read_samples
from .together import BESIDE

if TYPE_CHECKING:
    from .layer import MixtureLayer

CONTEXT = "_smolora_context"  # attribute of a model with adapters
FIXED_SIZE_TOWERS = ("clip_vision_model", "siglip_vision_model")  # which take any image of `image_size`


class _Started:
    """What a cache was started with, and the length that our last forward left it."""

    def __init__(self, call: Call | None = None, kept: dict[tuple[str, str], Chosen] | None = None) -> None:
        self.samples = Samples() if call is None else call.samples
        self.packed = call is not None and call.cu_seqlens is not None
        self.routed = None if call is None else call.routed
        self.kept = kept or {}
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
        here: what this thread runs.
        call: of the forward that ended last, on whatever thread; None if it used no adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, MixtureLayer] = {}
        self.call: Call | None = None
        self._forward_names = list(inspect.signature(model.forward).parameters)
        self._image_token = getattr(getattr(model, "config", None), "image_token_id", None)
        self._entries: list[Entry] = []
        self._handles: list[Any] = []
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled model starts without a call."""
        return {**self.__dict__, "call": None, "here": None, "_started": None, "_lock": None, "_alive": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.here = Here()
        self._started: weakref.WeakKeyDictionary[Any, _Started] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._alive: weakref.WeakSet[Call] = weakref.WeakSet()  # those that a backward may come back to

    # ------------------------------------------------------------------------------------------- installing, removing

    def install(self) -> None:
        """Hook the context into the model."""
        setattr(self.model, CONTEXT, self)
        self._entries = entries(self)
        for entry in self._entries:
            entry.install()
        for module in {self.model, *generators(self.model)}:
            module.__dict__.setdefault(CONTEXT, self)
            self._handles += [
                module.register_forward_pre_hook(_before_forward, with_kwargs=True),
                module.register_forward_hook(_after_forward, with_kwargs=True, always_call=True),
            ]
        if hasattr(self.model, "_load_pretrained_model"):
            self.model._load_pretrained_model = LoadEntry(self.model)

    def install_anchor(self, decoder: nn.Module) -> None:
        """Have the text decoder tie in the image adapters where a batch has no image; see `_anchor_images`."""
        if CONTEXT in decoder.__dict__ or self.model.config.vision_config.model_type not in FIXED_SIZE_TOWERS:
            return
        setattr(decoder, CONTEXT, self)
        self._handles.append(decoder.register_forward_pre_hook(_anchor_images, with_kwargs=True))

    def remove(self) -> None:
        """Undo `install` and `install_anchor`."""
        for handle in self._handles:
            handle.remove()
        for entry in self._entries:
            entry.remove()
        self.model.__dict__.pop("_load_pretrained_model", None)
        for module in self.model.modules():
            module.__dict__.pop(CONTEXT, None)

    # --------------------------------------------------------------------------------------------------------- layers

    def current(self) -> Call:
        """The call that a layer routes by.

        Raises:
            RuntimeError: no forward of the model is running in this thread, and no backward that recomputes one; or
                several may be recomputed.
        """
        if torch.compiler.is_compiling():
            call = self.here.call
        else:
            call = self._running(self.here.frames, torch._C._current_graph_task_id())
        if call is None:
            raise RuntimeError(
                "an adapted layer was called outside of its model's forward and generate(), so there is no instruction "
                "to route by (get_image_features() and inner modules cannot be called by themselves): call the model "
                "with instruction_embeds, or do it inside `with model.disable_adapter():`"
            )
        return call

    def _running(self, frames: list[Frame], graph: int) -> Call | None:
        """The call of the innermost of a thread's forwards, or that a backward pass recomputes a part of."""
        if frames and frames[-1].graph == graph:
            return frames[-1].call
        return self._recomputed(graph) if graph != -1 else None

    def _recomputed(self, graph: int) -> Call | None:
        """The call that a backward pass recomputes a part of.

        It is the one whose outputs the pass went through. Of several, the one that has the node which is evaluated
        now; and so where the pass went through none, since it began within a model. A recomputed part may recompute in
        its turn, in a pass of its own, whose nodes are newer than the outer pass.
        """
        here, number = self.here, torch._C._current_autograd_node()._sequence_nr()
        with self._lock:
            alive = list(self._alive)
        if not alive:
            return None
        passed = found = [call for call in alive if graph in call.graphs]
        if len(passed) != 1:
            found = [call for call in passed or alive if call.first <= number < call.last]
        if not found and here.restored is not None and number >= here.restored[0]:
            found = [call for call in alive if call is here.restored[1]()]
        if len(found) != 1:
            raise RuntimeError(
                "an adapted layer is recomputed in a backward pass, and nothing tells which of several forwards it "
                "belongs to: run backward() from the model's outputs, once for the forwards of each thread"
            )
        return found[0]

    def configs(self) -> list[MixtureConfig]:
        """The configurations of the adapters in use."""
        found = {}
        for layer in self.layers.values():
            if not layer.disable_adapters:
                found.update((name, layer.experts[name].config) for name in layer.active_in_layer())
        return list(found.values())

    def beside(self, layer: MixtureLayer) -> MixtureLayer | None:
        """The layer that is called right after this one with the same input."""
        name = layer.smolora_key.rpartition(".")[2]
        return self.layers.get(layer.smolora_key.removesuffix(name) + BESIDE[name]) if name in BESIDE else None

    # -------------------------------------------------------------------------------------------------------- forward

    def begin(self, module: nn.Module, inputs: dict[str, Any], own: dict[str, Any]) -> None:
        """Set the call of the forward that this thread has just entered, from its arguments by name."""
        here, generation, configs = self.here, self.here.generation, self.configs()
        frame = here.frames[-1]
        if generation is not None and generation.claims(token_input(inputs)):
            if generation.kept is None:
                generation.samples.check_complete(configs)
            frame.generation = generation
            step = generation.step(inputs)
            here.route(Call(**step, images=self._images(inputs, step["samples"], generation.image_to_sample)))
        elif module is not self.model:
            if getattr(module, "_is_replica", False) and configs:
                raise RuntimeError(REPLICA)
            frame.is_part = True
            here.route(self._running(here.frames[:-1], frame.graph))
        elif configs:
            here.route(self._call(inputs, own, configs))

    def _call(self, inputs: dict[str, Any], own: dict[str, Any], configs: list[MixtureConfig]) -> Call:
        """The call of a forward that is no step of a `generate()`."""
        tokens = token_input(inputs)
        shape = None if tokens is None else tuple(tokens.shape[:2])
        started = self._started_by(cache_input(inputs), configs)
        bounds = None if shape is None or started is not None else boundaries(inputs, *shape)
        count = None if shape is None else shape[0] if bounds is None else bounds.shape[0] - 1
        samples = read_samples(own, configs, count, packed=bounds is not None)
        if started is not None:
            samples = samples.fill(started.samples)
        samples.check_complete(configs)
        image_to_sample = checked_map(own["image_to_sample"], count)
        masks = {}
        over = {c.route_over for c in configs if started is None or c.decode_routing != "prompt"}
        if shape is not None and over - {"all"}:
            masks = self._masks(inputs, own["prompt_mask"], shape, prompted="prompt" in over)
        return Call(
            samples,
            shape=shape,
            cu_seqlens=bounds,
            image_tokens=image_positions(inputs, self._seen_token(configs)),
            images=self._images(inputs, samples, image_to_sample, count, bounds),
            kept=None if started is None else started.kept,
            routed=None if started is None else started.routed,
            **masks,
        )

    def _seen_token(self, configs: list[MixtureConfig]) -> int | None:
        """The id of the token that stands for a part of an image, where an adapter routes by those."""
        return self._image_token if any(config.sees_image_tokens for config in configs) else None

    def _images(
        self,
        inputs: dict[str, Any],
        given: Samples,
        image_to_sample: Tensor | None,
        samples: int | None = None,
        bounds: Tensor | None = None,
    ) -> Images:
        """The images of a forward, if an adapter sees any."""
        if not any(layer.takes_images and not layer.disable_adapters for layer in self.layers.values()):
            return Images()
        try:
            return images_of(
                self.model,
                inputs,
                given.differ,
                image_to_sample,
                ids=inputs.get("input_ids"),
                token=self._image_token,
                samples=samples,
                cu_seqlens=bounds,
            )
        except ValueError as error:  # for the first layer that gets images: they may have been encoded before
            return Images(error=error)

    def end(self, output: Any) -> None:
        """Close a forward: keep its routes for what continues it, and come back in its backward."""
        frame = self.here.leave()
        call, generation = frame.call, frame.generation
        if output is None or frame.is_part:  # it failed, or is no forward of the model
            return
        self.call = call
        if call is None:
            return
        call.last = torch.autograd._get_sequence_nr()
        cache = None if generation is not None else _cache_output(output)
        if call.kept is None and (generation is not None or cache is not None):
            kept = {
                (layer.smolora_key, name): Chosen(last[0].ids, last[0].slot_weights)
                for layer in self.layers.values()
                if not layer.takes_images
                for name in layer.active_in_layer()
                if layer.experts[name].config.decode_routing == "prompt"
                and (last := layer.decided(call, name)) is not None
            }
            if generation is not None:
                generation.kept = kept
            else:
                if getattr(cache, "is_compileable", False) and not torch.is_grad_enabled():
                    kept = _in_place(self._started.get(cache), kept)
                self._started[cache] = _Started(call, kept)
        if getattr(cache, "is_compileable", False) and cache in self._started:
            self._started[cache].leave(cache.get_seq_length())
        if torch.is_grad_enabled():
            found = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            for tensor in found:
                tensor.register_hook(_Restore(self, call))
            if found:
                with self._lock:
                    self._alive.add(call)
                if call.compiled:
                    self._follow_backward(call, found)

    def _follow_backward(self, call: Call, outputs: list[Tensor]) -> None:
        """Have each node of a forward's graph set the call while it runs, since compiled code cannot ask which node
        recomputes it. On a GPU one thread runs the nodes of all backward passes, in any order."""
        here = self.here

        def before(grads: tuple[Tensor, ...]) -> None:
            here.suspended.append(here.call)
            here.call = call

        def after(grad_inputs: tuple[Tensor, ...], grad_outputs: tuple[Tensor, ...]) -> None:
            here.call = here.suspended.pop()

        todo = [output.grad_fn for output in outputs]
        while todo:
            node = todo.pop()
            if node is None or hasattr(node, "variable"):  # the latter is a parameter's, which all forwards share
                continue
            if "smolora_followed" in node.metadata:  # in this walk, or after an earlier forward that this one goes on
                continue
            node.metadata["smolora_followed"] = True
            node.register_prehook(before)
            node.register_hook(after)
            todo += [child for child, _ in node.next_functions]

    def misses_images(self, call: Call) -> bool:
        """Whether an image adapter trains that a forward did not run."""
        return any(
            layer.decided(call, name) is None and any(p.requires_grad for p in layer.experts[name].parameters())
            for layer in self.layers.values()
            if layer.takes_images and not layer.disable_adapters
            for name in layer.active_in_layer()
        )

    def _started_by(self, cache: Any, configs: list[MixtureConfig]) -> _Started | None:
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
        if started is not None and started.packed:
            raise RuntimeError(
                "past_key_values was started by rows that several samples were packed in, and nothing tells which of "
                "them goes on: start a cache with one sample a row"
            )
        return started or _Started()

    def _masks(
        self, inputs: dict[str, Any], prompt_mask: Any, shape: tuple[int, int], prompted: bool
    ) -> dict[str, Tensor | None]:
        """The masks of a forward over (B, S) tokens: which are valid, and which no answer."""
        valid, labels = inputs.get("attention_mask"), inputs.get("labels")
        batch, count = shape
        if valid is not None:
            if not isinstance(valid, Tensor) or valid.dim() != 2 or valid.shape[0] != batch or valid.shape[1] < count:
                got = tuple(valid.shape) if isinstance(valid, Tensor) else type(valid).__name__
                raise ValueError(
                    f"attention_mask must be ({batch}, {count}), which tokens are no padding: the adapters route over "
                    f"those (only route_over='all' needs no mask), got {got}"
                )
            valid = valid[:, valid.shape[1] - count :].bool()
        prompt = None
        if prompted and prompt_mask is not None:
            integers = (torch.bool, torch.int32, torch.int64)
            if not isinstance(prompt_mask, Tensor) or prompt_mask.shape != shape or prompt_mask.dtype not in integers:
                got = prompt_mask
                if isinstance(got, Tensor):
                    got = f"{got.dtype} of shape {tuple(got.shape)}"
                raise ValueError(
                    f"prompt_mask must be bool ({batch}, {count}), True where a token is no answer: the adapters route "
                    f"over those (route_over='prompt'), got {got}"
                )
            prompt = prompt_mask.bool()
        elif prompted and labels is not None:
            if tuple(labels.shape) != shape:
                raise ValueError(
                    f"labels must be ({batch}, {count}), {IGNORED_LABEL} where a token is no answer: the adapters "
                    f"route over those (route_over='prompt'), got {tuple(labels.shape)}"
                )
            prompt = labels == IGNORED_LABEL
        elif prompted and self.model.training:
            raise ValueError(
                "prompt_mask must be given in training where labels are not (Trainer takes them away for "
                f"label_smoothing_factor and compute_loss_func): bool ({batch}, {count}), True where a token is no "
                "answer. The adapters route over those (route_over='prompt'), as they do when answers are generated"
            )
        if prompt is not None and valid is not None:
            prompt = prompt.to(valid.device)
        return {"valid": valid, "prompt": prompt}

    # ------------------------------------------------------------------------------------------------------- generate

    @contextmanager
    def generating(self, inputs: dict[str, Any], own: dict[str, Any]) -> Iterator[None]:
        """Run a `generate()`: no route, mask or embedding of it outlives it, and none of an earlier call gets in."""
        here, configs = self.here, self.configs()
        generation = call = None
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
            if tokens is None and isinstance(inputs.get("pixel_values"), Tensor):  # BLIP-2 writes a prompt for each
                batch = inputs["pixel_values"].shape[0]
                image_to_sample = torch.arange(batch) if image_to_sample is None else image_to_sample
            samples = read_samples(own, configs, batch)
            samples.check_complete(configs)
            image_to_sample = checked_map(image_to_sample, batch)
            keeps_routes = all(c.decode_routing == "prompt" for c in configs if "route_mask" in c.takes)
            generation = Generation(samples, image_to_sample, keeps_routes, self._seen_token(configs))
            # images may be encoded before the first forward, and before the samples are repeated for beams
            images = self._images(inputs, samples, image_to_sample, batch)
            call = Call(samples, images=images, routed=generation.routed)
        here.generations.append(generation)
        here.enter()
        here.route(call)
        try:
            yield
        finally:
            here.leave()
            here.generations.pop()


class _Restore:
    """Hook on an output of a forward: its backward, and what is recomputed in it, routes by that forward's call."""

    def __init__(self, context: RoutingContext, call: Call) -> None:
        self.context, self.call = context, call

    def __call__(self, grad: Tensor) -> None:
        here = self.context.here
        self.call.graphs.add(torch._C._current_graph_task_id())
        here.restored = (torch.autograd._get_sequence_nr(), weakref.ref(self.call))


REPLICA = (
    "SMoLoRA adapters do not run in replicas of torch.nn.DataParallel, which would share one model's routes: start one "
    "process a GPU, with torchrun or accelerate launch"
)


def _cache_output(output: Any) -> Any:
    """The cache that a forward gives; None if it gives none."""
    if isinstance(output, tuple):  # return_dict=False
        return next((part for part in output if isinstance(part, Cache)), None)
    return next((found for name in CACHES if (found := getattr(output, name, None)) is not None), None)


@torch.compiler.disable
def _before_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Take the keywords that are ours, before the model's own forward sees them.

    Raises:
        TypeError: a keyword that the model does not know is close to one of ours.
    """
    context: RoutingContext = getattr(module, CONTEXT)
    context.here.enter()  # before anything can fail: what follows a forward always leaves it
    if CARRIED in kwargs:
        kwargs = {**kwargs, "task_ids": kwargs[CARRIED]}
        del kwargs[CARRIED]
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
    context.begin(module, {**dict(zip(context._forward_names, args, strict=False)), **kwargs}, own)
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
    embeds, frames = kwargs.get("inputs_embeds"), context.here.frames
    call = frames[-1].call if frames else None
    if call is None or embeds is None or not torch.is_grad_enabled() or not context.misses_images(call):
        return None
    call.images = Images(samples=1)
    features = context.model.get_image_features(**blank_image(context.model.config, embeds))
    features = getattr(features, "pooler_output", features)
    nothing = sum(feature[:0].sum() for feature in features)
    for layer in context.layers.values():
        if layer.takes_images:
            layer.forget(call)
    return args, {**kwargs, "inputs_embeds": embeds + nothing.to(embeds)}
