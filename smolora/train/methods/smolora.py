"""SMoLoRA, and the ablations of Table 4."""

from __future__ import annotations

from typing import Any, ClassVar

from peft import PeftConfig
from torch import nn

from .adapter import Adapter, adapter_section


class SMoLoRA(Adapter):
    """Separable mixture of low-rank adaptation: VU and IF experts, fused with weights alpha and beta."""

    name = "smolora"
    text = "instruction"
    fusion: ClassVar[str | None] = None  # None: as the recipe's adapter says

    def config(self, base: nn.Module) -> PeftConfig:
        return self.recipe.adapter_config(target_modules=self.targets(base), **self._changes())

    def settings(self) -> dict[str, Any]:
        return {"adapter": adapter_section(self.recipe.adapter_config(**self._changes())), "baseline": {}}

    def _changes(self) -> dict[str, str]:
        return {} if self.fusion is None else {"fusion": self.fusion}


class SMoLoRAVisual(SMoLoRA):
    """The visual-understanding experts only."""

    name = "smolora-vu"
    fusion = "vu"


class SMoLoRAInstruction(SMoLoRA):
    """The instruction-following experts only."""

    name = "smolora-if"
    fusion = "if"


class SMoLoRAMean(SMoLoRA):
    """Both branches, each with weight one half."""

    name = "smolora-mean"
    fusion = "mean"
