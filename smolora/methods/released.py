"""State dicts of released layers, which have a tensor for each expert."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

SMOLORA_NAMES = {  # our name to the released one, of all parameters but the experts'
    "vu_router": "lora_vu_gate",
    "if_router": "lora_ins_gate",
    "vu_importance": "lora_fc_A",
    "if_importance": "lora_fc_B",
}
# parameter, optional adapter name, expert number; each expert has a second key with `.mlp` in it
KEY = re.compile(
    r"(?P<kind>lora_\w+?)(?:\.(?!lora[AB]\.)(?!weight$)[^.]+)?"
    r"(?:\.lora(?P<letter>[AB])\.(?P<expert>\d+)(?:\.mlp)?)?\.weight"
)


def released_name(key: str) -> str:
    """Shorten a key to parameter and expert: `lora_A.default.loraA.3.mlp.weight` to `lora_A.3`.

    A key of another form is returned as it is.
    """
    match = KEY.fullmatch(key)
    if match is None or (match["letter"] is not None and not match["kind"].endswith(f"_{match['letter']}")):
        return key
    return match["kind"] if match["expert"] is None else f"{match['kind']}.{match['expert']}"


def load_released(
    targets: Mapping[str, Tensor], optional: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]
) -> None:
    """Copy a released layer's tensors into ours.

    Args:
        targets: our tensors by `released_name`. All are needed, in the same shape; `lora_fc_*` has a leading 1 there.
        optional: the linear layer's own tensors by name, loaded if `state_dict` has them.
        state_dict: the released layer's.

    Raises:
        KeyError: keys are missing or unknown; the message names all of them, and nothing is loaded.
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
