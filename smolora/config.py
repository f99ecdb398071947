"""Configurations of adapters: one `peft.PeftConfig` serves a single layer and a whole model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from huggingface_hub import hf_hub_download
from torch import Tensor

from .arguments import check_choice, check_int, is_int, is_number
from .io.embeddings import INSTRUCTION_FILE, read_instruction_embeddings, write_instruction_embeddings
from .io.tensors import add_checksums, read_tensors
from .peft_compat import PeftConfig, register_peft_type

MAX_RANK = 128
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # as PEFT names them

CHOICES = {
    "route_over": ("prompt", "valid", "all"),
    "decode_routing": ("prompt", "token"),
    "fusion": ("adaptive", "mean", "vu", "if"),
    "router_grad": ("none", "straight_through"),
    "keys": ("closed", "trained"),
    "router_kind": ("random", "prototype", "ridge"),
    "router_features": ("layer", "vision", "vision+instruction", "hidden"),
    "experts": ("fixed", "grow"),
    "shared_experts": ("freeze", "train"),
    "unseen": ("nearest", "mix", "none"),
    "importance": ("shared", "expert"),
}


def dropout_threshold(p: float) -> int:
    """Return the 8-bit threshold `round(256 p)`: an element is dropped when its random byte is below it.

    Args:
        p: dropout probability in [0, 1).

    Returns:
        0 for no dropout, else 1 to 255. Kept elements are scaled by `256 / (256 - threshold)`.

    Raises:
        ValueError: `p` is not a number in [0, 1), or is positive and too small (or too close to 1) for 8 bits.
    """
    if not is_number(p) or not 0 <= p < 1:
        raise ValueError(f"lora_dropout must be a number in [0, 1), got {p!r}")
    threshold = round(256 * p)
    if p > 0 and threshold == 0:
        raise ValueError(
            f"lora_dropout={p!r} rounds to nothing: probabilities are multiples of 1/256, "
            f"so the smallest that works is just above 1/512 (use 1/256 = {1 / 256})"
        )
    if threshold == 256:
        raise ValueError(
            f"lora_dropout={p!r} rounds to 1, which drops everything: the largest is 255/256 = {255 / 256}"
        )
    return threshold


@dataclass
class MixtureConfig(PeftConfig):
    """Base of the configurations of all mixtures of low-rank experts.

    Args:
        r: rank of each expert, 1 to 128.
        lora_alpha: the adapter's output is scaled by `lora_alpha / r`.
        lora_dropout: dropout on the adapter's input; a multiple of 1/256 after rounding.
        target_modules: names of the linear layers to adapt, or a regular expression.
        exclude_modules: names to leave out, or a regular expression.
        modules_to_save: further modules to train and save.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    # Keyword arguments of a layer's call beside x; a method without any needs no routing inputs.
    takes: ClassVar[tuple[str, ...]] = ()
    # A method that has these options overrides them with fields.
    route_over: ClassVar[str] = "all"
    decode_routing: ClassVar[str] = "token"

    r: int = field(default=16, metadata={"help": "rank of each expert, 1 to 128"})
    lora_alpha: float = field(default=32, metadata={"help": "the adapter's output is scaled by lora_alpha / r"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout on the adapter's input"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "linear layers to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "linear layers to leave out"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "further modules to train and save"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = register_peft_type(self.method.upper())
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        check_int("r", self.r)
        if self.r > MAX_RANK:
            raise ValueError(f"r must be at most {MAX_RANK}, got {self.r}")
        alpha = self.lora_alpha
        if not is_number(alpha) or alpha <= 0:
            raise ValueError(f"lora_alpha must be a positive finite number, got {alpha!r}")
        dropout_threshold(self.lora_dropout)

    def __init_subclass__(cls, method: str | None = None, **kwargs: Any) -> None:
        """Set the name of the method in `smolora.MIXTURES`, by default the parent's."""
        super().__init_subclass__(**kwargs)
        cls.method = method or getattr(cls, "method", "")

    def needs(self, argument: str) -> bool:
        """Return whether a layer's call requires an argument of `takes`."""
        return argument in self.takes and argument in ("instruction", "task", "experts")

    def for_layer(self, key: str) -> MixtureConfig | None:
        """Return the configuration of the layer named `key` in a model; None if the layer gets no adapter."""
        return self

    def check_layers(self, adapted: Iterable[str]) -> None:
        """Check the configuration against the names of the layers that a model adapts.

        Raises:
            ValueError: it names a layer that is not there.
        """

    @property
    def sees_image_tokens(self) -> bool:
        """Whether a whole model routes by its image tokens alone."""
        return False

    @property
    def finds_by_question(self) -> bool:
        """Whether a whole model finds the task or experts of a sample by its image and whole question."""
        return False

    @property
    def scaling(self) -> float:
        """The factor s on every expert's output, `lora_alpha / r`."""
        return self.lora_alpha / self.r

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and add checksums to the adapter's tensors, which PEFT has just written."""
        super().save_pretrained(save_directory, **kwargs)
        weights = os.path.join(save_directory, WEIGHT_FILES[0])
        if os.path.isfile(weights):
            add_checksums(weights)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> MixtureConfig:
        """Read a saved configuration, from a folder or the Hub.

        Raises:
            ValueError: as for the constructor; or the adapter's tensors in the same folder are broken, which PEFT does
                not check.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        for name in WEIGHT_FILES:
            if os.path.isfile(os.path.join(folder, name)):
                read_tensors(os.path.join(folder, name))
        return config


@dataclass
class TaskConfig(MixtureConfig):
    """Base of the configurations of mixtures with parts for each task.

    A whole model has a `TaskSelector` for each adapter, so that it can answer without `task_ids`.

    Args:
        num_tasks: number of tasks.
        instruction_dim: size of the selector's text features, the embeddings of whole questions.
        image_dim: size of its image features, of the model's vision tower; None: as the model says.
        keys: its keys, "closed" (the normalised mean of a task's features) or "trained" (by the alignment loss).
        r, lora_alpha, lora_dropout, target_modules, exclude_modules, modules_to_save: as in `MixtureConfig`.
    """

    num_tasks: int = field(default=1, metadata={"help": "number of tasks"})
    instruction_dim: int = field(default=384, metadata={"help": "size of the selector's text features"})
    image_dim: int | None = field(default=None, metadata={"help": "size of the selector's image features"})
    keys: Literal["closed", "trained"] = field(default="closed", metadata={"help": "how the selector's keys are found"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("num_tasks", self.num_tasks)
        check_int("instruction_dim", self.instruction_dim)
        if self.image_dim is not None:
            check_int("image_dim", self.image_dim, least=0)
        check_choice("keys", self.keys, CHOICES["keys"])

    @property
    def finds_by_question(self) -> bool:
        return True


@dataclass
class SMoLoRAConfig(MixtureConfig, method="smolora"):
    """Configuration of SMoLoRA (Separable Mixture of Low-Rank Adaptation, ICCV 2025).

    The defaults are the paper's setting. Where paper and released code differ, the default is the first choice listed,
    and `SMoLoRAConfig.official()` is the released code's behaviour.

    Args:
        r: rank of each expert, 1 to 128.
        lora_alpha: the adapter's output is scaled by `lora_alpha / r`.
        lora_dropout: dropout on the adapter's input, a mask for each branch; a multiple of 1/256 after rounding.
        num_vu_experts: number of visual-understanding experts (the paper's M).
        num_if_experts: number of instruction-following experts (the paper's N - M).
        top_k: experts chosen in each branch (Eq. 5 and 6), at most `min(num_vu_experts, num_if_experts)`.
        instruction_dim: size of the instruction embedding.
        route_over: tokens whose mean routes the VU branch of a whole model: "prompt" (all but padding and answer, so
            that training and inference route alike; a sample without a prompt routes by its valid tokens), "valid"
            (all but padding) or "all".
        decode_routing: "prompt" keeps the routes of a `generate()` call's first forward; "token" routes every new
            token by itself, as released.
        fusion: "adaptive" (Eq. 8 and 9), "mean", "vu" or "if" (the ablations of Table 4).
        router_grad: "none" (a router learns only through the softmax of its chosen experts, so not at all when
            `top_k` is 1) or "straight_through" (the gates' gradients reach all logits of the branch).
        target_modules: names of the linear layers to adapt, or a regular expression.
        exclude_modules: names to leave out, or a regular expression.
        modules_to_save: further modules to train and save.
        default_instruction: row of `instruction_embeddings` that a whole model uses if a call gives no
            `instruction_embeds`; with None such a call raises.
        vu_router_kind, if_router_kind: "random" (the paper), or computed by `smolora.fit_routers`: "prototype" (the
            cosine to the means of tasks) or "ridge" (regression of tasks on features, in closed form). See
            `methods.routers`. A model with computed routers takes `task_ids` in training, and none when it answers.
        router_features: what a computed VU router sees of a sample, always of the base without adapters: "hidden" (the
            mean of the last hidden states over the routed tokens), "layer" (the mean of the layer's own input, a router
            for each layer), "vision" (the pooled output of the vision tower) or "vision+instruction" (that and the
            instruction embedding). The first two cost a forward of the base once a prompt. A computed IF router sees
            the instruction embedding.
        router_ridge: γ of a ridge router, as a share of the mean of the diagonal of C.
        experts: "fixed", or "grow" to add experts for new tasks, up to `max_experts` in each branch (None: no limit).
        vu_share, if_share: the least cosine between the mean features of two tasks that share an expert; None: they
            share one only where none is left.
        shared_experts: "freeze" (training on a task leaves experts of other tasks as they are) or "train".
        unseen: what a sample does whose best score is below `unseen_below`: use the "nearest" expert as others do,
            "mix" its `top_k` nearest ones by a softmax over their scores, or use "none".
        importance: importance vectors "shared" by the experts of a branch (the paper), or one for each "expert".
        num_tasks: number of tasks that computed routers know; `smolora.fit_routers` counts them.
        router_sizes: sizes of the features of the VU routers; None: as the model says.

    Attributes:
        instruction_embeddings: (rows, instruction_dim), or None. Saved beside the adapter in
            `instruction_embeddings.safetensors`: `save_pretrained` writes it, `from_pretrained` reads it if
            `default_instruction` is set.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    takes: ClassVar[tuple[str, ...]] = ("instruction", "route_mask", "routes", "gates")

    num_vu_experts: int = field(default=4, metadata={"help": "number of visual-understanding experts"})
    num_if_experts: int = field(default=4, metadata={"help": "number of instruction-following experts"})
    top_k: int = field(default=1, metadata={"help": "experts chosen in each branch"})
    instruction_dim: int = field(default=384, metadata={"help": "size of the instruction embedding"})
    route_over: Literal["prompt", "valid", "all"] = field(  # type: ignore[misc]
        default="prompt", metadata={"help": "tokens whose mean routes the VU branch"}
    )
    decode_routing: Literal["prompt", "token"] = field(  # type: ignore[misc]
        default="prompt", metadata={"help": "route once a generate() call, or every new token"}
    )
    fusion: Literal["adaptive", "mean", "vu", "if"] = field(
        default="adaptive", metadata={"help": "how the two branches are combined"}
    )
    router_grad: Literal["none", "straight_through"] = field(
        default="none", metadata={"help": "which gradient the routers get"}
    )
    default_instruction: int | None = field(
        default=None, metadata={"help": "row of the saved instruction embeddings to use where a call gives none"}
    )
    vu_router_kind: Literal["random", "prototype", "ridge"] = field(
        default="random", metadata={"help": "how the VU router comes about"}
    )
    if_router_kind: Literal["random", "prototype", "ridge"] = field(
        default="random", metadata={"help": "how the IF router comes about"}
    )
    router_features: Literal["layer", "vision", "vision+instruction", "hidden"] = field(
        default="hidden", metadata={"help": "what a computed VU router sees"}
    )
    router_ridge: float = field(default=1e-3, metadata={"help": "strength of ridge regression"})
    experts: Literal["fixed", "grow"] = field(default="fixed", metadata={"help": "whether new tasks add experts"})
    max_experts: int | None = field(default=None, metadata={"help": "most experts of a branch that grows"})
    vu_share: float | None = field(default=None, metadata={"help": "cosine from which tasks share a VU expert"})
    if_share: float | None = field(default=0.99, metadata={"help": "cosine from which tasks share an IF expert"})
    shared_experts: Literal["freeze", "train"] = field(
        default="freeze", metadata={"help": "whether a task trains the experts of other tasks"}
    )
    unseen: Literal["nearest", "mix", "none"] = field(
        default="nearest", metadata={"help": "what a sample that is far from all tasks uses"}
    )
    unseen_below: float = field(default=0.5, metadata={"help": "best score of a sample that counts as unseen"})
    importance: Literal["shared", "expert"] = field(
        default="shared", metadata={"help": "importance vectors of a branch, or of each expert"}
    )
    num_tasks: int = field(default=0, metadata={"help": "number of tasks that computed routers know"})
    router_sizes: list[int] | None = field(default=None, metadata={"help": "sizes of the VU routers' features"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_vu_experts", "num_if_experts", "top_k", "instruction_dim"):
            check_int(name, getattr(self, name))
        for name in ("route_over", "decode_routing", "fusion", "router_grad"):
            check_choice(name, getattr(self, name), CHOICES[name])
        self._check_routers()
        if not self.computes_routes and self.top_k > min(self.num_vu_experts, self.num_if_experts):
            raise ValueError(
                f"top_k must be at most min(num_vu_experts, num_if_experts) = "
                f"{min(self.num_vu_experts, self.num_if_experts)}, got {self.top_k}"
            )
        row = self.default_instruction
        if row is not None and not is_int(row, 0):
            raise ValueError(f"default_instruction must be a row number or None, got {row!r}")
        self.instruction_embeddings: Tensor | None = None
        self.instruction_texts: list[str | list[str] | None] | None = None

    def _check_routers(self) -> None:
        """Check the options of computed routers.

        Raises:
            ValueError: one does not fit; the message names it.
        """
        for branch in ("vu", "if"):
            check_choice(f"{branch}_router_kind", self.router_kind(branch), CHOICES["router_kind"])
            share = self.share(branch)
            if share is not None and not (is_number(share) and -1 <= share <= 1):
                raise ValueError(f"{branch}_share must be a cosine, -1 to 1, or None, got {share!r}")
        for name in ("router_features", "experts", "shared_experts", "unseen", "importance"):
            check_choice(name, getattr(self, name), CHOICES[name])
        if not is_number(self.router_ridge) or self.router_ridge <= 0:
            raise ValueError(f"router_ridge must be a positive finite number, got {self.router_ridge!r}")
        if not is_number(self.unseen_below):
            raise ValueError(f"unseen_below must be a finite number, got {self.unseen_below!r}")
        check_int("num_tasks", self.num_tasks, least=0)
        if self.max_experts is not None:
            check_int("max_experts", self.max_experts)
        changed = {"experts": "fixed", "max_experts": None, "unseen": "nearest"}
        for name, default in changed.items():
            if not self.computes_routes and getattr(self, name) != default:
                raise ValueError(
                    f"{name} must be {default!r} where vu_router_kind and if_router_kind are 'random', got "
                    f"{getattr(self, name)!r}"
                )

    def router_kind(self, branch: str) -> str:
        """Return how the router of a branch, "vu" or "if", comes about."""
        return str(getattr(self, f"{branch}_router_kind"))

    def share(self, branch: str) -> float | None:
        """Return the least cosine between tasks that share an expert of a branch."""
        share: float | None = getattr(self, f"{branch}_share")
        return share

    def num_experts(self, branch: str) -> int:
        """Return the number of experts of a branch."""
        return int(getattr(self, f"num_{branch}_experts"))

    @property
    def computed_branches(self) -> list[str]:
        """The branches that the fusion uses and whose router is computed."""
        used = {"vu": ("vu",), "if": ("if",)}.get(self.fusion, ("vu", "if"))
        return [branch for branch in used if self.router_kind(branch) != "random"]

    @property
    def computes_routes(self) -> bool:
        """Whether a router is computed."""
        return bool(self.computed_branches)

    @classmethod
    def official(cls, **overrides: Any) -> SMoLoRAConfig:
        """Make the released code's configuration: every position routes, and every decoded token by itself."""
        return cls(**{"route_over": "all", "decode_routing": "token", **overrides})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and `instruction_embeddings.safetensors` if there are any."""
        super().save_pretrained(save_directory, **kwargs)
        if self.instruction_embeddings is not None:
            texts = self.instruction_texts or [None] * len(self.instruction_embeddings)
            write_instruction_embeddings(save_directory, self.instruction_embeddings, texts)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SMoLoRAConfig:
        """Read a saved configuration, from a folder or the Hub, with the instruction embeddings its default needs.

        Raises:
            FileNotFoundError: `default_instruction` is set and the embeddings are not there.
            ValueError: as for the constructor, and as `load_instruction_embeddings`; or the adapter's tensors in the
                same folder are broken, which PEFT does not check.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, SMoLoRAConfig) and config.default_instruction is not None:
            folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
            path = os.path.join(folder, INSTRUCTION_FILE)
            if not os.path.isdir(folder):
                download = cls._split_kwargs(kwargs)[0]
                path = hf_hub_download(pretrained_model_name_or_path, INSTRUCTION_FILE, subfolder=subfolder, **download)
            config.load_instruction_embeddings(path)
        return config

    def load_instruction_embeddings(self, path: str | os.PathLike) -> None:
        """Set `instruction_embeddings` from an `instruction_embeddings.safetensors`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is broken, or does not hold floating point rows of `instruction_dim` alone.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"there is no {path}, the instruction embeddings of default_instruction")
        embeddings, texts = read_instruction_embeddings(path)
        if embeddings.shape[1] != self.instruction_dim:
            raise ValueError(
                f"{path} has embeddings of size {embeddings.shape[1]}, instruction_dim is {self.instruction_dim}"
            )
        self.instruction_embeddings, self.instruction_texts = embeddings, texts

    def default_embedding(self) -> Tensor | None:
        """Return the embedding (instruction_dim,) of `default_instruction`, or None if that is None.

        Raises:
            ValueError: `instruction_embeddings` are not loaded, or have no such row.
        """
        if self.default_instruction is None:
            return None
        if self.instruction_embeddings is None:
            raise ValueError(
                f"default_instruction={self.default_instruction} is a row of the instruction embeddings, which are not "
                "loaded: call load_instruction_embeddings(path) of this configuration, or give instruction_embeds"
            )
        rows = self.instruction_embeddings.shape[0]
        if self.default_instruction >= rows:
            raise ValueError(
                f"default_instruction must be a row below {rows}, the number of instruction embeddings, "
                f"got {self.default_instruction}"
            )
        return self.instruction_embeddings[self.default_instruction]

    def needs(self, argument: str) -> bool:
        if argument in ("task", "routes", "gates"):
            return self.computes_routes
        return super().needs(argument) and self.fusion != "vu" and self.if_router_kind == "random"

    @property
    def routers_learn(self) -> bool:
        """Whether a gradient reaches random routers.

        With one chosen expert the gate is the constant 1, and none does. Beside a computed router none does either.
        """
        return not self.computes_routes and (self.top_k > 1 or self.router_grad == "straight_through")
