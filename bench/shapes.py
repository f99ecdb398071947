"""The shapes that are measured: a case is one linear layer with its adapter and its batch. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Shape:
    """A layer `d -> k` with experts of rank `r`, on `batch` instances of `seq` tokens."""

    name: str
    d: int
    k: int
    r: int = 16
    batch: int = 8
    seq: int = 1024
    dtype: str = "bfloat16"
    dropout: float = 0.05
    bias: bool = False
    ffn: int = 0  # how often this shape occurs in one FFN block

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def item(self) -> int:
        """Bytes of one element of x, W and y."""
        return ITEM_BYTES[self.dtype]

    def counts(self) -> str:
        """Say how many experts there are."""
        raise NotImplementedError

    def describe(self) -> str:
        return (
            f"{self.name}: d {self.d} -> k {self.k}, r {self.r}, {self.counts()}, "
            f"{self.batch}x{self.seq} tokens, {self.dtype}, dropout {self.dropout:g}"
        )


@dataclass(frozen=True)
class SMoLoRACase(Shape):
    """A layer with SMoLoRA: `vu` + `if_` experts."""

    method: ClassVar[str] = "smolora"

    vu: int = 4
    if_: int = 4

    def counts(self) -> str:
        return f"{self.vu}+{self.if_} experts"


@dataclass(frozen=True)
class MixtureCase(Shape):
    """A layer with another method; a number that means nothing to it is None."""

    method: str = "moelora"
    experts: int | None = None  # experts, or branches
    tasks: int | None = None
    active: int | None = None  # experts that a sequence uses

    @property
    def task_r(self) -> int:
        """Rank of a task's pair within LiLoRA's B, half of r as its authors have it."""
        return max(1, self.r // 2)

    @property
    def columns(self) -> int:
        """Numbers that A makes of a token."""
        return self.r * {"moelora": self.experts, "routedlora": self.active}.get(self.method, 1)

    @property
    def mixed(self) -> int:
        """Numbers of a token that B is multiplied by, once they are mixed."""
        return self.r * {"moelora": self.experts, "lilora": 1}.get(self.method, self.active)

    def counts(self) -> str:
        numbers = {"experts": self.experts, "active": self.active, "tasks": self.tasks}
        return f"{self.method}, " + ", ".join(f"{n} {what}" for what, n in numbers.items() if n is not None)


# The numbers that each method has, and their defaults.
METHODS: dict[str, dict[str, int]] = {
    "smolora": {"vu": 4, "if_": 4},
    "moelora": {"experts": 8},
    "branchlora": {"experts": 8, "active": 2, "tasks": 8},
    "lilora": {"tasks": 8},
    "routedlora": {"experts": 8, "active": 2},
}


def _llava(d: int, k: int) -> tuple[SMoLoRACase, ...]:
    return (
        SMoLoRACase("gate/up", d, k, ffn=2),
        SMoLoRACase("down", k, d, ffn=1),
        SMoLoRACase("projector 1", 1024, d, bias=True),
        SMoLoRACase("projector 2", d, d, bias=True),
    )


PRESETS: dict[str, tuple[SMoLoRACase, ...]] = {
    "llava-7b": _llava(4096, 11008),
    "llava-13b": _llava(5120, 13824),
    "small": (SMoLoRACase("small", 1024, 2752, batch=4, seq=256, dtype="float32"),),
}
