"""How a layer finds the routing inputs of the forward that it runs in, or is recomputed for.

A model's forward takes `instruction_embeds`, which no module between it and the adapted layers knows. A hook before the
forward makes `RoutingInputs` of it (see `forward`), and the layers read those from the `RoutingContext` that a model
and its layers share. Each thread has a stack of the forwards that it runs, so other threads and nested forwards
do not see each other's inputs. `generate()` claims the forwards that it prepares (see `generate`), and no others.

Checkpointed layers are recomputed in a backward, on another thread than their forward. A hook on the forward's outputs
marks the backward passes that reach them. Where a pass reaches several forwards, the sequence numbers of the autograd
nodes tell which one a layer belongs to. If the forward cannot be determined, the layer raises.

Compiled layers cannot query any of this: they read `ThreadState.routing`, which each autograd node of a forward with
compiled layers sets while it runs.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..config import MixtureConfig
from .cache_routes import StartedCaches
from .layer import MixtureLayer
from .routing_inputs import RoutingInputs
from .thread_state import Frame, ThreadState
from .wrapper import Wrapper

CONTEXT = "_smolora_context"  # attribute of a model with adapters


class RoutingContext:
    """Shared by a model and its adapted layers; see the module.

    Attributes:
        model: the model.
        layers: the adapted layers of the model, by key.
        forward_names: the parameters of the model's own forward.
        image_token: the id of the token that stands for a part of an image; None if the model has none.
        thread: what the calling thread runs.
        last: routing inputs of the most recently finished forward, on any thread; None if it used no adapter.
        caches: the routes that each KV cache was started with.
        wrappers, handles: what `install` put into the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, MixtureLayer] = {}
        self.forward_names = list(inspect.signature(model.forward).parameters)
        self.image_token = getattr(getattr(model, "config", None), "image_token_id", None)
        self.wrappers: list[Wrapper] = []
        self.handles: list[Any] = []
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        """Drop run-time state: a copied or pickled model starts without it."""
        running = ("last", "thread", "caches", "_lock", "_alive")
        return {name: value for name, value in self.__dict__.items() if name not in running}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.last: RoutingInputs | None = None
        self.thread = ThreadState()
        self.caches = StartedCaches()
        self._lock = threading.Lock()
        self._alive: weakref.WeakSet[RoutingInputs] = weakref.WeakSet()  # which a backward may have to restore

    def active(self) -> dict[str, MixtureConfig]:
        """Return the configurations of the adapters in use, by name."""
        found = {}
        for layer in self.layers.values():
            if not layer.disable_adapters:
                found.update((name, layer.experts[name].config) for name in layer.active_in_layer())
        return found

    def configs(self) -> list[MixtureConfig]:
        """Return the configurations of the adapters in use."""
        return list(self.active().values())

    def current(self) -> RoutingInputs:
        """Return what a layer routes by.

        Raises:
            RuntimeError: this thread runs no forward of the model and no backward that recomputes one, or nothing tells
                which of several forwards is recomputed.
        """
        if torch.compiler.is_compiling():
            routing = self.thread.routing
        else:
            routing = self.running(self.thread.frames, torch._C._current_graph_task_id())
        if routing is None:
            raise RuntimeError(
                "an adapted layer was called outside of its model's forward and generate(), so there is no instruction "
                "to route by (get_image_features() and inner modules cannot be called by themselves): call the model "
                "with instruction_embeds, or do it inside `with model.disable_adapter():`"
            )
        return routing

    def running(self, frames: list[Frame], backward_pass: int) -> RoutingInputs | None:
        """Return what the innermost of a thread's forwards routes by, or what a backward pass recomputes with."""
        if frames and frames[-1].backward_pass == backward_pass:
            return frames[-1].routing
        return self._recomputed(backward_pass) if backward_pass != -1 else None

    def _recomputed(self, backward_pass: int) -> RoutingInputs | None:
        """Return what a backward pass recomputes with.

        If the pass reached the outputs of exactly one forward, that forward is meant. If it reached several, or none
        since it started inside the model, the forward that owns the autograd node being evaluated is meant. In a nested
        recomputation, whose nodes are newer than the outer pass's, the forward restored last is meant.
        """
        thread, number = self.thread, torch._C._current_autograd_node()._sequence_nr()
        with self._lock:
            alive = list(self._alive)
        if not alive:
            return None
        reached = found = [routing for routing in alive if backward_pass in routing.backward_passes]
        if len(reached) != 1:
            found = [routing for routing in reached or alive if routing.first <= number < routing.last]
        if not found and thread.restored is not None and number >= thread.restored[0]:
            found = [routing for routing in alive if routing is thread.restored[1]()]
        if len(found) != 1:
            raise RuntimeError(
                "an adapted layer is recomputed in a backward pass, and nothing tells which of several forwards it "
                "belongs to: run backward() from the model's outputs, once for the forwards of each thread"
            )
        return found[0]

    def follow_backward(self, routing: RoutingInputs, output: Any) -> None:
        """Have the backward of a forward's output restore what its layers route by."""
        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if not outputs:
            return
        for tensor in outputs:
            tensor.register_hook(_Restore(self.thread, routing))
        with self._lock:
            self._alive.add(routing)
        if routing.compiled:
            self._hook_nodes(routing, outputs)

    def _hook_nodes(self, routing: RoutingInputs, outputs: list[Tensor]) -> None:
        """Have every node of a forward's graph set the routing inputs while it runs.

        Compiled code cannot ask which node recomputes it. On a GPU one thread runs the nodes of all backward passes, in
        any order.
        """
        thread = self.thread

        def before(grad_outputs: tuple[Tensor, ...]) -> None:
            thread.enter_node(routing)

        def after(grad_inputs: tuple[Tensor, ...], grad_outputs: tuple[Tensor, ...]) -> None:
            thread.leave_node()

        todo, seen, label = [output.grad_fn for output in outputs], set(), f"smolora_hooked {id(self)}"
        while todo:
            node = todo.pop()
            if node is None or node in seen or hasattr(node, "variable"):  # AccumulateGrad nodes have `variable`
                continue
            if node._sequence_nr() < routing.first:  # made before the forward
                continue
            seen.add(node)
            todo += [child for child, _ in node.next_functions]
            if label not in node.metadata:  # otherwise it belongs to a nested forward
                node.metadata[label] = True
                node.register_prehook(before)
                node.register_hook(after)


class _Restore:
    """Hook on a forward's output: recomputation in its backward routes by that forward's inputs."""

    def __init__(self, thread: ThreadState, routing: RoutingInputs) -> None:
        self.thread, self.routing = thread, routing

    def __call__(self, grad: Tensor) -> None:
        self.routing.backward_passes.add(torch._C._current_graph_task_id())
        self.thread.restored = (torch.autograd._get_sequence_nr(), weakref.ref(self.routing))
