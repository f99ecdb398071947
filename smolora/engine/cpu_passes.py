"""What is compiled for a CPU, in the optional module `smolora._cpu`: without it, torch does the same.

Compiled code takes float32 and float64 in plain memory, with parameters of x's dtype; the rest is torch's. It sums in
an order that depends on shapes and on the CPU's vectors alone: threads change no bit. In these products rank space has
the columns (b, K, r) of `torch_passes`, and K is 1 where the slots share an A.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import Bank, Mixed, Slots, Tokens

try:
    compiled: ModuleType | None = importlib.import_module("smolora._cpu")
except ImportError:  # no C++ compiler where smolora was built
    compiled = None

TYPES = {torch.float32: "float", torch.float64: "double"}
BANKS = 2  # at most
EMPTY, OUT_OF_RANGE = 1, 2  # what compiled code finds among given slots


def describe() -> str:
    """Say whether there is compiled code, and for which vectors of this CPU."""
    return "no: slower on a CPU" if compiled is None else f"yes, for vectors of {compiled.widest()} bytes"


def _is_plain(t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether a tensor lies in the memory of the CPU as compiled code reads it."""
    return t.shape == shape and t.dtype == dtype and t.device.type == "cpu" and t.is_contiguous()


def _function(name: str, dtype: torch.dtype) -> Any:
    return getattr(compiled, f"{name}_{TYPES[dtype]}")


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def keep_mask(mask: Tensor, blocks: int, stream: int, seed: int, threshold: int) -> None:
    """Write a dropout mask (rows, 16 blocks); see `philox.keep_masks`."""
    _function("keep_mask", mask.dtype)(
        mask.data_ptr(), mask.shape[0], blocks, stream, seed % 2**64, threshold, torch.get_num_threads()
    )


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
    if type(x) is not Tensor or x.dtype not in TYPES or not _is_plain(x, x.dtype, x.shape):
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
    found = _function("decode", x.dtype)(
        x.data_ptr(),
        y.data_ptr(),
        ids.data_ptr(),
        _address(slot_weights),
        [(a.data_ptr(), b.data_ptr(), _address(i), b.shape[0]) for a, b, _, i, _ in banks],
        _address(scores),
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


# ------------------------------------------------------------------------------------------- the products of the passes


class Layout(NamedTuple):
    """Whose experts the tokens use."""

    num_seqs: int
    cu_seqlens: Tensor | None  # int32 (n + 1,)
    ids: Tensor | None  # int32 (n, b, K), -1 for an empty slot; None: all experts, in order

    def sizes(self, tokens: int, parameters: list[Tensor], rank: int) -> tuple[int, int, int, int, int]:
        slots = parameters[0].shape[0] if self.ids is None else self.ids.shape[2]
        return tokens, self.num_seqs, slots, rank, torch.get_num_threads()

    def addresses(self) -> tuple[int, int]:
        return _address(self.cu_seqlens), _address(self.ids)


def takes(wide: Tensor, layout: Layout, parameters: Sequence[Tensor]) -> bool:
    """Whether compiled code takes a product of a wide array (T, d or k) with parameters of each bank."""
    if compiled is None or wide.dtype not in TYPES or len(parameters) > BANKS:
        return False
    tensors = [(wide, wide.dtype), *((p, wide.dtype) for p in parameters)]
    tensors += [(t, torch.int32) for t in layout[1:] if t is not None]
    return all(_is_plain(t, dtype, t.shape) for t, dtype in tensors)


def shrink(
    x: Tensor, layout: Layout, A: list[Tensor], seed: Tensor | None, streams: list[int], threshold: int
) -> Tensor:
    """Return h = A dropout(x), (T, b K r)."""
    tokens, d = x.shape
    sizes = layout.sizes(tokens, A, A[0].shape[1])
    h = x.new_empty((tokens, len(A) * sizes[2] * sizes[3]))
    banks = [(a.data_ptr(), a.shape[0], 0, 0) for a in A]
    key = int(seed) % 2**64 if threshold else 0
    _function("shrink", x.dtype)(
        sizes, *layout.addresses(), banks, threshold, key, streams, d, x.data_ptr(), h.data_ptr()
    )
    return h


def grad_down(
    x: Tensor | None,
    dh: Tensor,
    layout: Layout,
    A: list[Tensor],
    seed: Tensor | None,
    streams: list[int],
    threshold: int,
    need_dx: bool,
    need_A: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """Return dx (T, d) and dA of each bank from dh (T, b K r), which has dropout's factor in it."""
    (_, r, d), tokens = A[0].shape, dh.shape[0]
    dx = dh.new_empty((tokens, d) if need_dx else 0)
    dA = [torch.empty_like(a) if need else a.new_empty(0) for a, need in zip(A, need_A, strict=True)]
    banks = [
        (a.data_ptr(), a.shape[0], grad.data_ptr() if need else 0, 0)
        for a, grad, need in zip(A, dA, need_A, strict=True)
    ]
    key = int(seed) % 2**64 if threshold else 0
    _function("grad_down", dh.dtype)(
        layout.sizes(tokens, A, r), *layout.addresses(), banks, threshold, key, streams, d, _address(x), dh.data_ptr(),
        dx.data_ptr() if need_dx else 0,
    )  # fmt: skip
    return dx, dA


def expand(u: Tensor, layout: Layout, B: list[Tensor], bias: Tensor | None) -> Tensor:
    """Return y = B u + bias (T, k) from u (T, b K r)."""
    _, k, r = B[0].shape
    y = u.new_empty((u.shape[0], k))
    banks = [(b.data_ptr(), b.shape[0], 0, 0) for b in B]
    _function("expand", u.dtype)(
        layout.sizes(u.shape[0], B, r), *layout.addresses(), banks, k, u.data_ptr(), _address(bias), y.data_ptr()
    )
    return y


def grad_up(
    g: Tensor,
    u: Tensor,
    layout: Layout,
    B: list[Tensor],
    trained: list[Tensor],
    scaling: float,
    need_p: bool,
    need_B: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """Return p = s B^T g (T, b K r), and dB = g u^T of each bank, from one read of g (T, k)."""
    _, k, r = B[0].shape
    p = torch.empty_like(u) if need_p else u.new_empty(0)
    dB = [torch.empty_like(b) if need else b.new_empty(0) for b, need in zip(B, need_B, strict=True)]
    learn = trained or [None] * len(B)
    banks = [
        (b.data_ptr(), b.shape[0], grad.data_ptr() if need else 0, _address(mask))
        for b, grad, need, mask in zip(B, dB, need_B, learn, strict=True)
    ]
    _function("grad_up", g.dtype)(
        layout.sizes(g.shape[0], B, r), *layout.addresses(), banks, k, scaling, g.data_ptr(), u.data_ptr(),
        p.data_ptr() if need_p else 0,
    )  # fmt: skip
    return p, dB


def fuse(
    h: Tensor, w: Tensor, layout: Layout, slot_weights: Tensor, scaling: float, B: list[Tensor], logits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return u = s c h (T, b K r) of mix "smolora", and the fusion's logits (T,) unless they are given."""
    tokens, fresh = h.shape[0], logits is None
    logits = h.new_empty(tokens) if fresh else logits
    sizes = layout.sizes(tokens, B, h.shape[3])
    u = h.new_empty((tokens, 2 * sizes[2] * sizes[3]))
    _function("fuse", h.dtype)(
        sizes, *layout.addresses(), [b.shape[0] for b in B], h.shape[2] < sizes[2], scaling, h.data_ptr(), w.data_ptr(),
        slot_weights.data_ptr(), logits.data_ptr(), u.data_ptr(), fresh,
    )  # fmt: skip
    return u, logits


def grad_fuse(
    p: Tensor,
    h: Tensor,
    w: Tensor,
    layout: Layout,
    slot_weights: Tensor,
    B: list[Tensor],
    logits: Tensor,
    need_slot_weights: bool,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Return dh, dw of each bank's experts (E, r), and dslot_weights or (0,), from p = s B^T g (T, b K r)."""
    sizes, experts = layout.sizes(h.shape[0], B, h.shape[3]), [b.shape[0] for b in B]
    dh, dw = torch.empty_like(h), torch.empty_like(w)
    dslot_weights = torch.empty_like(slot_weights) if need_slot_weights else h.new_empty(0)
    _function("grad_fuse", h.dtype)(
        sizes, *layout.addresses(), experts, h.shape[2] < sizes[2], 1.0, h.data_ptr(), w.data_ptr(),
        slot_weights.data_ptr(), logits.data_ptr(), p.data_ptr(), dh.data_ptr(), dw.data_ptr(),
        dslot_weights.data_ptr() if need_slot_weights else 0,
    )  # fmt: skip
    return dh, dw.split(experts), dslot_weights


def score_weights(B: list[Tensor], importance: list[Tensor], scaling: float) -> Tensor:
    """Return w = s B^T I of the banks' experts, (sum of E, r)."""
    w = B[0].new_empty((sum(b.shape[0] for b in B), B[0].shape[2]))
    for b, i, out in zip(B, importance, w.split([b.shape[0] for b in B]), strict=True):
        sizes = (*b.shape, torch.get_num_threads())
        _function("scores", b.dtype)(sizes, scaling, b.data_ptr(), i.data_ptr(), out.data_ptr())
    return w


def grad_score_weights(
    c: Tensor, B: Tensor, importance: Tensor, scaling: float, dB: Tensor | None, need_importance: bool
) -> Tensor:
    """Add what c = dL/dw (E, r) of one bank brings to dB, s I c^T, and return dI = s B c, or (0,)."""
    sizes = (*B.shape, torch.get_num_threads())
    dI = torch.empty_like(importance) if need_importance else importance.new_empty(0)
    _function("grad_scores", B.dtype)(
        sizes, scaling, B.data_ptr(), importance.data_ptr(), c.data_ptr(), _address(dB),
        dI.data_ptr() if need_importance else 0,
    )  # fmt: skip
    return dI
