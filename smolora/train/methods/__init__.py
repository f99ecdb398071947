"""Methods of continual tuning, a file each behind the interface of `Method`."""

from __future__ import annotations

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

__all__ = ["METHODS", "Method", "Stage"]
