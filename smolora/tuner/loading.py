"""Adapter checkpoints, which are loaded completely or refused, by PEFT and by transformers' own methods."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from packaging.version import Version
from torch import Tensor, nn
from transformers.integrations import peft as integration

from ..config import MixtureConfig
from ..io.embeddings import INSTRUCTION_FILE
from ..io.tensors import read_tensors

PREFIX = "base_model.model."  # of names in a PEFT model and its checkpoints


def refused_peft() -> str | None:
    """Return why transformers' own adapter methods refuse the installed peft; None if they take it."""
    wanted, installed = integration.MIN_PEFT_VERSION, metadata.version("peft")
    if Version(installed) >= Version(wanted):
        return None
    return (
        f"add_adapter(), set_adapter(), disable_adapters() and the like of a model of transformers "
        f"{metadata.version('transformers')} need peft {wanted}, and peft {installed} is installed: put adapters into "
        "the model with peft.get_peft_model() or peft.PeftModel.from_pretrained() and use the methods of what these "
        "give, or install the versions in constraints.txt"
    )


def explain_refused_peft() -> None:
    """Make transformers' version error explain what to do, since the version that it asks for may not exist yet."""
    check = integration.check_peft_version

    def check_peft_version(min_version: str) -> None:
        reason = refused_peft()
        if reason is not None:
            raise ValueError(reason)
        check(min_version=min_version)

    integration.check_peft_version = check_peft_version


def check_names(model: nn.Module, adapter_name: str, found: Iterable[str], unknown: Iterable[str]) -> None:
    """Check that a checkpoint has all tensors of an adapter, and no others.

    Args:
        model: has the adapter.
        adapter_name: of the adapter.
        found: the checkpoint's names, with the adapter's name in them or without.
        unknown: those that the model has no place for.

    Raises:
        KeyError: tensors are missing or unknown. PEFT and transformers would warn of the former and ignore the latter.
    """
    within = _within(adapter_name)
    found = {within.sub(r".\1.", name.removeprefix(PREFIX)) for name in found}
    optional = {
        f"{name}.{entry}" for name, module in model.named_modules() for entry in getattr(module, "optional_state", ())
    }
    wanted = {name for name in model.state_dict() if within.search(name)} - optional
    wanted = {name.removeprefix(PREFIX) for name in wanted}
    missing = sorted(name for name in wanted if within.sub(r".\1.", name) not in found)
    unknown = sorted(name.removeprefix(PREFIX) for name in unknown)
    if missing or unknown:
        raise KeyError(f"adapter checkpoint: missing {missing}, unknown {unknown}")


def check_shapes(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Check the shapes of a checkpoint's tensors.

    Raises:
        ValueError: a shape differs. Transformers would raise without the tensor's name.
    """
    shapes = {
        re.sub(
            rf"\.(\w+_(?:experts|selector))\.{re.escape(adapter_name)}\.", r".\1.", name.removeprefix(PREFIX)
        ): value.shape
        for name, value in model.state_dict().items()
    }
    for name, tensor in tensors.items():
        shape = shapes.get(name.removeprefix(PREFIX))
        if shape is not None and shape.numel() and tensor.shape != shape:  # a partitioned parameter is empty
            raise ValueError(f"adapter checkpoint: {name!r} must be {tuple(shape)}, got {tuple(tensor.shape)}")


def _within(adapter_name: str) -> re.Pattern[str]:
    """Return the pattern of an adapter's name in those of its tensors, after the module that has all adapters."""
    return re.compile(rf"\.(\w+_(?:experts|selector))\.{re.escape(adapter_name)}\.")


class LoadWrapper:
    """`_load_pretrained_model`, with which transformers' `load_adapter` reads tensors.

    It refers to the model by attribute, so a copied model gets a wrapper of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, plus the instruction embeddings of a default instruction.

        Raises:
            KeyError, ValueError: a file is broken, or tensors are missing, unknown or of another shape.
        """
        name, config = list(self.model.peft_config.items())[-1]  # the adapter that was added last
        load = type(self.model)._load_pretrained_model
        if not isinstance(config, MixtureConfig):
            return load(*args, **kwargs)
        tensors = dict(kwargs.get("state_dict") or {})
        for file in kwargs.get("checkpoint_files") or ():
            tensors.update(read_tensors(file)[0])
        check_shapes(self.model, name, tensors)
        result = load(*args, **kwargs)
        check_names(self.model, name, tensors, result[0].unexpected_keys)
        folder = kwargs["load_config"].pretrained_model_name_or_path
        if getattr(config, "default_instruction", None) is not None and folder is not None and os.path.isdir(folder):
            config.load_instruction_embeddings(os.path.join(folder, INSTRUCTION_FILE))
        return result
