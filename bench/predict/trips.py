"""Declared trip counts: how often each loop of a kernel runs in one program, by the name of the loop's variable.

A loop that the compiler unrolls whole needs no entry. A loop in machine code without one is an error that names it, so
a kernel with a new loop cannot be predicted by accident. Where the first number of a grid is shared out among two kinds
of programs by an `if`, DISPATCH says how many there are of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smolora.launch import cdiv


class Arguments:
    """A launch's constants and numbers by name, and its grid."""

    def __init__(self, values: dict[str, Any], grid: tuple[int, ...]) -> None:
        self.values = values
        self.grid = (*grid, *(1,) * (3 - len(grid)))

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(f"the launch has no argument {name!r}") from None


Count = Callable[[Arguments], float]


def _blocks(length: str, block: str) -> Count:
    """Count the blocks of an axis that one of its `grid[1]` programs has, at most."""
    return lambda a: cdiv(cdiv(getattr(a, length), getattr(a, block)), a.grid[1])


def _chunk(a: Arguments) -> float:
    return cdiv(min(a.CHUNK, a.seq_len), a.BT)


TRIPS: dict[str, dict[str, Count]] = {
    "copy_kernel": {"i": lambda a: a.iterations},
    "route_instruction_and_w_kernel": {
        "e": lambda a: cdiv(a.instruction_dim, a.BE),
        "s": lambda a: cdiv(a.seq_len, a.BS),
    },
    "shrink_kernel": {"c": _blocks("d", "BD")},
    "router_logits_kernel": {"tile": lambda a: cdiv(a.seq_len, a.BT)},
    "choose_kernel": {"i": lambda a: a.slices},
    "reduce_split_k_kernel": {"i": lambda a: a.w_parts, "s": lambda a: a.SPLIT_K // a.GROUP},
    "fuse_expand_kernel": {"c": _blocks("k", "BK")},
    "grad_output_kernel": {"t": _chunk},
    "mix_backward_kernel": {"i": lambda a: a.p_parts},
    "reduce_dw_dweights_kernel": {"t": lambda a: cdiv(a.num_tiles, a.TILES)},
    "reduce_dB_kernel": {"chunk": lambda a: a.chunks},
    "grad_input_kernel": {"t": _chunk},
    "reduce_dA_kernel": {"chunk": lambda a: a.chunks},
}
# programs that take the `if pid < ...` of a kernel; the others of the grid take its `else`
DISPATCH: dict[str, Count] = {
    "route_instruction_and_w_kernel": lambda a: a.num_seqs,
    "reduce_split_k_kernel": lambda a: a.num_tiles,
    "reduce_dw_dweights_kernel": lambda a: a.EXPERTS,
}
# the share of a tensor's masked loads that are not masked, where a program reads only what one expert's tokens wrote
ACTIVE: dict[tuple[str, str], Count] = {
    ("reduce_dB_kernel", "B_part_ptr"): lambda a: 1 / a.E,
    ("reduce_dA_kernel", "part_ptr"): lambda a: 1 / a.grid[0],
    ("reduce_dw_dweights_kernel", "dw_part_ptr"): lambda a: 2 / a.EXPERTS,
}
