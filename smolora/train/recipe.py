"""Recipes: an experiment in one YAML file, read into dataclasses and changed by `key=value`.

Relative paths start in the current directory, and `~` is the home folder. `extends: other.yaml` takes another recipe of
the same folder and changes what is given here; lists are replaced as a whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml

from ..config import SMoLoRAConfig
from ..io.files import read_text, surrogate, user_path

PathText = Annotated[str, user_path]  # a type, and what is made of its value
ARGUMENT_PATHS = ("deepspeed", "fsdp_config")  # of TrainingArguments, where they are a file and no section

ADAPTER_KEYS = (
    "r", "lora_alpha", "lora_dropout", "num_vu_experts", "num_if_experts", "top_k", "instruction_dim", "route_over",
    "decode_routing", "fusion", "router_grad", "target_modules", "exclude_modules",
)  # fmt: skip
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ,._+-]*")


def _argument_paths(arguments: dict[str, Any]) -> dict[str, Any]:
    files = {key: user_path(arguments[key]) for key in ARGUMENT_PATHS if isinstance(arguments.get(key), str)}
    return {**arguments, **files}


@dataclass(frozen=True)
class ModelRecipe:
    """The base LLaVA.

    Args:
        path: its folder, with tokenizer and image processor.
        dtype: of its weights, and of what is computed; adapters are float32.
    """

    path: PathText
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


@dataclass(frozen=True)
class DataRecipe:
    """Where the data lie.

    Args:
        root: the tasks' files start here.
        images: the records' image paths start here; None for `root`.
        annotations: folders with further files that scoring needs, or with subfolders named like the datasets.
    """

    root: PathText
    images: PathText | None = None
    annotations: list[PathText] = field(default_factory=list)


@dataclass(frozen=True)
class InstructionRecipe:
    """What the instruction-following experts are routed by.

    Args:
        embed: "sample", each sample's own instruction; "task_mean", the mean of its task's `instructions` (the
            released multi-type).
        encoder: folder of a sentence-transformers model; None for the packaged all-MiniLM-L6-v2.
        normalize: scale embeddings to length 1 (the released ones are not).
    """

    embed: Literal["sample", "task_mean"] = "sample"
    encoder: PathText | None = None
    normalize: bool = False


@dataclass(frozen=True)
class BaselineRecipe:
    """The adapters of the LoRA baselines.

    Args:
        rank: None for r (M + N), which gives as many trainable parameters as SMoLoRA has.
        alpha: None for SMoLoRA's scaling, lora_alpha / r.
        experts: of MoELoRA; None for M + N.
    """

    rank: int | None = None
    alpha: float | None = None
    experts: int | None = None


@dataclass(frozen=True)
class TaskRecipe:
    """A task: what is learned in a stage, or asked downstream.

    Args:
        name: of its stage and its column.
        test: the test file.
        train: the training file; None for a task that is only asked.
        dataset: which of the evaluator's datasets it is; None for `name`.
        images: where its image paths start; None for `data.images`.
        instructions: its instruction texts, which are found at the end of its prompts; without them the benchmark's
            own are looked for, else an instruction is a prompt's last line.
        epochs: of a stage that trains this task alone, such as one of few shots; None for `training.epochs`.
    """

    name: str
    test: PathText
    train: PathText | None = None
    dataset: str | None = None
    images: PathText | None = None
    instructions: list[str] = field(default_factory=list)
    epochs: float | None = None

    @property
    def benchmark_name(self) -> str:
        """Its name among the evaluator's datasets."""
        return self.dataset or self.name


@dataclass(frozen=True)
class TrainingRecipe:
    """How a stage is trained.

    Args:
        batch_size: samples a step, over all devices.
        per_device_batch_size: samples that a device takes at a time; the rest is accumulated.
        projector_learning_rate: of adapters in the projector; None for `learning_rate`.
        schedule: "cosine", or "constant", both after a linear warm-up over `warmup_ratio` of the steps.
        max_length: longer samples are cut at the end.
        activation_checkpointing: recompute activations in the backward.
        save_steps, logging_steps: a checkpoint, or a line of the log, every so many steps.
        workers: processes a device that load images.
        arguments: further fields of `transformers.TrainingArguments` (report_to, deepspeed, fsdp, optim, ...); those
            that would change what is promised here are refused, see `smolora.train.trainer.REFUSED_ARGUMENTS`.
    """

    epochs: float = 1
    batch_size: int = 64
    per_device_batch_size: int = 8
    learning_rate: float = 1e-4
    projector_learning_rate: float | None = None
    weight_decay: float = 0.01
    warmup_ratio: float = 0.03
    schedule: Literal["cosine", "constant"] = "cosine"
    max_length: int = 2048
    activation_checkpointing: bool = False
    save_steps: int = 200
    logging_steps: int = 10
    workers: int = 4
    arguments: Annotated[dict[str, Any], _argument_paths] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationRecipe:
    """How answers are made and scored.

    Args:
        protocol: "smolora" (comparable with the paper's tables) or "standard".
        token_budget: tokens of a batch's prompts at most.
        max_new_tokens: an answer's length at most; None for the released number of each dataset.
        padding: "all" pads every image to a square, as in training; "released" leaves that out for the four datasets
            that the released evaluation crops instead.
        workers: processes a device that load images.
    """

    protocol: Literal["smolora", "standard"] = "smolora"
    token_budget: int = 16384
    max_new_tokens: int | None = None
    padding: Literal["all", "released"] = "all"
    workers: int = 2


@dataclass(frozen=True)
class Recipe:
    """An experiment.

    Args:
        name: of the run.
        output: its folder; None for `runs/<name>`.
        method: a name of `smolora.train.methods.METHODS`.
        model, data, instructions, adapter, baseline, training, evaluation: see there; `adapter` has arguments of
            `SMoLoRAConfig`.
        tasks: in the order of training.
        downstream: tables of tasks by name ("zero-shot", "few-shot"), asked with the last stage's adapter, or trained
            from it if they have a training file.
        benchmark: what the tasks are; the paper's rows are reported beside "CVIT" alone. None for `name`.
        setting: "single" or "multi", the instructions' type, for the report.
        prepare: what the recipe can make itself: a name of `smolora.train.prepare.PREPARATIONS`, and its options.
        seed: of everything random.
        backend: of the adapters, as `smolora.use_backend` takes it.
    """

    name: str
    model: ModelRecipe
    data: DataRecipe
    tasks: list[TaskRecipe]
    output: PathText | None = None
    benchmark: str | None = None
    setting: Literal["single", "multi"] = "single"
    method: str = "smolora"
    seed: int = 0
    backend: Literal["auto", "torch", "triton", "cuda"] = "auto"
    prepare: dict[str, Any] = field(default_factory=dict)
    instructions: InstructionRecipe = field(default_factory=InstructionRecipe)
    adapter: dict[str, Any] = field(default_factory=dict)
    baseline: BaselineRecipe = field(default_factory=BaselineRecipe)
    downstream: dict[str, list[TaskRecipe]] = field(default_factory=dict)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output or f"runs/{self.name}")

    @property
    def all_tasks(self) -> list[TaskRecipe]:
        """Upstream and downstream tasks."""
        return [*self.tasks, *(task for tasks in self.downstream.values() for task in tasks)]

    def epochs(self, tasks: Sequence[TaskRecipe]) -> float:
        """Of a stage that trains these tasks."""
        own = tasks[0].epochs if len(tasks) == 1 else None
        return self.training.epochs if own is None else own

    def adapter_config(self, **changes: Any) -> SMoLoRAConfig:
        """The configuration of `adapter`."""
        return SMoLoRAConfig(**{**self.adapter, **changes})

    def train_file(self, task: TaskRecipe) -> Path:
        """Where a task's training file is."""
        return Path(self.data.root, task.train or "")

    def test_file(self, task: TaskRecipe) -> Path:
        """Where a task's test file is."""
        return Path(self.data.root, task.test)

    def images(self, task: TaskRecipe) -> Path:
        """Where a task's image paths start."""
        return Path(task.images or self.data.images or self.data.root)

    def annotations(self, task: TaskRecipe) -> list[Path]:
        """Where scoring looks for a task's files."""
        return [self.test_file(task).parent, *map(Path, self.data.annotations)]

    def as_dict(self) -> dict[str, Any]:
        """The recipe with all its defaults, as it can be read again."""
        return dataclasses.asdict(self)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `key=value`; dots lead into sections and lists (`training.epochs=2`, `tasks.0.train=x.json`), values
            are YAML, and of one key the last counts.

    Raises:
        ValueError: a key is not known (the message has the nearest that is) or given twice, or a value does not fit;
            both are named.
        OSError: the file cannot be read.
    """
    content = _read(Path(path), ())
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"an override must be key=value, got {override!r}")
        _set(content, key.strip(), _yaml(value, override), override)
    try:
        recipe = _build(Recipe, content, "")
        _check(recipe)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return recipe


class _Loader(yaml.SafeLoader):
    """YAML's own takes the last of a key's values, silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for place, key in enumerate(given):
            if key in given[:place]:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"{key!r} is given twice in the section that starts in line {line}")
        return super().construct_mapping(node, deep)


def _yaml(text: str, where: Any) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML: {error}") from error


def _read(path: Path, seen: Sequence[Path]) -> dict[str, Any]:
    content = _yaml(read_text(path), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold keys and values, got {_short(content)}")
    base = content.pop("extends", None)
    if base is None:
        return content
    other = path.parent / user_path(str(base))
    if other in seen:
        raise ValueError(f"{path}: extends {base}, which extends it")
    return _merge(_read(other, (*seen, path)), content)


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = _merge(old[key], value) if both else value
    return merged


def _set(content: Any, key: str, value: Any, override: str) -> None:
    """Set the value at a dotted key."""
    *path, last = key.split(".")
    for part in path:
        if isinstance(content, list):
            content = content[_place(content, part, override)]
        elif content.get(part) is None:
            content[part] = content = {}
        else:
            content = content[part]
        if not isinstance(content, (dict, list)):
            raise ValueError(f"{override}: {part} is no section but {_short(content)}")
    if isinstance(content, list):
        content[_place(content, last, override)] = value
    else:
        content[last] = value


def _place(items: list[Any], part: str, override: str) -> int:
    """The place in a list that a number names, or the `name` of an entry."""
    names = [item.get("name") for item in items if isinstance(item, dict)]
    if part in names:
        return names.index(part)
    if not part.isdecimal() or int(part) >= len(items):
        raise ValueError(f"{override}: {part} must be one of 0 to {len(items) - 1}{_or(names)}")
    return int(part)


def _or(names: Iterable[Any]) -> str:
    return "".join(f", {name}" for name in names if name is not None)


# ---- from YAML to dataclasses


def _build(cls: type, content: Any, where: str) -> Any:
    """A dataclass from a mapping; `where` is its dotted key."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a section of keys and values, got {_short(content)}")
    hints = typing.get_type_hints(cls, include_extras=True)
    for key in content:
        if key not in hints:
            raise ValueError(_unknown(f"{where}.{key}" if where else str(key), str(key), where, hints))
    values = {}
    for item in dataclasses.fields(cls):
        name = f"{where}.{item.name}" if where else item.name
        if item.name in content:
            values[item.name] = _convert(hints[item.name], content[item.name], name)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ValueError(f"{name} is missing")
    return cls(**values)


def _unknown(name: str, key: str, where: str, known: Iterable[str]) -> str:
    """What is said of an unknown key: the nearest one of its section, else of the whole recipe."""
    known = list(known)
    near = difflib.get_close_matches(key, known, 1, 0.6)
    # "dropout" is a part of lora_dropout, "rank" the long name of r, and lr has learning_rate's initials
    near += [k for k in known if key in k or key.startswith(k) or key == "".join(word[0] for word in k.split("_"))]
    if near:
        nearest = f"{where}.{near[0]}" if where else near[0]
    else:
        all_keys = dict(_all_keys(Recipe, ""))
        last = difflib.get_close_matches(key, list(all_keys), 1, 0.0)
        nearest = all_keys[last[0]]
    return f"unknown key {name!r}; did you mean {nearest!r}?"


def _all_keys(cls: type, where: str) -> Iterator[tuple[str, str]]:
    """Every key by its last part; the outermost wins."""
    hints = typing.get_type_hints(cls)
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            yield from _all_keys(hint, f"{where}{name}.")
    if cls is Recipe:
        yield from ((name, f"adapter.{name}") for name in ADAPTER_KEYS)
    yield from ((name, where + name) for name in hints)


def _convert(hint: Any, value: Any, name: str) -> Any:
    """A value of the type that a field has; numbers may be written as YAML 1.1 does not know them (1e-4)."""
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (arg for arg in get_args(hint) if arg is not types.NoneType)
        return _convert(hint, value, name)
    if origin is Annotated:
        kind, made = get_args(hint)
        value = _convert(kind, value, name)
        try:
            return made(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if origin is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(hint)))}, got {value!r}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list, got {_short(value)}")
        return [_convert(get_args(hint)[0], item, f"{name}.{place}") for place, item in enumerate(value)]
    if origin is dict:
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{name} must be a section of keys and values, got {_short(value)}")
        kind = get_args(hint)[1]
        items = (value or {}).items()
        return {key: item if kind is Any else _convert(kind, item, f"{name}.{key}") for key, item in items}
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, name)
    if hint is float and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        kinds = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}
        raise ValueError(f"{name} must be {kinds[hint]}, got {_short(value)}")
    if isinstance(value, str) and (fault := surrogate(value)) is not None:
        raise ValueError(f"{name} must be a text, got {_short(value)} with {fault}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---- what fits together


def _check(recipe: Recipe) -> None:
    from .methods import METHODS
    from .prepare import PREPARATIONS
    from .trainer import OWN_ARGUMENTS, check_argument, training_argument_names

    _one_of("method", recipe.method, METHODS)
    for name in recipe.prepare:
        _one_of("prepare", name, PREPARATIONS)
    for key in recipe.adapter:
        if key not in ADAPTER_KEYS:
            raise ValueError(_unknown(f"adapter.{key}", str(key), "adapter", ADAPTER_KEYS))
    for key, value in recipe.training.arguments.items():
        if key in OWN_ARGUMENTS:
            raise ValueError(f"training.arguments.{key} is set by {OWN_ARGUMENTS[key]}")
        if key not in training_argument_names():
            where = "training.arguments"
            raise ValueError(_unknown(f"{where}.{key}", str(key), where, training_argument_names()))
        check_argument(key, value)
    recipe.adapter_config()
    if not recipe.tasks:
        raise ValueError("tasks must have an entry")
    tasks = recipe.all_tasks
    names = [task.name for task in tasks]
    for name in (recipe.name, *recipe.downstream, *names):
        if not FOLDER_NAME.fullmatch(name):
            raise ValueError(f"a name must be letters, digits, spaces and any of ,._+-, got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"tasks and downstream must have different names, got {names}")
    for task in recipe.tasks:
        if task.train is None:
            raise ValueError(f"tasks: {task.name} must have a training file, train")
    if recipe.instructions.embed == "task_mean":
        for task in tasks:
            if not task.instructions:
                raise ValueError(f"instructions.embed=task_mean needs instructions of each task, {task.name} has none")
    training, evaluation = recipe.training, recipe.evaluation
    limits = [
        ("training.batch_size", training.batch_size, 1),
        ("training.per_device_batch_size", training.per_device_batch_size, 1),
        ("training.max_length", training.max_length, 2),
        ("training.save_steps", training.save_steps, 1),
        ("training.logging_steps", training.logging_steps, 1),
        ("training.workers", training.workers, 0),
        ("evaluation.token_budget", evaluation.token_budget, 1),
        ("evaluation.max_new_tokens", evaluation.max_new_tokens, 1),
        ("evaluation.workers", evaluation.workers, 0),
        ("baseline.rank", recipe.baseline.rank, 1),
        ("baseline.experts", recipe.baseline.experts, 1),
        ("seed", recipe.seed, 0),
    ]
    for name, value, low in limits:
        if value is not None and value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    positive = [(f"training.{name}", getattr(training, name)) for name in ("learning_rate", "projector_learning_rate")]
    positive += [
        ("training.epochs", training.epochs),
        *((f"epochs of {task.name}", task.epochs) for task in recipe.all_tasks),
    ]
    for name, value in positive:
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if training.weight_decay < 0:
        raise ValueError(f"training.weight_decay must not be negative, got {training.weight_decay}")
    if not 0 <= training.warmup_ratio < 1:
        raise ValueError(f"training.warmup_ratio must lie in [0, 1), got {training.warmup_ratio}")


def _one_of(name: str, value: str, known: Iterable[str]) -> None:
    known = list(known)
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1, 0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}{hint}")
