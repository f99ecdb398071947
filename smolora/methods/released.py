"""State dicts of layers of released codes, where every expert is a tensor of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# a parameter's name, perhaps the adapter's, then an expert's number; the second name of an expert has `.mlp` in it
KEY = re.compile(
    r"(?P<kind>lora_\w+?)(?:\.(?!lora[AB]\.)(?!weight$)[^.]+)?"
    r"(?:\.lora(?P<letter>[AB])\.(?P<expert>\d+)(?:\.mlp)?)?\.weight"
)


def released_name(key: str) -> str:
    """Return a key without the adapter's name: `lora_A.3` of `lora_A.default.loraA.3.mlp.weight`, or the key itself."""
    match = KEY.fullmatch(key)
    if match is None or (match["letter"] is not None and not match["kind"].endswith(f"_{match['letter']}")):
        return key
    return match["kind"] if match["expert"] is None else f"{match['kind']}.{match['expert']}"


def load_released(
    targets: Mapping[str, Tensor], optional: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]
) -> None:
    """Copy a released layer's tensors into ours.

    Args:
        targets: ours by `released_name`; all must be there, in the same shape, but for a leading 1.
        optional: those of the linear layer itself, loaded if they are in.

    Raises:
        KeyError: keys are missing or unknown; all are named, and nothing is loaded.
        ValueError: a tensor has the wrong shape, or two keys of one expert differ.
    """
    places = {**targets, **optional}
    found: dict[str, Tensor] = {}
    unknown = []
    for key, value in state_dict.items():
        name = released_name(key)
        if name not in places:
            unknown.append(key)
            continue
        expected = (1, *places[name].shape) if name.startswith("lora_fc") else tuple(places[name].shape)
        if tuple(value.shape) != expected:
            raise ValueError(f"{key} must have shape {expected}, got {tuple(value.shape)}")
        if name in found and not torch.equal(found[name], value):
            raise ValueError(f"{key} differs from another key of the same tensor")
        found[name] = value
    missing = sorted(targets.keys() - found.keys())
    if missing or unknown:
        raise KeyError(f"official state dict: missing {missing}, unknown {unknown}")
    with torch.no_grad():
        for name, value in found.items():
            places[name].copy_(value.view(places[name].shape))
