"""The keys of a recipe, their types, defaults and bounds.

Relative paths start in the current directory, and `~` is the home folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Field, Strict, Tag
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticKnownError

from ..config import SMoLoRAConfig
from ..data.own import own_name
from ..io.files import surrogate, user_path


def _without_surrogates(text: str) -> str:
    """Refuse half characters, which no file and no tokenizer takes."""
    if surrogate(text) is not None:
        raise PydanticKnownError("string_unicode")
    return text


def _number(value: Any) -> Any:
    """Read what YAML 1.1 takes for text and people mean as a number, such as 1e-4."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _listed(value: Any) -> Any:
    """Read a text as a list of one."""
    return [value] if isinstance(value, str) else value


def _mapping(value: Any) -> Any:
    """Read a section whose lines are all commented out as an empty one."""
    return {} if value is None else value


def _argument_paths(arguments: dict[str, Any]) -> dict[str, Any]:
    """Expand `~` in the arguments that name a file."""
    files = {key: user_path(arguments[key]) for key in ARGUMENT_PATHS if isinstance(arguments.get(key), str)}
    return {**arguments, **files}


# Values are taken as they are written: 1 is no text and no boolean, "1" is no integer.
Text = Annotated[str, Strict(), AfterValidator(_without_surrogates)]
PathText = Annotated[Text, AfterValidator(user_path)]
Flag = Annotated[bool, Strict()]
Natural = Annotated[int, Strict(), Field(ge=0)]
Count = Annotated[int, Strict(), Field(ge=1)]
Number = Annotated[float, Strict(), BeforeValidator(_number)]
Positive = Annotated[Number, Field(gt=0)]
Options = Annotated[dict[str, Any], BeforeValidator(_mapping)]

ARGUMENT_PATHS = ("deepspeed", "fsdp_config")  # fields of TrainingArguments that name a file, or hold its content
ADAPTER_KEYS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "num_vu_experts",
    "num_if_experts",
    "top_k",
    "instruction_dim",
    "route_over",
    "decode_routing",
    "fusion",
    "router_grad",
    "target_modules",
    "exclude_modules",
)
SECTION = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, config=SECTION)
class MethodRecipe:
    """A method made of its parts.

    Args:
        adapter: what is put into the model, a name of `smolora.train.methods.method.ADAPTERS`.
        schedule: names of its `COURSES` (at most one, by default "sequential") and `ADD_ONS`.
    """

    adapter: Text
    schedule: list[Text] = field(default_factory=list)


MethodChoice = Annotated[
    Annotated[Text, Tag("<name>")] | Annotated[MethodRecipe, Tag("<parts>")],
    Discriminator(lambda value: "<parts>" if isinstance(value, (dict, MethodRecipe)) else "<name>"),
]


@dataclass(frozen=True, config=SECTION)
class ModelRecipe:
    """The base model.

    Args:
        path: folder of the model, with its tokenizer and image processor.
        dtype: data type of the weights and of the computation. Adapters stay float32.
        prompt: how it is spoken to: "vicuna_v1" (LLaVA-1.5 as released), "minigpt4" (MiniGPT-4 with Vicuna, as
            released) or "chat" (its own chat template and processor); None for the one that fits the folder, see
            `smolora.backbones.load.load_backbone`.
    """

    path: PathText
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    prompt: Literal["vicuna_v1", "minigpt4", "chat"] | None = None


@dataclass(frozen=True, config=SECTION)
class DataRecipe:
    """The folders with the data.

    Args:
        root: folder that the tasks' file paths are relative to.
        images: folder that the records' image paths are relative to; None for `root`.
        annotations: folders with further files for scoring, either directly or in a subfolder named after the dataset.
    """

    root: PathText
    images: PathText | None = None
    annotations: list[PathText] = field(default_factory=list)


@dataclass(frozen=True, config=SECTION)
class InstructionRecipe:
    """The embeddings that route the instruction-following experts.

    Args:
        where: what of a conversation is the instruction. "last_line" of the last question (or the task's
            `instructions` that it ends with), "system" (the system message), "user" (the last question as a whole), or
            "marked" (the part of it between <instruction> and </instruction>, which stay in the prompt).
        embed: "sample" embeds each sample's own instruction. "task_mean" takes the mean over its task's `instructions`,
            as the released multi-type setting does.
        encoder: folder of a sentence-transformers model; None for the packaged all-MiniLM-L6-v2.
        normalize: scale embeddings to length 1. The released ones are not.
    """

    embed: Literal["sample", "task_mean"] = "sample"
    where: Literal["last_line", "system", "user", "marked"] = "last_line"
    encoder: PathText | None = None
    normalize: Flag = False


@dataclass(frozen=True, config=SECTION)
class BaselineRecipe:
    """The adapters of the LoRA baselines.

    Args:
        rank: LoRA rank; None for r (M + N), which gives as many trainable parameters as SMoLoRA has.
        alpha: LoRA alpha; None for the alpha that gives SMoLoRA's scaling, lora_alpha / r.
        experts: number of experts of MoELoRA; None for M + N.
    """

    rank: Count | None = None
    alpha: Number | None = None
    experts: Count | None = None


@dataclass(frozen=True, config=SECTION)
class TaskRecipe:
    """A task that a stage trains on, or that is evaluated downstream.

    Args:
        name: names its stage and its column in the results.
        test: the test file.
        train: the training file; None for a task that is only evaluated.
        dataset: the evaluator's dataset that it is scored as; None for `name`. Not with `metric`.
        metric: of a task of one's own, a name of `smolora.evaluate.own.METRICS` or `python:FILE:FUNCTION`, or a list of
            them. The first is the matrix's, the others are printed beside it.
        format: what follows the instruction, for MIF (see `smolora.evaluate.own.format_of`); None for no MIF.
        images: folder that its image paths are relative to; None for `data.images`.
        instructions: the instruction texts at the end of its prompts. Without them the benchmark's own are looked for,
            and a prompt that ends with none of these has its last line as its instruction.
        epochs: epochs of a stage that trains this task alone, such as a few-shot one; None for `training.epochs`.
        batch_size: samples per optimiser step of such a stage; None for `training.batch_size`.
    """

    name: Text
    test: PathText
    train: PathText | None = None
    dataset: Text | None = None
    images: PathText | None = None
    instructions: list[Text] = field(default_factory=list)
    epochs: Positive | None = None
    batch_size: Count | None = None
    metric: Annotated[list[Text], BeforeValidator(_listed)] = field(default_factory=list)
    format: Text | None = None

    @property
    def benchmark_name(self) -> str:
        """The name of the evaluator's dataset."""
        return own_name(self.metric, self.format) if self.metric else self.dataset or self.name


@dataclass(frozen=True, config=SECTION)
class TrainingRecipe:
    """The training of a stage.

    Args:
        batch_size: samples per optimiser step, over all devices.
        per_device_batch_size: samples per forward on one device. Gradients are accumulated up to `batch_size`.
        projector_learning_rate: learning rate of the projector's adapters, or of the projector itself; None for
            `learning_rate`.
        full_projector: train the projector itself, in float32, in place of adapters in it. It is saved with the
            adapter, and later stages go on with it.
        schedule: "cosine" or "constant", both after a linear warm-up over `warmup_ratio` of the steps.
        max_length: maximum number of tokens. Longer samples are cut at the end.
        activation_checkpointing: recompute activations in the backward pass.
        save_steps, logging_steps: steps between two checkpoints, and between two lines of the log.
        workers: image-loading processes per device.
        arguments: further fields of `transformers.TrainingArguments` (report_to, deepspeed, fsdp, optim, ...). Those
            that would break a promise of the trainer are refused, see `smolora.recipe.arguments.REFUSED_ARGUMENTS`.
    """

    epochs: Positive = 1
    batch_size: Count = 64
    per_device_batch_size: Count = 8
    learning_rate: Positive = 1e-4
    projector_learning_rate: Positive | None = None
    full_projector: Flag = False
    weight_decay: Annotated[Number, Field(ge=0)] = 0.01
    warmup_ratio: Number = 0.03
    schedule: Literal["cosine", "constant"] = "cosine"
    max_length: Annotated[int, Strict(), Field(ge=2)] = 2048
    activation_checkpointing: Flag = False
    save_steps: Count = 200
    logging_steps: Count = 10
    workers: Natural = 4
    arguments: Annotated[Options, AfterValidator(_argument_paths)] = field(default_factory=dict)


@dataclass(frozen=True, config=SECTION)
class EvaluationRecipe:
    """Generation and scoring of answers.

    Args:
        protocol: "smolora" (comparable with the paper's tables), "standard" (the metric as the field defines it) or
            "coin" (CoIN's eight datasets and its scorers as released).
        token_budget: maximum number of prompt tokens in a batch, padding included.
        max_new_tokens: maximum length of an answer; None for the released limit of each dataset.
        padding: "all" pads every image to a square, as in training. "released" crops instead for the datasets that
            the released evaluation crops: four of CVIT's, all of CoIN's.
        workers: image-loading processes per device.
    """

    protocol: Literal["smolora", "standard", "coin"] = "smolora"
    token_budget: Count = 16384
    max_new_tokens: Count | None = None
    padding: Literal["all", "released"] = "all"
    workers: Natural = 2


@dataclass(frozen=True, config=SECTION)
class Recipe:
    """An experiment.

    Args:
        name: name of the run.
        output: folder of the run; None for `runs/<name>`.
        method: a name of `smolora.train.methods.METHODS`, or an adapter and a schedule.
        methods: options of adapters and add-ons, by name.
        model, data, instructions, baseline, training, evaluation: sections, see their classes.
        adapter: arguments of `SMoLoRAConfig`; the allowed ones are `ADAPTER_KEYS`.
        tasks: upstream tasks in the order of training.
        order: names of all upstream tasks in another order of training; None for that of `tasks`.
        downstream: tables of tasks by name ("zero-shot", "few-shot"). A task with a training file is trained from the
            last stage's adapter first; the others are evaluated with that adapter.
        benchmark: name of the benchmark; None for `name`. The report shows the paper's rows beside "CVIT" (its tables
            of LLaVA) and "CVIT, MiniGPT-4" (its Table 7).
        setting: type of the instructions, "single" or "multi", for the report.
        prepare: data or models that the recipe makes itself: names of `smolora.train.prepare.PREPARATIONS`, each with
            its options.
        seed: seed of everything random.
        backend: backend of the adapters, as `smolora.use_backend` takes it.
    """

    name: Text
    model: ModelRecipe
    data: DataRecipe
    tasks: list[TaskRecipe]
    order: list[Text] | None = None
    output: PathText | None = None
    benchmark: Text | None = None
    setting: Literal["single", "multi"] = "single"
    method: MethodChoice = "smolora"
    methods: Annotated[dict[str, Options], BeforeValidator(_mapping)] = field(default_factory=dict)
    seed: Natural = 0
    backend: Literal["auto", "torch", "triton", "cuda"] = "auto"
    prepare: Options = field(default_factory=dict)
    instructions: InstructionRecipe = field(default_factory=InstructionRecipe)
    adapter: Options = field(default_factory=dict)
    baseline: BaselineRecipe = field(default_factory=BaselineRecipe)
    downstream: Annotated[dict[str, list[TaskRecipe]], BeforeValidator(_mapping)] = field(default_factory=dict)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.output or f"runs/{self.name}")

    @property
    def all_tasks(self) -> list[TaskRecipe]:
        """Upstream and downstream tasks."""
        return [*self.tasks, *(task for tasks in self.downstream.values() for task in tasks)]

    @property
    def method_name(self) -> str:
        """The method's name, put together of its parts where it has none."""
        if isinstance(self.method, str):
            return self.method
        return " + ".join([self.method.adapter, *self.method.schedule])

    @property
    def num_task_ids(self) -> int:
        """Number of tasks that an adapter tells apart: the upstream ones, and one for those of few-shot stages."""
        return len(self.tasks) + any(task.train is not None for tasks in self.downstream.values() for task in tasks)

    def task_id(self, task: TaskRecipe) -> int | None:
        """The place of an upstream task, the number of them for a few-shot one; None for one that is never trained."""
        names = [other.name for other in self.tasks]
        if task.name in names:
            return names.index(task.name)
        return None if task.train is None else len(names)

    def epochs(self, tasks: Sequence[TaskRecipe]) -> float:
        """Epochs of a stage that trains these tasks."""
        own = tasks[0].epochs if len(tasks) == 1 else None
        return self.training.epochs if own is None else own

    def of_stage(self, tasks: Sequence[TaskRecipe]) -> Recipe:
        """The recipe of a stage that trains these tasks, with the batch size of a single one."""
        own = tasks[0].batch_size if len(tasks) == 1 else None
        if own is None:
            return self
        return dataclasses.replace(self, training=dataclasses.replace(self.training, batch_size=own))

    def adapter_config(self, **changes: Any) -> SMoLoRAConfig:
        """The adapter's configuration, with changes."""
        return SMoLoRAConfig(**{**self.adapter, **changes})

    def train_file(self, task: TaskRecipe) -> Path:
        """Path of a task's training file."""
        return Path(self.data.root, task.train or "")

    def test_file(self, task: TaskRecipe) -> Path:
        """Path of a task's test file."""
        return Path(self.data.root, task.test)

    def images(self, task: TaskRecipe) -> Path:
        """Folder that a task's image paths are relative to."""
        return Path(task.images or self.data.images or self.data.root)

    def annotations(self, task: TaskRecipe) -> list[Path]:
        """Folders in which scoring looks for a task's files."""
        return [self.test_file(task).parent, *map(Path, self.data.annotations)]

    def as_dict(self) -> dict[str, Any]:
        """The recipe with all defaults filled in; `load_recipe` reads it back from YAML."""
        return dataclasses.asdict(self)
