"""Adapters of the released code as PEFT adapters, and back: key for key and bit for bit.

The released code saves `adapter_model.bin`, a pickle with a tensor for each expert, and `adapter_config.json`, which
also holds the instruction embeddings. Here they become what stock PEFT loads over an assembled LLaVA (`assemble`):
`adapter_model.safetensors` with the experts of a branch in one tensor, `adapter_config.json`, and
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

from ..config import SMoLoRAConfig
from ..io.embeddings import INSTRUCTION_FILE, read_instruction_embeddings, write_instruction_embeddings
from ..io.files import atomic_folder
from ..io.tensors import named, read_json, read_tensors, save_tensors, write_tensors

PEFT_TYPE = "SMOLORA"  # there and here
OFFICIAL_TASK_TYPE = "CAUSAL_LM_SMoLoRA"
PREFIX = "base_model.model.model."
PARAMETERS = "smolora_experts"  # the submodule of an adapted layer that PEFT saves
PROJECTOR = {"mm_projector.0": "multi_modal_projector.linear_1", "mm_projector.2": "multi_modal_projector.linear_2"}
TARGETS = ("gate_proj", "up_proj", "down_proj", *PROJECTOR)  # what the released code adapts, in its own order
OFFICIAL_MODULE = r"layers\.\d+\.mlp\.(?:gate|up|down)_proj|mm_projector\.[02]"
PEFT_MODULE = r"language_model\.layers\.\d+\.mlp\.(?:gate|up|down)_proj|multi_modal_projector\.linear_[12]"
SINGLE = {  # released name: ours
    "lora_vu_gate.weight": "vu_router", "lora_ins_gate.weight": "if_router",
    "lora_fc_A.weight": "vu_importance", "lora_fc_B.weight": "if_importance",
}  # fmt: skip
NAMES = ("vu_A", "vu_B", "if_A", "if_B", *SINGLE.values())
# what else adapter_config.json says, and the only values that the released adapters have for it
FIXED = {
    "auto_mapping": None, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "layers_pattern": None,
    "layers_to_transform": None, "modules_to_save": None,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the names


def experts_of(name: str, config: SMoLoRAConfig) -> list[str]:
    """The released names of the experts that one tensor holds here: VU experts come first there, IF experts after."""
    branch, letter = name.split("_")
    first, count = (0, config.num_vu_experts) if branch == "vu" else (config.num_vu_experts, config.num_if_experts)
    return [f"lora_{letter}.lora{letter}.{i}.weight" for i in range(first, first + count)]


def _our_module(module: str) -> str:
    return PROJECTOR.get(module) or f"language_model.{module}"


def _modules(layers: int, targets: Iterable[str]) -> list[str]:
    """The released names of the adapted modules, in the order in which the released code saves them."""
    adapted = set(targets)
    targets = [target for target in TARGETS if target in adapted]
    in_layers = [target for target in targets if target not in PROJECTOR]
    return [f"layers.{i}.mlp.{target}" for i in range(layers) for target in in_layers] + [
        target for target in targets if target in PROJECTOR
    ]


def _target(module: str) -> str:
    return module if module in PROJECTOR else module.rpartition(".")[2]


def _split(state: Mapping[str, Tensor], pattern: re.Pattern, source: Path) -> dict[str, dict[str, Tensor]]:
    """Tensors by module (the pattern's group "module") and name in it; a key of another form is refused."""
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in state.items():
        match = pattern.fullmatch(key)
        if match is None:
            unknown.append(key)
        else:
            modules.setdefault(match["module"], {})[match["name"]] = value
    if unknown:
        raise ValueError(f"{source} has tensors that no SMoLoRA adapter of a LLaVA has: {named(unknown)}")
    return modules


# ----------------------------------------------------------------------------------------------------------- the checks


def _complete(
    modules: dict[str, dict[str, Tensor]], targets: Iterable[str] | None, names: set[str], key: Callable, source: Path
) -> list[str]:
    """The modules in order, if every layer has the same ones and each has all of its tensors.

    A last layer that is missing as a whole cannot be told from a smaller model here; loading into the model tells.
    """
    if not modules:
        raise ValueError(f"{source} has no tensors")
    sizes = Counter()  # tensors a layer; one with less than half of what others have is a stray, not the last layer
    for module, tensors in modules.items():
        if module not in PROJECTOR:
            sizes[int(module.split(".")[1])] += len(tensors)
    layers = 1 + max((i for i, size in sizes.items() if 2 * size >= max(sizes.values())), default=-1)
    wanted = _modules(layers, targets if targets is not None else map(_target, modules))
    missing = [key(module, name) for module in wanted for name in names - modules.get(module, {}).keys()]
    extra = [
        key(module, name)
        for module, tensors in modules.items()
        for name in tensors.keys() - (names if module in wanted else set())
    ]
    if missing or extra:
        parts = [f"lacks {named(missing)}"] * bool(missing) + [f"has more than it should: {named(extra)}"] * bool(extra)
        raise ValueError(f"{source} {' and '.join(parts)}")
    return wanted


def _most(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _sound(modules: dict[str, dict[str, Tensor]], shape: Callable, key: Callable, source: Path) -> None:
    """Shapes, dtypes and values of an adapter's tensors.

    A module's width is nowhere said, so it is what most of the tensors that know it say, in all layers: the odd one
    out is the broken one.

    Args:
        shape: (name, d, k) -> the shape of a tensor of a module with d inputs and k outputs.
        key: (module, name) -> the tensor's name in the file.
    """
    for target in {_target(module) for module in modules}:
        group = {(m, n): t for m, tensors in modules.items() if _target(m) == target for n, t in tensors.items()}
        sizes = []
        for unknown in ("d", "k"):
            votes = []
            for (_, name), tensor in group.items():
                form = shape(name, "d", "k")
                if unknown in form and tensor.dim() == len(form):
                    votes.append(tensor.shape[form.index(unknown)])
            sizes.append(_most(votes) if votes else 0)
        if 0 in sizes:
            raise ValueError(f"{source}: the tensors of {target} must not be empty")
        dtypes: dict[str, list[torch.dtype]] = {}  # experts share one, as they will share a tensor
        for (_, name), tensor in group.items():
            dtypes.setdefault(name.partition(".")[0], []).append(tensor.dtype)
        usual = {kind: _most(found) for kind, found in dtypes.items()}
        for (module, name), tensor in group.items():
            expected = shape(name, *sizes)
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


# ------------------------------------------------------------------------------------------------------- configurations


def from_official_config(
    released: Mapping[str, Any], source: str | Path = "adapter_config.json"
) -> tuple[SMoLoRAConfig, Tensor]:
    """A released `adapter_config.json` as ours.

    The name of its base is left out: there it is the language model, here the adapter sits on an assembled LLaVA.

    Args:
        released: what the file holds.
        source: what errors call it.

    Returns:
        The configuration (`default_instruction` is the released `ins_type`), and the embeddings (rows, e), float32.

    Raises:
        ValueError: an entry is missing, unknown or of a value that the released code's adapters do not have.
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
    for name, value in (("r", r), ("expert_num", experts)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{source}: {name} must be a positive integer, got {value!r}")
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
    if not isinstance(row, int) or isinstance(row, bool) or not 0 <= row < len(embeddings):
        raise ValueError(f"{source}: ins_type must be a row of ins_emb, 0 to {len(embeddings) - 1}, got {row!r}")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise ValueError(f"{source}: lora_alpha must be a number, got {alpha!r}")
    scaled = alpha / experts
    config = SMoLoRAConfig.official(
        r=r // experts, lora_alpha=int(scaled) if scaled == int(scaled) else scaled,
        lora_dropout=released["lora_dropout"], num_vu_experts=experts // 2, num_if_experts=experts // 2,
        instruction_dim=embeddings.shape[1], target_modules=[PROJECTOR.get(target, target) for target in targets],
        task_type="CAUSAL_LM", inference_mode=bool(released.get("inference_mode", True)),
        revision=released.get("revision"), default_instruction=row,
    )  # fmt: skip
    return config, embeddings


def to_official_config(config: SMoLoRAConfig, embeddings: Tensor, targets: Iterable[str]) -> dict[str, Any]:
    """Our configuration as the released `adapter_config.json` has it.

    Raises:
        ValueError: the released code cannot do what the configuration asks for.
    """
    for name, value in (
        ("top_k", 1), ("fusion", "adaptive"), ("route_over", "all"), ("decode_routing", "token"),
        ("num_if_experts", config.num_vu_experts), ("modules_to_save", None),
    ):  # fmt: skip
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
        **FIXED, "expert_num": experts, "inference_mode": config.inference_mode, "ins_emb": embeddings.tolist(),
        "ins_type": row, "lora_alpha": config.lora_alpha * experts,
        "lora_dropout": config.lora_dropout, "peft_type": PEFT_TYPE, "r": config.r * experts,
        "revision": config.revision, "target_modules": list(targets), "task_type": OFFICIAL_TASK_TYPE,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- both ways


def _official_shape(config: SMoLoRAConfig) -> Callable:
    M, N, r, e = config.num_vu_experts, config.num_if_experts, config.r, config.instruction_dim

    def shape(name: str, d: Any, k: Any) -> tuple:
        return {
            "lora_A": (r, d), "lora_B": (k, r), "lora_vu_gate": (M, d), "lora_ins_gate": (N, e), "lora_fc_A": (1, k),
            "lora_fc_B": (1, k),
        }[name.partition(".")[0]]  # fmt: skip

    return shape


def _peft_shape(config: SMoLoRAConfig) -> Callable:
    M, N, r, e = config.num_vu_experts, config.num_if_experts, config.r, config.instruction_dim

    def shape(name: str, d: Any, k: Any) -> tuple:
        return {
            "vu_A": (M, r, d), "vu_B": (M, k, r), "if_A": (N, r, d), "if_B": (N, k, r), "vu_router": (M, d),
            "if_router": (N, e), "vu_importance": (k,), "if_importance": (k,),
        }[name]  # fmt: skip

    return shape


def convert_official(adapter: str | Path, output: str | Path) -> None:
    """Make a PEFT adapter of one that the released code saved.

    Args:
        adapter: folder with `adapter_model.bin` and `adapter_config.json`.
        output: a new or empty folder, written as a whole or not at all: `adapter_model.safetensors`,
            `adapter_config.json` (`SMoLoRAConfig.official()`), `instruction_embeddings.safetensors`.

    Raises:
        FileNotFoundError, FileExistsError: a file is missing, or `output` has something in it.
        ValueError: a file is broken, or no adapter of the released code; the message names the tensor or entry.
    """
    adapter = Path(adapter)
    source = adapter / "adapter_model.bin"
    config, embeddings = from_official_config(
        read_json(adapter / "adapter_config.json"), adapter / "adapter_config.json"
    )
    state, _ = read_tensors(source)
    beside = adapter / "non_lora_trainables.bin"
    if beside.exists() and (others := read_tensors(beside)[0]):
        raise ValueError(f"{beside} must be empty, as it is for the released adapters, got {named(others)}")
    pattern = rf"{re.escape(PREFIX)}(?P<module>{OFFICIAL_MODULE})\.(?P<name>.+)"
    modules = _split(state, re.compile(pattern), source)
    ours = {value: key for key, value in PROJECTOR.items()}
    targets = [ours.get(target, target) for target in config.target_modules]
    experts = {name: experts_of(name, config) for name in ("vu_A", "vu_B", "if_A", "if_B")}
    names = {*itertools.chain.from_iterable(experts.values()), *SINGLE}

    def key(module: str, name: str) -> str:
        return f"{PREFIX}{module}.{name}"

    _complete(modules, targets, names, key, source)
    _sound(modules, _official_shape(config), key, source)
    converted = {}
    for module, tensors in modules.items():
        at = f"{PREFIX}{_our_module(module)}.{PARAMETERS}."
        for name, released in experts.items():
            converted[at + name] = torch.stack([tensors[expert] for expert in released])
        for released, name in SINGLE.items():
            # (1, k) there, (k,) here
            converted[at + name] = tensors[released][0] if name.endswith("importance") else tensors[released]
    with atomic_folder(output) as folder:
        write_tensors(folder / "adapter_model.safetensors", converted)
        write_instruction_embeddings(folder / INSTRUCTION_FILE, embeddings, [None] * len(embeddings))
        config.save_pretrained(str(folder))


def convert_to_official(adapter: str | Path, output: str | Path) -> None:
    """Make an adapter that the released code loads of a PEFT adapter; the inverse of `convert_official`.

    Args:
        adapter: folder with `adapter_model.safetensors`, `adapter_config.json` and
            `instruction_embeddings.safetensors`.
        output: a new or empty folder, written as a whole or not at all: `adapter_model.bin`, `adapter_config.json`.

    Raises:
        FileNotFoundError, FileExistsError: a file is missing, or `output` has something in it.
        ValueError: a file is broken, or the released code cannot do what the adapter does.
    """
    adapter = Path(adapter)
    source = adapter / "adapter_model.safetensors"
    if read_json(adapter / "adapter_config.json").get("peft_type") != PEFT_TYPE:
        raise ValueError(f"{adapter / 'adapter_config.json'}: peft_type must be {PEFT_TYPE!r}")
    config = SMoLoRAConfig.from_pretrained(str(adapter))
    state, _ = read_tensors(source)
    embeddings, _ = read_instruction_embeddings(adapter / INSTRUCTION_FILE)
    if embeddings.shape[1] != config.instruction_dim:
        raise ValueError(
            f"{adapter / INSTRUCTION_FILE} must have rows of instruction_dim={config.instruction_dim}, "
            f"got {tuple(embeddings.shape)}"
        )
    theirs = {value: key for key, value in PROJECTOR.items()}
    pattern = rf"{re.escape(PREFIX)}(?P<module>{PEFT_MODULE})\.{PARAMETERS}\.(?P<name>\w+)"
    modules = {
        theirs.get(module) or module.removeprefix("language_model."): tensors
        for module, tensors in _split(state, re.compile(pattern), source).items()
    }

    def key(module: str, name: str) -> str:
        return f"{PREFIX}{_our_module(module)}.{PARAMETERS}.{name}"

    order = _complete(modules, None, set(NAMES), key, source)
    _sound(modules, _peft_shape(config), key, source)
    released_config = to_official_config(config, embeddings, dict.fromkeys(map(_target, order)))
    released = {}
    for module in order:
        tensors = modules[module]
        for letter in "AB":
            for name in (f"vu_{letter}", f"if_{letter}"):
                for expert, tensor in zip(experts_of(name, config), tensors[name].unbind(0), strict=True):
                    released[f"{PREFIX}{module}.{expert}"] = tensor.clone()  # a storage of its own, as there
        for official, name in SINGLE.items():
            tensor = tensors[name].clone()
            released[f"{PREFIX}{module}.{official}"] = tensor[None] if name.endswith("importance") else tensor
    with atomic_folder(output) as folder:
        save_tensors(folder / "adapter_model.bin", released)
        text = json.dumps(released_config, indent=1, sort_keys=True)
        (folder / "adapter_config.json").write_text(text, "utf-8")
