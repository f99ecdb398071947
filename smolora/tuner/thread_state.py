"""What each thread runs of a model."""

from __future__ import annotations

import threading
import weakref
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import Mixed
from .generation_state import GenerationState
from .routing_inputs import RoutingInputs


class Frame:
    """One forward, or the part of a `generate()` that is in no forward.

    Attributes:
        backward_pass: the id of the backward pass that it runs in; -1 for none.
        routing: what its layers route by; None if no adapter is in use.
        generation: the `generate()` that it is a step of.
        is_inner: whether it is the forward of a module within the model, whose forward is the frame before it.
        outer: what compiled layers read before it.
    """

    def __init__(self, outer: RoutingInputs | None) -> None:
        self.backward_pass = torch._C._current_graph_task_id()
        self.routing: RoutingInputs | None = None
        self.generation: GenerationState | None = None
        self.is_inner = False
        self.outer = outer


class InputsKey(NamedTuple):
    """What the output of an adapted layer depends on."""

    tensors: tuple[Tensor, ...]  # x and the parameters
    versions: tuple[int, ...]  # of the tensors; writing in place raises them
    others: tuple[Any, ...]  # compared by equality

    def same(self, other: InputsKey | None) -> bool:
        """Return whether the output would be the same."""
        return (
            other is not None
            and self.versions == other.versions
            and self.others == other.others
            and all(map(is_, self.tensors, other.tensors))
        )


class Prefetched(NamedTuple):
    """The output of a layer that has not been called yet; see `decode_fusion`."""

    key: InputsKey
    result: Mixed


class ThreadState(threading.local):
    """The forwards and `generate()` calls that one thread runs.

    Attributes:
        frames: the forwards, innermost last.
        generations: the `generate()` calls, innermost last; None for one without adapters.
        routing: of the innermost forward, or of the autograd node that this thread runs. Compiled layers read it.
        interrupted: the `routing` before each of the autograd nodes that this thread runs.
        restored: what the last backward hook on this thread restored since its last forward: the sequence number of
            the next autograd node, and the routing inputs.
        prefetched: what the layer that was called last has computed for the next one.
    """

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.generations: list[GenerationState | None] = []
        self.routing: RoutingInputs | None = None
        self.interrupted: list[RoutingInputs | None] = []
        self.restored: tuple[int, weakref.ref[RoutingInputs]] | None = None
        self.prefetched: Prefetched | None = None

    @property
    def generation(self) -> GenerationState | None:
        """The innermost `generate()`."""
        return self.generations[-1] if self.generations else None

    def enter_forward(self) -> Frame:
        """Push a frame, which routes by nothing yet."""
        if not self.frames and torch._C._current_graph_task_id() == -1:  # a failed backward restores nothing
            self.routing = None
            self.interrupted.clear()
        frame = Frame(self.routing)
        self.frames.append(frame)
        self.routing = self.restored = None
        return frame

    def route_by(self, routing: RoutingInputs | None) -> None:
        """Set what the innermost forward routes by."""
        self.frames[-1].routing = self.routing = routing

    def leave_forward(self) -> Frame:
        """Pop the innermost frame."""
        frame = self.frames.pop()
        self.routing, self.prefetched = frame.outer, None
        return frame

    def enter_node(self, routing: RoutingInputs) -> None:
        """Have compiled layers route by these inputs while an autograd node runs."""
        self.interrupted.append(self.routing)
        self.routing = routing

    def leave_node(self) -> None:
        """Undo `enter_node`."""
        self.routing = self.interrupted.pop()
