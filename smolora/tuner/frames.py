"""What the threads of a process run of a model, each for itself."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

import torch

from .call import Call, Generation

if TYPE_CHECKING:
    from .together import Ahead


class Frame:
    """One forward, or the part of a `generate()` that is in none.

    Attributes:
        graph: the backward pass that it runs in; -1 for none.
        call: what it routes by; None if no adapter is in use.
        generation: the `generate()` that it is a step of.
        is_part: whether it is the forward of a module within the model, whose forward is the frame before it.
        before: what compiled layers read before it.
    """

    def __init__(self, before: Call | None) -> None:
        self.graph = torch._C._current_graph_task_id()
        self.call: Call | None = None
        self.generation: Generation | None = None
        self.is_part = False
        self.before = before


class Here(threading.local):
    """What one thread runs.

    Attributes:
        frames: the forwards, each within the one before it.
        generations: the `generate()` calls, likewise; None for one without adapters.
        call: of the innermost forward, or of the node of a backward that this thread runs: what compiled layers read.
        suspended: the calls of what such nodes interrupt.
        restored: what a backward came back to since the thread's last forward: the number of the first autograd node
            that was made after that, and the call.
        ahead: what the layer that was called last has computed for the next one; see `together`.
    """

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.generations: list[Generation | None] = []
        self.call: Call | None = None
        self.suspended: list[Call | None] = []
        self.restored: tuple[int, weakref.ref[Call]] | None = None
        self.ahead: Ahead | None = None

    @property
    def generation(self) -> Generation | None:
        """The innermost `generate()`."""
        return self.generations[-1] if self.generations else None

    def enter(self) -> Frame:
        """Begin a forward that routes by nothing yet."""
        if not self.frames and torch._C._current_graph_task_id() == -1:  # a backward that failed leaves its call
            self.call = None
            self.suspended.clear()
        frame = Frame(self.call)
        self.frames.append(frame)
        self.call = self.restored = None
        return frame

    def route(self, call: Call | None) -> None:
        """Set what the innermost forward routes by."""
        self.frames[-1].call = self.call = call

    def leave(self) -> Frame:
        """End the innermost forward."""
        frame = self.frames.pop()
        self.call, self.ahead = frame.before, None
        return frame
