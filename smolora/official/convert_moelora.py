"""Convert MoELoRA adapters of CoIN's code to PEFT adapters and back.

CoIN saves `adapter_model.bin`, a pickle that holds every expert twice, `adapter_config.json`, in which r and alpha are
those of all experts together, and `non_lora_trainables.bin` with the multimodal projector, which it trains in full.
Ours is what stock PEFT loads onto an assembled LLaVA (`assemble`): an `adapter_model.safetensors` with all experts of a
layer in one tensor, and the projector, if there is one, among `modules_to_save`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_int
from ..io.files import atomic_folder, join_names, read_json_object
from ..io.tensors import read_tensors, save_tensors, write_tensors
from ..methods import MoELoRAConfig
from ..methods.released import released_name
from .names import FIXED_ENTRIES, LANGUAGE_MODEL, PREFIX, PROJECTOR, expert_tensor

OFFICIAL_PEFT_TYPE = "MOE_LORA_CoIN"
OFFICIAL_TASK_TYPE = "CAUSAL_LM_CoIN"
MODULE = r"layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
FIXED = {**FIXED_ENTRIES, "task_embedding_dim": 64}


def from_official_config(released: Mapping[str, Any], source: str | Path) -> MoELoRAConfig:
    """Convert CoIN's `adapter_config.json`.

    Raises:
        ValueError: an entry is missing, or has a value that no adapter of CoIN's has.
    """
    expected = ("r", "lora_alpha", "lora_dropout", "expert_num", "target_modules")
    missing = [name for name in expected if name not in released]
    if missing:
        raise ValueError(f"{source}: missing {missing}")
    for name, value in FIXED.items():
        if released.get(name, value) != value:
            raise ValueError(f"{source}: {name} must be {value!r}, got {released[name]!r}")
    r, E, alpha = released["r"], released["expert_num"], released["lora_alpha"]
    for name, value in (("r", r), ("expert_num", E), ("lora_alpha", alpha)):
        check_int(f"{source}: {name}", value)
    if r % E:
        raise ValueError(f"{source}: expert_num must divide r, the rank of all experts together; got {E} and {r}")
    targets = released["target_modules"]
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{source}: target_modules must be a list of names, got {targets!r}")
    return MoELoRAConfig(
        r=r // E,
        lora_alpha=alpha / E,
        lora_dropout=released["lora_dropout"],
        num_experts=E,
        target_modules=targets_of(targets),
        task_type="CAUSAL_LM",
        inference_mode=bool(released.get("inference_mode", True)),
    )


def targets_of(names: list[str]) -> str:
    """Make a regular expression for the language model's layers; the vision tower has layers of the same names."""
    return rf"(.*\.)?language_model\..*\.({'|'.join(sorted(name.rpartition('.')[2] for name in names))})"


def convert_official(adapter: str | Path, output: str | Path) -> None:
    """Convert an adapter of CoIN's code to a PEFT adapter.

    Args:
        adapter: folder with `adapter_model.bin`, `adapter_config.json` and, where the projector was trained,
            `non_lora_trainables.bin`.
        output: a new or empty folder, written atomically.

    Raises:
        FileNotFoundError, FileExistsError: a file is missing, or `output` is not empty.
        ValueError: a file is broken, or no adapter of CoIN's code; the message names the tensor or entry.
    """
    adapter = Path(adapter)
    source, config_file = adapter / "adapter_model.bin", adapter / "adapter_config.json"
    config = from_official_config(read_json_object(config_file), config_file)
    state, _ = read_tensors(source)
    converted = {
        f"{PREFIX}{LANGUAGE_MODEL}{module}.moelora_experts.{name}": tensor
        for module, tensors in _group_by_module(state, source).items()
        for name, tensor in _stack_experts(module, tensors, config, source).items()
    }
    beside = adapter / "non_lora_trainables.bin"
    if beside.exists():
        converted |= _projector(read_tensors(beside)[0], beside)
        config.modules_to_save = ["multi_modal_projector"]
    with atomic_folder(output) as folder:
        write_tensors(folder / "adapter_model.safetensors", converted)
        config.save_pretrained(str(folder))


def _group_by_module(state: Mapping[str, Tensor], source: Path) -> dict[str, dict[str, Tensor]]:
    """Group tensors by layer and `released_name`; the file has each expert under two names."""
    pattern = re.compile(rf"{re.escape(PREFIX)}(?P<module>{MODULE})\.(?P<name>.+)")
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = pattern.fullmatch(key)
        if match is None:
            raise ValueError(f"{source} has a tensor that no MoELoRA adapter of CoIN's has: {key!r}")
        name = released_name(match["name"])
        known = modules.setdefault(match["module"], {}).setdefault(name, value)
        if known is not value and not torch.equal(known, value):
            raise ValueError(f"{source}: {key!r} differs from another tensor of the same expert")
    if not modules:
        raise ValueError(f"{source} has no tensors")
    return modules


def _stack_experts(module: str, tensors: dict[str, Tensor], config: MoELoRAConfig, source: Path) -> dict[str, Tensor]:
    """Convert a layer's tensors to A (E, r, d), B (E, k, r) and the router (E, d)."""
    E, r = config.num_experts, config.r
    names = {letter: [f"lora_{letter}.{e}" for e in range(E)] for letter in "AB"}
    wanted = {*names["A"], *names["B"], "lora_router"}
    if tensors.keys() != wanted:
        lacks, more = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
        raise ValueError(f"{source}: {module} lacks {lacks} and has more than it should: {more}")
    d, k = tensors["lora_router"].shape[-1], tensors["lora_B.0"].shape[0]
    shapes = {**dict.fromkeys(names["A"], (r, d)), **dict.fromkeys(names["B"], (k, r)), "lora_router": (E, d)}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{source}: {name} of {module} must be {shapes[name]}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{source}: {name} of {module} must hold finite floating point numbers")
    stacked = {letter: torch.stack([tensors[name] for name in names[letter]]) for letter in "AB"}
    return {**stacked, "router": tensors["lora_router"]}


def _projector(state: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Rename the projector's tensors as PEFT names those of `modules_to_save`."""
    found = {}
    for key, value in state.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?model\.(?P<linear>.+)\.(?P<kind>weight|bias)", key)
        if match is None or match["linear"] not in PROJECTOR:
            raise ValueError(f"{source} may hold the multimodal projector alone, got {key!r}")
        found[f"{PREFIX}{PROJECTOR[match['linear']]}.{match['kind']}"] = value
    if len(found) != 4:
        raise ValueError(f"{source} must hold weight and bias of both layers of the projector, got {join_names(state)}")
    return found


def convert_to_official(adapter: str | Path, output: str | Path) -> None:
    """Convert a PEFT adapter to an adapter of CoIN's code; the inverse of `convert_official`.

    Raises:
        FileNotFoundError, FileExistsError: a file is missing, or `output` is not empty.
        ValueError: a file is broken, or CoIN's code cannot do what the adapter does.
    """
    adapter = Path(adapter)
    source = adapter / "adapter_model.safetensors"
    config = MoELoRAConfig.from_pretrained(str(adapter))
    alpha = config.lora_alpha * config.num_experts
    if alpha != int(alpha):
        raise ValueError(f"lora_alpha * num_experts must be whole for CoIN's code, got {alpha}")
    state, _ = read_tensors(source)
    released_projector = {ours: official for official, ours in PROJECTOR.items()}
    pattern = re.compile(
        rf"{re.escape(PREFIX)}{re.escape(LANGUAGE_MODEL)}(?P<module>{MODULE})\.moelora_experts\.(?P<name>A|B|router)"
    )
    released: dict[str, Tensor] = {}
    projector: dict[str, Tensor] = {}
    for key, value in state.items():
        linear, _, kind = key.removeprefix(PREFIX).rpartition(".")
        if linear in released_projector:
            projector[f"{PREFIX}{released_projector[linear]}.{kind}"] = value.clone()
            continue
        match = pattern.fullmatch(key)
        if match is None:
            raise ValueError(f"{source} has a tensor that CoIN's code has no place for: {key!r}")
        place, name = f"{PREFIX}{match['module']}", match["name"]
        if name == "router":
            released[f"{place}.lora_router.weight"] = value.clone()
            continue
        for e, expert in enumerate(value.unbind(0)):
            official = f"{place}.{expert_tensor(name, e)}"
            released[official] = expert.clone()
            released[official.removesuffix("weight") + "mlp.weight"] = expert.clone()
    targets = sorted({key.removeprefix(PREFIX).split(".lora_")[0].rpartition(".")[2] for key in released})
    text = {
        **FIXED,
        "expert_num": config.num_experts,
        "inference_mode": config.inference_mode,
        "lora_alpha": int(alpha),
        "lora_dropout": config.lora_dropout,
        "peft_type": OFFICIAL_PEFT_TYPE,
        "r": config.r * config.num_experts,
        "target_modules": targets,
        "task_type": OFFICIAL_TASK_TYPE,
    }
    with atomic_folder(output) as folder:
        save_tensors(folder / "adapter_model.bin", released)
        if projector:
            save_tensors(folder / "non_lora_trainables.bin", projector)
        (folder / "adapter_config.json").write_text(json.dumps(text, indent=1, sort_keys=True), "utf-8")
