"""`task_ids` through PEFT's own models, whose forwards consume that keyword and drop it."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import peft
from peft import PeftModel

from ..config import MixtureConfig

CARRIED = "smolora_task_ids"  # the keyword under which PEFT's models pass `task_ids` on


def carry_task_ids(model: type[PeftModel]) -> None:
    """Make the forward of a PEFT model class pass `task_ids` on if a mixture's adapter is active."""
    own = model.forward
    if hasattr(own, "carries_task_ids"):
        return

    @functools.wraps(own)
    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("task_ids") is not None and isinstance(self.active_peft_config, MixtureConfig):
            kwargs[CARRIED] = kwargs.pop("task_ids")
        return own(self, *args, **kwargs)

    forward.carries_task_ids = True  # type: ignore[attr-defined]
    model.forward = forward


for found in vars(peft).values():
    is_model = isinstance(found, type) and issubclass(found, PeftModel) and "forward" in vars(found)
    if is_model and "task_ids" in inspect.signature(found.forward).parameters:
        carry_task_ids(found)
