"""The shapes that are measured: one `Case` is one linear layer with its adapter and its batch. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Case:
    """A layer `d -> k` with `vu` + `if_` experts of rank `r`, on `batch` instances of `seq` tokens."""

    name: str
    d: int
    k: int
    r: int = 16
    vu: int = 4
    if_: int = 4
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

    def describe(self) -> str:
        return (
            f"{self.name}: d {self.d} -> k {self.k}, r {self.r}, {self.vu}+{self.if_} experts, "
            f"{self.batch}x{self.seq} tokens, {self.dtype}, dropout {self.dropout:g}"
        )


def _llava(d: int, k: int) -> tuple[Case, ...]:
    return (
        Case("gate/up", d, k, ffn=2),
        Case("down", k, d, ffn=1),
        Case("projector 1", 1024, d, bias=True),
        Case("projector 2", d, d, bias=True),
    )


PRESETS: dict[str, tuple[Case, ...]] = {
    "llava-7b": _llava(4096, 11008),
    "llava-13b": _llava(5120, 13824),
    "small": (Case("small", 1024, 2752, batch=4, seq=256, dtype="float32"),),
}
