"""Methods of continual tuning, behind the interface of `Method`."""

from __future__ import annotations

from ...recipe.messages import not_one_of
from .base import Method, Stage
from .lora import DirLoRA, Multitask, SeqLoRA
from .moelora import MoELoRA
from .smolora import SMoLoRA, SMoLoRAInstruction, SMoLoRAMean, SMoLoRAVisual
from .zeroshot import ZeroShot

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        SMoLoRA,
        SMoLoRAVisual,
        SMoLoRAInstruction,
        SMoLoRAMean,
        SeqLoRA,
        DirLoRA,
        MoELoRA,
        Multitask,
        ZeroShot,
    )
}

__all__ = ["METHODS", "Method", "Stage", "find_method"]


def find_method(name: str) -> type[Method]:
    """Find a method by name.

    Raises:
        ValueError: there is none. The message has the nearest name and all of them.
    """
    if name not in METHODS:
        raise ValueError(not_one_of("method", name, METHODS))
    return METHODS[name]
