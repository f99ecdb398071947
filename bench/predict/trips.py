"""Declared trip counts: how often each loop of a kernel runs in one program, by the name of the loop's variable.

A loop that the compiler unrolls whole needs no entry, nor does one whose `range` is written in the launch's own
arguments. Any other loop in machine code without an entry is an error that names it.
"""

from __future__ import annotations

import ast
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
    return cdiv(min(a.chunk_size, a.seq_len), a.BT)


def of_range(statement: ast.For, arguments: Arguments) -> int | None:
    """Return the trips of a loop over `range`, if its bounds are numbers and arguments of the launch."""
    call = statement.iter
    if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "range"):
        return None
    bounds = []
    for bound in call.args:
        value = bound.value if isinstance(bound, ast.Constant) else arguments.values.get(ast.unparse(bound))
        if not isinstance(value, int):
            return None
        bounds.append(value)
    return len(range(*bounds))


TRIPS: dict[str, dict[str, Count]] = {
    "route_instruction_and_w_kernel": {"s": lambda a: cdiv(a.seq_len, a.BS)},
    "shrink_kernel": {"c": _blocks("d", "BD")},
    "router_logits_kernel": {"tile": lambda a: cdiv(a.seq_len, a.BT)},
    "fuse_expand_kernel": {"c": _blocks("k", "BK")},
    "grad_output_kernel": {"t": _chunk},
    "reduce_dB_kernel": {"expert": lambda a: max(a.EXPERTS)},
    "grad_input_kernel": {"t": _chunk},
}
# the outermost `if` that tells two kinds of programs apart, and how many take it; the others take its `else`
DISPATCH: dict[str, tuple[str, Count]] = {
    "route_instruction_and_w_kernel": ("pid < num_seqs", lambda a: a.num_seqs),
    "reduce_split_k_kernel": ("pid < num_tiles", lambda a: a.num_tiles),
    "reduce_dw_dweights_kernel": ("pid < EXPERTS", lambda a: a.EXPERTS),
    "reduce_dB_kernel": ("i_e < TOTAL", lambda a: a.TOTAL * a.grid[0]),
}
# the share of a tensor's masked loads that are not masked, where a program reads only what one expert's tokens wrote
ACTIVE: dict[tuple[str, str], Count] = {
    ("reduce_dB_kernel", "B_part_ptr"): lambda a: 1 / max(a.EXPERTS),
    ("reduce_dA_kernel", "part_ptr"): lambda a: 1 / max(a.EXPERTS),
    ("reduce_dw_dweights_kernel", "dw_part_ptr"): lambda a: 2 / a.EXPERTS,
}
