"""Convert SMoLoRA adapters of the released code to PEFT adapters and back, key for key and bit for bit.

The released code saves `adapter_model.bin`, a pickle with a tensor for each expert, and `adapter_config.json`, which
also holds the instruction embeddings. Ours is what stock PEFT loads onto an assembled LLaVA (`assemble`): an
`adapter_model.safetensors` with all experts of a branch in one tensor, `adapter_config.json`, and
`instruction_embeddings.safetensors`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_int, is_int
from ..config import SMoLoRAConfig
from ..io.embeddings import INSTRUCTION_FILE, read_instruction_embeddings, write_instruction_embeddings
from ..io.files import atomic_folder, join_names, read_json_object
from ..io.tensors import read_tensors, save_tensors, write_tensors
from .names import (
    FIXED_ENTRIES,
    PREFIX,
    PROJECTOR,
    SMOLORA_TENSORS,
    expert_tensor,
    our_module,
    released_module,
)

PEFT_TYPE = "SMOLORA"  # there and here
OFFICIAL_TASK_TYPE = "CAUSAL_LM_SMoLoRA"
PARAMETERS = "smolora_experts"  # the submodule of an adapted layer that PEFT saves
TARGETS = ("gate_proj", "up_proj", "down_proj", *PROJECTOR)  # in the order of the released files
OFFICIAL_MODULE = r"layers\.\d+\.mlp\.(?:gate|up|down)_proj|mm_projector\.[02]"
PEFT_MODULE = r"language_model\.layers\.\d+\.mlp\.(?:gate|up|down)_proj|multi_modal_projector\.linear_[12]"
EXPERTS = ("vu_A", "vu_B", "if_A", "if_B")
FIXED = {"auto_mapping": None, **FIXED_ENTRIES}

Modules = dict[str, dict[str, Tensor]]  # tensors by module and by their name in it
Shape = Callable[[str, Any, Any], tuple]  # (name, d, k) -> the shape of a tensor of a module with d inputs, k outputs
Key = Callable[[str, str], str]  # (module, name) -> the tensor's name in the file


# ------------------------------------------------------------------------------------------------------------ the names


def experts_of(name: str, config: SMoLoRAConfig) -> list[str]:
    """List the released names of the experts in one tensor of ours; VU experts come first there, then IF experts."""
    branch, letter = name.split("_")
    first, count = (0, config.num_vu_experts) if branch == "vu" else (config.num_vu_experts, config.num_if_experts)
    return [expert_tensor(letter, i) for i in range(first, first + count)]


def _module_order(layers: int, targets: Iterable[str]) -> list[str]:
    """List the released names of the adapted modules in the order of the released files."""
    adapted = set(targets)
    in_layers = [target for target in TARGETS if target in adapted and target not in PROJECTOR]
    in_projector = [target for target in TARGETS if target in adapted and target in PROJECTOR]
    return [f"layers.{i}.mlp.{target}" for i in range(layers) for target in in_layers] + in_projector


def _target(module: str) -> str:
    return module if module in PROJECTOR else module.rpartition(".")[2]


def _group_by_module(state: Mapping[str, Tensor], pattern: str, source: Path) -> Modules:
    """Group tensors by the pattern's groups "module" and "name".

    Raises:
        ValueError: a key does not match.
    """
    modules: Modules = {}
    unknown = []
    for key, value in state.items():
        match = re.fullmatch(pattern, key)
        if match is None:
            unknown.append(key)
        else:
            modules.setdefault(match["module"], {})[match["name"]] = value
    if unknown:
        raise ValueError(f"{source} has tensors that no SMoLoRA adapter of a LLaVA has: {join_names(unknown)}")
    return modules


# ----------------------------------------------------------------------------------------------------------- the checks


def _check_complete(
    modules: Modules, targets: Iterable[str] | None, names: set[str], key: Key, source: Path
) -> list[str]:
    """Check that all layers have the same modules, and all modules the same tensors.

    A file without its whole last layer looks like the file of a smaller model; loading it into the model tells.

    Args:
        modules: the adapter, by released module names.
        targets: the adapted modules; None for those that the file has anywhere.
        names: the tensors of a module.
        key: names tensors in errors.
        source: names the file in errors.

    Returns:
        The modules in the order of the released files.

    Raises:
        ValueError: a tensor is missing, or there is one too many.
    """
    if not modules:
        raise ValueError(f"{source} has no tensors")
    # tensors a layer; a layer with less than half of what others have is a stray, not the last one
    sizes: Counter[int] = Counter()
    for module, tensors in modules.items():
        if module not in PROJECTOR:
            sizes[int(module.split(".")[1])] += len(tensors)
    layers = 1 + max((i for i, size in sizes.items() if 2 * size >= max(sizes.values())), default=-1)
    wanted = _module_order(layers, targets if targets is not None else map(_target, modules))
    missing = [key(module, name) for module in wanted for name in names - modules.get(module, {}).keys()]
    extra = [
        key(module, name)
        for module, tensors in modules.items()
        for name in tensors.keys() - (names if module in wanted else set())
    ]
    if missing or extra:
        faults = [f"lacks {join_names(missing)}"] if missing else []
        faults += [f"has more than it should: {join_names(extra)}"] if extra else []
        raise ValueError(f"{source} {' and '.join(faults)}")
    return wanted


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _check_tensors(modules: Modules, shape: Shape, key: Key, source: Path) -> None:
    """Check the shapes, dtypes and values of an adapter's tensors.

    The file does not say how wide a module is. The width that most of its tensors have, over all layers, is taken as
    right, so that an error names the broken tensor.

    Raises:
        ValueError: a tensor has another shape or dtype than its like, or is not finite.
    """
    for target in {_target(module) for module in modules}:
        group = {(m, n): t for m, tensors in modules.items() if _target(m) == target for n, t in tensors.items()}
        widths = [_width(group, shape, unknown) for unknown in ("d", "k")]
        if 0 in widths:
            raise ValueError(f"{source}: the tensors of {target} must not be empty")
        dtypes: dict[str, list[torch.dtype]] = {}  # experts share one, since they will share a tensor
        for (_, name), tensor in group.items():
            dtypes.setdefault(name.partition(".")[0], []).append(tensor.dtype)
        usual = {kind: _most_common(found) for kind, found in dtypes.items()}
        for (module, name), tensor in group.items():
            expected = shape(name, *widths)
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{source}: {key(module, name)!r} must be {expected}, got {tuple(tensor.shape)}")
            dtype = usual[name.partition(".")[0]]
            if not tensor.dtype.is_floating_point or tensor.dtype != dtype:
                raise ValueError(
                    f"{source}: {key(module, name)!r} must be floating point, and as its like in all layers {dtype}, "
                    f"got {tensor.dtype}"
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{source}: {key(module, name)!r} must be finite, got a NaN or an infinity")


def _width(group: Mapping[tuple[str, str], Tensor], shape: Shape, unknown: str) -> int:
    """Return the width d or k that most tensors of a kind of module have; 0 if none has it."""
    votes = []
    for (_, name), tensor in group.items():
        dimensions = shape(name, "d", "k")
        if unknown in dimensions and tensor.dim() == len(dimensions):
            votes.append(tensor.shape[dimensions.index(unknown)])
    return _most_common(votes) if votes else 0


# ------------------------------------------------------------------------------------------------------- configurations


def from_official_config(
    released: Mapping[str, Any], source: str | Path = "adapter_config.json"
) -> tuple[SMoLoRAConfig, Tensor]:
    """Convert a released `adapter_config.json`.

    The name of the base is dropped: there it is the language model, here the adapter sits on an assembled LLaVA.

    Args:
        released: the file's content.
        source: names the file in errors.

    Returns:
        The configuration (`default_instruction` is the released `ins_type`), and the embeddings (rows, e), float32.

    Raises:
        ValueError: an entry is missing or unknown, or has a value that no adapter of the released code has.
    """
    expected = ("r", "lora_alpha", "lora_dropout", "expert_num", "ins_type", "ins_emb", "target_modules", "peft_type")
    missing = [name for name in expected if name not in released]
    known = {*expected, *FIXED, "task_type", "inference_mode", "revision", "base_model_name_or_path"}
    if missing or released.keys() - known:
        raise ValueError(f"{source}: missing {missing}, unknown {sorted(released.keys() - known)}")
    for name, value in {"peft_type": PEFT_TYPE, **FIXED}.items():
        if released.get(name, value) != value:
            raise ValueError(f"{source}: {name} must be {value!r}, got {released[name]!r}")
    r, experts, alpha = released["r"], released["expert_num"], released["lora_alpha"]
    check_int(f"{source}: r", r)
    check_int(f"{source}: expert_num", experts)
    if experts % 2 or r % experts:
        raise ValueError(
            f"{source}: expert_num must be even and divide r, the rank of all experts together; "
            f"got expert_num={experts}, r={r}"
        )
    targets = released["target_modules"]
    if not isinstance(targets, list) or not targets or not set(targets) <= set(TARGETS):
        raise ValueError(f"{source}: target_modules must be some of {list(TARGETS)}, got {targets!r}")
    try:
        embeddings = torch.tensor(released["ins_emb"], dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: ins_emb must be a list of rows of equal length ({error})") from error
    if embeddings.dim() != 2 or not embeddings.numel() or not torch.isfinite(embeddings).all():
        raise ValueError(
            f"{source}: ins_emb must be rows of finite numbers, got shape {tuple(embeddings.shape)} or worse"
        )
    row = released["ins_type"]
    if not is_int(row, 0) or row >= len(embeddings):
        raise ValueError(f"{source}: ins_type must be a row of ins_emb, 0 to {len(embeddings) - 1}, got {row!r}")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise ValueError(f"{source}: lora_alpha must be a number, got {alpha!r}")
    scaled = alpha / experts
    config = SMoLoRAConfig.official(
        r=r // experts,
        lora_alpha=int(scaled) if scaled == int(scaled) else scaled,
        lora_dropout=released["lora_dropout"],
        num_vu_experts=experts // 2,
        num_if_experts=experts // 2,
        instruction_dim=embeddings.shape[1],
        target_modules=[PROJECTOR.get(target, target) for target in targets],
        task_type="CAUSAL_LM",
        inference_mode=bool(released.get("inference_mode", True)),
        revision=released.get("revision"),
        default_instruction=row,
    )
    return config, embeddings


def to_official_config(config: SMoLoRAConfig, embeddings: Tensor, targets: Iterable[str]) -> dict[str, Any]:
    """Convert our configuration to the released `adapter_config.json`.

    Raises:
        ValueError: the released code cannot do what the configuration asks for.
    """
    only_values = {
        "top_k": 1,
        "fusion": "adaptive",
        "route_over": "all",
        "decode_routing": "token",
        "num_if_experts": config.num_vu_experts,
        "modules_to_save": None,
    }
    for name, value in only_values.items():
        if getattr(config, name) != value:
            got = getattr(config, name)
            raise ValueError(f"{name} must be {value!r} for the released code, which knows nothing else, got {got!r}")
    row = config.default_instruction
    if row is None or row >= len(embeddings):
        raise ValueError(
            f"default_instruction must name a row of the embeddings, 0 to {len(embeddings) - 1}, as the released code "
            f"needs one, got {row!r}"
        )
    experts = config.num_vu_experts + config.num_if_experts
    return {
        **FIXED,
        "expert_num": experts,
        "inference_mode": config.inference_mode,
        "ins_emb": embeddings.tolist(),
        "ins_type": row,
        "lora_alpha": config.lora_alpha * experts,
        "lora_dropout": config.lora_dropout,
        "peft_type": PEFT_TYPE,
        "r": config.r * experts,
        "revision": config.revision,
        "target_modules": list(targets),
        "task_type": OFFICIAL_TASK_TYPE,
    }


# ---------------------------------------------------------------------------------------------------------- both ways


def _official_shape(config: SMoLoRAConfig) -> Shape:
    M, N, r, e = config.num_vu_experts, config.num_if_experts, config.r, config.instruction_dim

    def shape(name: str, d: Any, k: Any) -> tuple:
        shapes = {
            "lora_A": (r, d),
            "lora_B": (k, r),
            "lora_vu_gate": (M, d),
            "lora_ins_gate": (N, e),
            "lora_fc_A": (1, k),
            "lora_fc_B": (1, k),
        }
        return shapes[name.partition(".")[0]]

    return shape


def _peft_shape(config: SMoLoRAConfig) -> Shape:
    M, N, r, e = config.num_vu_experts, config.num_if_experts, config.r, config.instruction_dim

    def shape(name: str, d: Any, k: Any) -> tuple:
        shapes = {
            "vu_A": (M, r, d),
            "vu_B": (M, k, r),
            "if_A": (N, r, d),
            "if_B": (N, k, r),
            "vu_router": (M, d),
            "if_router": (N, e),
            "vu_importance": (k,),
            "if_importance": (k,),
        }
        return shapes[name]

    return shape


def convert_official(adapter: str | Path, output: str | Path) -> None:
    """Convert an adapter of the released code to a PEFT adapter.

    Args:
        adapter: folder with `adapter_model.bin` and `adapter_config.json`.
        output: a new or empty folder, written atomically: `adapter_model.safetensors`, `adapter_config.json`
            (`SMoLoRAConfig.official()`), `instruction_embeddings.safetensors`.

    Raises:
        FileNotFoundError, FileExistsError: a file is missing, or `output` is not empty.
        ValueError: a file is broken, or no adapter of the released code; the message names the tensor or entry.
    """
    adapter = Path(adapter)
    source, config_file = adapter / "adapter_model.bin", adapter / "adapter_config.json"
    config, embeddings = from_official_config(read_json_object(config_file), config_file)
    state, _ = read_tensors(source)
    beside = adapter / "non_lora_trainables.bin"
    if beside.exists() and (others := read_tensors(beside)[0]):
        raise ValueError(f"{beside} must be empty, as it is for the released adapters, got {join_names(others)}")
    modules = _group_by_module(state, rf"{re.escape(PREFIX)}(?P<module>{OFFICIAL_MODULE})\.(?P<name>.+)", source)
    targets = [released_module(target) for target in config.target_modules or ()]
    experts = {name: experts_of(name, config) for name in EXPERTS}
    names = {*itertools.chain.from_iterable(experts.values()), *SMOLORA_TENSORS}

    def key(module: str, name: str) -> str:
        return f"{PREFIX}{module}.{name}"

    _check_complete(modules, targets, names, key, source)
    _check_tensors(modules, _official_shape(config), key, source)
    converted = {}
    for module, tensors in modules.items():
        place = f"{PREFIX}{our_module(module)}.{PARAMETERS}."
        for name, members in experts.items():
            converted[place + name] = torch.stack([tensors[member] for member in members])
        for released, name in SMOLORA_TENSORS.items():
            # (1, k) there, (k,) here
            converted[place + name] = tensors[released][0] if name.endswith("importance") else tensors[released]
    with atomic_folder(output) as folder:
        write_tensors(folder / "adapter_model.safetensors", converted)
        write_instruction_embeddings(folder / INSTRUCTION_FILE, embeddings, [None] * len(embeddings))
        config.save_pretrained(str(folder))


def convert_to_official(adapter: str | Path, output: str | Path) -> None:
    """Convert a PEFT adapter to an adapter of the released code; the inverse of `convert_official`.

    Args:
        adapter: folder with `adapter_model.safetensors`, `adapter_config.json` and
            `instruction_embeddings.safetensors`.
        output: a new or empty folder, written atomically: `adapter_model.bin`, `adapter_config.json`.

    Raises:
        FileNotFoundError, FileExistsError: a file is missing, or `output` is not empty.
        ValueError: a file is broken, or the released code cannot do what the adapter does.
    """
    adapter = Path(adapter)
    source, config_file = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    if read_json_object(config_file).get("peft_type") != PEFT_TYPE:
        raise ValueError(f"{config_file}: peft_type must be {PEFT_TYPE!r}")
    config = SMoLoRAConfig.from_pretrained(str(adapter))
    state, _ = read_tensors(source)
    embeddings, _ = read_instruction_embeddings(adapter / INSTRUCTION_FILE)
    if embeddings.shape[1] != config.instruction_dim:
        raise ValueError(
            f"{adapter / INSTRUCTION_FILE} must have rows of instruction_dim={config.instruction_dim}, "
            f"got {tuple(embeddings.shape)}"
        )
    pattern = rf"{re.escape(PREFIX)}(?P<module>{PEFT_MODULE})\.{PARAMETERS}\.(?P<name>\w+)"
    modules = {released_module(module): tensors for module, tensors in _group_by_module(state, pattern, source).items()}

    def key(module: str, name: str) -> str:
        return f"{PREFIX}{our_module(module)}.{PARAMETERS}.{name}"

    order = _check_complete(modules, None, {*EXPERTS, *SMOLORA_TENSORS.values()}, key, source)
    _check_tensors(modules, _peft_shape(config), key, source)
    released_config = to_official_config(config, embeddings, dict.fromkeys(map(_target, order)))
    released = {}
    for module in order:
        tensors = modules[module]
        for letter in "AB":
            for name in (f"vu_{letter}", f"if_{letter}"):
                for expert, tensor in zip(experts_of(name, config), tensors[name].unbind(0), strict=True):
                    released[f"{PREFIX}{module}.{expert}"] = tensor.clone()  # a storage of its own, as there
        for official, name in SMOLORA_TENSORS.items():
            tensor = tensors[name].clone()
            released[f"{PREFIX}{module}.{official}"] = tensor[None] if name.endswith("importance") else tensor
    with atomic_folder(output) as folder:
        save_tensors(folder / "adapter_model.bin", released)
        text = json.dumps(released_config, indent=1, sort_keys=True)
        (folder / "adapter_config.json").write_text(text, "utf-8")
