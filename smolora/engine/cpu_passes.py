"""What is compiled for a CPU, in the optional module `smolora._cpu`: without it the torch passes do the same.

Compiled code takes float32 and float64 in plain memory, with parameters of x's dtype; the rest is torch's.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..spec import Bank, Mixed, Slots, Tokens

try:
    compiled: ModuleType | None = importlib.import_module("smolora._cpu")
except ImportError:  # no C++ compiler where smolora was built
    compiled = None

DTYPES = (torch.float32, torch.float64)
EMPTY, OUT_OF_RANGE = 1, 2  # what compiled code finds among given slots


def _is_plain(t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether a tensor lies in the memory of the CPU as compiled code reads it."""
    return t.shape == shape and t.dtype == dtype and t.device.type == "cpu" and t.is_contiguous()


def decodes(backend: str, x: Tensor, banks: Sequence[Bank], tokens: Tokens, slots: Slots | None) -> bool:
    """Whether `decode` takes a call of `mixture_linear` without dropout, token weights or token router."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or compiled is None or backend != "torch":
        return False
    if (
        slots is None
        or slots.ids is None
        or tokens.cu_seqlens is not None
        or x.shape[0] != tokens.num_seqs
        or len(banks) > 2
    ):
        return False
    if type(x) is not Tensor or x.dtype not in DTYPES or not _is_plain(x, x.dtype, x.shape):
        return False
    n, b, _ = shape = slots.ids.shape
    if not _is_plain(slots.ids, torch.int32, shape) or (n, b) != (tokens.num_seqs, len(banks)):
        return False
    if slots.weights is not None and not _is_plain(slots.weights, x.dtype, shape):
        return False
    d, (_, k, r), common = x.shape[1], banks[0].B.shape, banks[0].A.shape[0] == 1
    return all(
        _is_plain(bank.A, x.dtype, (1 if common else bank.B.shape[0], r, d))
        and _is_plain(bank.B, x.dtype, (bank.B.shape[0], k, r))
        and (bank.importance is None or _is_plain(bank.importance, x.dtype, (k,)))
        for bank in banks
    )


def decode(
    x: Tensor, banks: Sequence[Bank], slots: Slots, scaling: float, mix: str, weight: Tensor | None, bias: Tensor | None
) -> Mixed:
    """Apply a mixture to one token of each sequence, whose experts are given; see `mixture_linear`.

    Each output is summed up in an order of its own: neither the batch nor the threads change a bit of it.

    Raises:
        ValueError: the slots name an expert that does not exist.
    """
    n, d = x.shape
    _, k, r = banks[0].B.shape
    if weight is None:
        y = x.new_zeros((n, k))
    elif torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            y = torch.nn.functional.linear(x, weight, bias)
    else:
        y = torch.nn.functional.linear(x, weight, bias)
    ids, slot_weights = slots
    scores = x.new_empty(n) if mix == "smolora" else None
    run = compiled.decode_float if x.dtype == torch.float32 else compiled.decode_double
    found = run(
        x.data_ptr(),
        y.data_ptr(),
        ids.data_ptr(),
        0 if slot_weights is None else slot_weights.data_ptr(),
        [(a.data_ptr(), b.data_ptr(), 0 if i is None else i.data_ptr(), b.shape[0]) for a, b, _, i, _ in banks],
        0 if scores is None else scores.data_ptr(),
        (n, d, k, r, ids.shape[2]),
        banks[0].A.shape[0] == 1,
        scaling,
        torch.get_num_threads(),
    )
    if found == OUT_OF_RANGE:
        from .ops import check_ids  # not at the top: ops imports the passes

        check_ids(ids, [bank.B for bank in banks])
    if found == EMPTY and slot_weights is not None and mix == "weighted":
        slot_weights = slot_weights.masked_fill(ids < 0, 0)
    return Mixed(y, ids, slot_weights, None, scores)
