"""Names of the released code's checkpoints beside ours; `methods.released` has those within a layer."""

from __future__ import annotations

from ..methods.released import SMOLORA_NAMES

PREFIX = "base_model.model.model."  # of every adapter tensor, there and in PEFT's files
LANGUAGE_MODEL = "language_model."  # between the prefix and a layer's name, in an assembled LLaVA
PROJECTOR = {"mm_projector.0": "multi_modal_projector.linear_1", "mm_projector.2": "multi_modal_projector.linear_2"}
# Entries of adapter_config.json that we cannot express otherwise, with the only value in the released adapters.
FIXED_ENTRIES = {
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
}
# A SMoLoRA layer's tensors that are no experts, as a file has them: the released name, ours.
SMOLORA_TENSORS = {f"{released}.weight": ours for ours, released in SMOLORA_NAMES.items()}


def expert_tensor(letter: str, expert: int) -> str:
    """Return the released name of an expert's A or B."""
    return f"lora_{letter}.lora{letter}.{expert}.weight"


def our_module(module: str) -> str:
    """Return the name of a released module in an assembled LLaVA."""
    return PROJECTOR.get(module) or f"{LANGUAGE_MODEL}{module}"


def released_module(module: str) -> str:
    """Return the released name of a module of an assembled LLaVA."""
    return _RELEASED_PROJECTOR.get(module) or module.removeprefix(LANGUAGE_MODEL)


_RELEASED_PROJECTOR = {ours: released for released, ours in PROJECTOR.items()}
