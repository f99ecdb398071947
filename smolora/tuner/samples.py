"""Per-sample arguments of a model's forward, besides tokens and images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import MixtureConfig
from ..methods.checks import reads_values

KEYWORDS = {  # a forward's keyword to a layer's argument
    "instruction_embeds": "instruction",
    "task_ids": "task",
    "experts": "experts",
    "expert_weights": "weights",
}
MISSING = {
    "instruction": "instruction_embeds must be given to the model's forward or generate(): embeddings of the "
    "instructions, one row a sample, or a vector for all; the adapters route by it, and no default_instruction is "
    "configured",
    "task": "task_ids must be given to the model's forward or generate(): the task of each sample, or one for all; the "
    "adapters have parameters or experts for each. In eval mode an adapter whose TaskSelector has keys, or whose "
    "routers smolora.fit_routers has computed, finds them",
    "experts": "experts must be given to the model's forward or generate(): the numbers of those that each sample uses",
}


class Samples(NamedTuple):
    """Arguments for each of n samples, under the layers' names; None where not given."""

    instruction: Tensor | None = None  # (n, e), or (e,) for all
    task: Tensor | None = None  # int (n,)
    experts: Tensor | None = None  # int (n, c)
    weights: Tensor | None = None  # (n, c)
    routes: Tensor | None = None  # int (n, routers, 2, K), what computed routers found, and the next two with it
    gates: Tensor | None = None  # (n, routers, 2, K)
    margins: Tensor | None = None  # (n, routers, 2)

    @property
    def differ(self) -> bool:
        """Whether the samples may differ: an argument has rows for more than one."""
        return any(self.is_by_sample(name) and value.shape[0] > 1 for name, value in self.given())

    def given(self) -> list[tuple[str, Tensor]]:
        """Return what is given, by name."""
        return [(name, value) for name, value in self._asdict().items() if value is not None]

    def is_by_sample(self, name: str) -> bool:
        """Return whether an entry has a row for each sample."""
        return name != "instruction" or (self.instruction is not None and self.instruction.dim() == 2)

    def repeat(self, copies: int) -> Samples:
        """Repeat each sample for its beams, as `generate()` does with its inputs."""
        return self._replace(
            **{name: t.repeat_interleave(copies, 0) for name, t in self.given() if self.is_by_sample(name)}
        )

    def fill(self, other: Samples) -> Samples:
        """Fill what is missing from another one."""
        return Samples(*(mine if mine is not None else theirs for mine, theirs in zip(self, other, strict=True)))

    def check_complete(self, configs: Sequence[MixtureConfig]) -> None:
        """Check that all arguments are there that the adapters need.

        Raises:
            ValueError: one is missing.
        """
        for name, message in MISSING.items():
            if getattr(self, name) is None and any(config.needs(name) for config in configs):
                raise ValueError(message)


def read_samples(
    own: dict[str, Any], configs: Sequence[MixtureConfig], samples: int | None, packed: bool = False
) -> Samples:
    """Check the per-sample arguments of a forward; those that no adapter takes are dropped.

    Args:
        own: our keywords of the forward.
        configs: of the adapters in use.
        samples: n; None if unknown.
        packed: whether they are packed in rows, for messages.

    Raises:
        TypeError, ValueError: an argument does not fit the adapters or the number of samples.
    """
    return Samples(
        _instruction(own["instruction_embeds"], configs, samples, packed),
        _task(own["task_ids"], configs, samples),
        *_experts(own["experts"], own["expert_weights"], configs, samples),
    )


def _instruction(given: Any, configs: Sequence[MixtureConfig], samples: int | None, packed: bool) -> Tensor | None:
    """Check the instruction; return it, or the configured default, or None."""
    configs = [c for c in configs if c.needs("instruction")]
    if given is None and len(configs) == 1:
        return configs[0].default_embedding()
    if given is None or not configs:
        return None
    for config in configs:
        check_text(given, config.instruction_dim, samples, packed)
    return given


def check_text(given: Any, e: int, samples: int | None, packed: bool = False) -> None:
    """Check `instruction_embeds` of size e.

    Raises:
        TypeError, ValueError: they do not fit the samples.
    """
    if not isinstance(given, Tensor) or not given.is_floating_point():
        got = f"dtype {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"instruction_embeds must be a floating point tensor, got {got}")
    rows = "B" if samples is None else samples
    fits = given.dim() == 1 or (given.dim() == 2 and samples in (None, given.shape[0]))
    if not fits or given.shape[-1] != e:
        raise ValueError(
            f"instruction_embeds must have shape ({rows}, {e}), one row for each sample"
            f"{' that is packed in the rows' if packed else ''}, or ({e},) for all, got {tuple(given.shape)}"
        )


def _task(given: Any, configs: Sequence[MixtureConfig], samples: int | None) -> Tensor | None:
    """Check the task ids; return one for each sample."""
    configs = [c for c in configs if c.needs("task")]
    if given is None or not configs:
        return None
    number = isinstance(given, int) and not isinstance(given, bool)
    if number or (isinstance(given, Tensor) and given.dim() == 0 and not given.is_floating_point()):
        given = torch.as_tensor(given).expand(1 if samples is None else samples)
    below = min(c.num_tasks for c in configs)
    if below == 0:
        raise ValueError("task_ids must be of tasks that smolora.fit_routers has seen, and it has seen none")
    _check_integers("task_ids", given, 1, samples, below=below, least=0)
    return given.long()


def _experts(
    given: Any, weights: Any, configs: Sequence[MixtureConfig], samples: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """Check the experts of each sample and their weights."""
    configs = [c for c in configs if c.needs("experts")]
    if not configs:
        return None, None
    if given is None:
        if weights is not None:
            raise ValueError("expert_weights must come with experts, got expert_weights alone")
        return None, None
    _check_integers("experts", given, 2, samples, below=min(c.num_experts for c in configs), least=-1)
    if weights is None:
        return given, None
    if not isinstance(weights, Tensor) or not weights.is_floating_point() or weights.shape != given.shape:
        got = f"{weights.dtype} of {tuple(weights.shape)}" if isinstance(weights, Tensor) else repr(weights)
        raise ValueError(f"expert_weights must be floating point of shape {tuple(given.shape)}, as experts, got {got}")
    return given, weights


def _check_integers(name: str, value: Any, dim: int, samples: int | None, *, below: int, least: int) -> None:
    """Check ids of tasks or experts.

    Raises:
        ValueError: they are not integers, not one row for each sample, or out of range.
    """
    rows = "B" if samples is None else samples
    shape = f"({rows},)" if dim == 1 else f"({rows}, c)"
    integers = (torch.int32, torch.int64)
    if not isinstance(value, Tensor) or value.dim() != dim or value.dtype not in integers:
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} must be int32 or int64 of shape {shape}, one for each sample, got {got}")
    if samples not in (None, value.shape[0]):
        raise ValueError(f"{name} must have shape {shape}, one for each sample, got {tuple(value.shape)}")
    if reads_values(value) and value.numel() and not bool(((value >= least) & (value < below)).all()):
        raise ValueError(f"{name} must lie in {least} to {below - 1}, which the adapters have, got {value.tolist()}")
