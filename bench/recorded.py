"""The passes one by one: with what arguments the engine calls them, and what they return, by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

RESULTS = {
    "route_shrink": ("h", "w", "ids", "slot_weights", "logits", "mean", "token_logits", "masks"),
    "fuse_expand": ("y", "scores"),
    "grad_output": ("dh", "dB", "dimportance", "dslot_weights", "dscores"),
    "grad_input": ("dx", "dA", "dtoken_router"),
}


class RecordedPasses(TorchDispatchMode):
    """The arguments of every pass that runs inside, by its name; the last, the backend, left out."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, tuple] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "smolora":
            self.arguments[func.overloadpacket.__name__] = tuple(_detached(a) for a in args[:-1])
        return func(*args, **(kwargs or {}))


def _detached(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return [_detached(each) for each in argument]
    return argument.detach() if isinstance(argument, Tensor) else argument


def named_results(name: str, results: tuple) -> dict[str, Tensor]:
    """Name the results of a pass; those that are lists have a number for each bank."""
    named = {}
    for label, value in zip(RESULTS[name], results, strict=True):
        if isinstance(value, Tensor):
            named[label] = value
        else:
            named |= {f"{label}{bank}": each for bank, each in enumerate(value)}
    return named
