"""The equations of each mixture as its paper writes them: the oracle that every backend is tested against.

Every expert's output is a k-sized vector, every instance is a turn of a Python loop, and torch differentiates it all.
Slow on purpose: nothing here shares a line, or an idea, with the fast code. Imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Routing(NamedTuple):
    """What one forward decided, for `n` instances and `T` tokens; a branch that is not in use has None."""

    routes: tuple[Tensor | None, Tensor | None]  # chosen experts (n, top_k), VU and IF
    logits: tuple[Tensor | None, Tensor | None]  # (n, M) and (n, N)
    gates: tuple[Tensor | None, Tensor | None]  # weights of the chosen experts (n, top_k)
    alpha: Tensor  # the VU branch's share (T,); 1 - alpha is the IF branch's


def philox_bytes(seed: int, rows: int, columns: int, stream: int) -> np.ndarray:
    """Random bytes (rows, columns) of Philox4x32-10 (Salmon et al., 2011).

    The counter of a byte is (column // 16, row low, row high, stream), the key is `seed`; byte `column % 16` of the
    128-bit output, least significant first, is taken.
    """
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    blocks = -(-columns // 16)
    row = np.arange(rows, dtype=np.uint64)[:, None]
    c0 = np.broadcast_to(np.arange(blocks, dtype=np.uint64), (rows, blocks))
    c1 = np.broadcast_to(row & low, (rows, blocks))
    c2 = np.broadcast_to(row >> shift, (rows, blocks))
    c3 = np.full((rows, blocks), stream, np.uint64)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> shift) ^ c1 ^ np.uint64(k0), b & low, (a >> shift) ^ c3 ^ np.uint64(k1), a & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words = np.stack([c0, c1, c2, c3], -1).astype("<u4")
    return words.view(np.uint8).reshape(rows, 16 * blocks)[:, :columns]


def dropout_factor(seed: int, rows: int, columns: int, stream: int, p: float) -> Tensor:
    """Factors (rows, columns) of one branch's dropout: 0, or 1 / (1 - p) with p rounded to 8 bits; float64."""
    threshold = round(256 * p)
    keep = philox_bytes(seed, rows, columns, stream) >= threshold
    return torch.from_numpy(keep * (256 / (256 - threshold)))


def _choose(z: Tensor, top_k: int, straight_through: bool) -> tuple[Tensor, Tensor]:
    """softmax(top_k(z)) of Eq. 5 and 6 for one instance: indices (top_k,), ties to the lowest, and their gates."""
    index = torch.sort(z, descending=True, stable=True).indices[:top_k]
    gates = torch.softmax(torch.full_like(z, -torch.inf).index_copy(0, index, z[index]), 0)[index]
    if straight_through:
        soft = torch.softmax(z, 0)[index]
        gates = gates.detach() + soft - soft.detach()
    return index, gates


def smolora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vu_A: Tensor,
    vu_B: Tensor,
    if_A: Tensor,
    if_B: Tensor,
    vu_router: Tensor,
    if_router: Tensor,
    vu_importance: Tensor,
    if_importance: Tensor,
    instruction: Tensor | None,
    *,
    scaling: float,
    top_k: int = 1,
    fusion: str = "adaptive",
    router_grad: str = "none",
    route_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    routes: tuple[Tensor | None, Tensor | None] | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    return_routing: bool = False,
) -> Tensor | tuple[Tensor, Routing]:
    """One SMoLoRA layer (Eq. 4 to 9), in x's dtype; routing in float32 or better.

    Args:
        x: (B, S, d), or packed (T, d) or (1, T, d) with `cu_seqlens`.
        weight, bias: the frozen linear layer, (k, d) and (k,) or None.
        vu_A, if_A: down projections (M, r, d), (N, r, d).
        vu_B, if_B: up projections (M, k, r), (N, k, r).
        vu_router, if_router: R_vu (M, d) and R_if (N, e).
        vu_importance, if_importance: I_vu and I_if (k,).
        instruction: embeddings (B, e), or (e,) for all; None if the IF branch routes nothing.
        scaling: factor on every expert's output.
        top_k, fusion, router_grad: as in `SMoLoRAConfig`.
        route_mask: bool, x's shape without d: tokens the VU router averages (None: all).
        cu_seqlens: int (n + 1,), boundaries of packed instances.
        routes: chosen experts of the branches, (n,) or (n, top_k) each; gates are then 1 / top_k.
        dropout: probability, applied when `seed` is given.
        seed: 64-bit seed of the dropout masks.
        return_routing: also return a `Routing`.

    Returns:
        y, of x's shape with k in place of d.
    """
    dtype = x.dtype
    accurate = torch.float64 if dtype == torch.float64 else torch.float32
    k = weight.shape[0]
    tokens = x.reshape(-1, x.shape[-1])
    if cu_seqlens is None:
        bounds = [b * x.shape[1] for b in range(x.shape[0] + 1)]
    else:
        bounds = cu_seqlens.tolist()
    mask = torch.ones(len(tokens), dtype=torch.bool) if route_mask is None else route_mask.reshape(-1)
    factors: list[Tensor | None] = [None, None]
    if dropout and seed is not None:
        rows, columns = tokens.shape
        factors = [dropout_factor(seed, rows, columns, stream, dropout).to(dtype) for stream in (0, 1)]
    straight_through = router_grad == "straight_through"
    active = (fusion != "if", fusion != "vu")
    down, up = (vu_A.to(dtype), if_A.to(dtype)), (vu_B.to(dtype), if_B.to(dtype))
    importance = (vu_importance.to(dtype), if_importance.to(dtype))

    outputs, shares = [], []
    picked: tuple[list[Tensor], list[Tensor]] = ([], [])
    scores: tuple[list[Tensor], list[Tensor]] = ([], [])
    gates_of: tuple[list[Tensor], list[Tensor]] = ([], [])
    for b in range(len(bounds) - 1):
        start, end = bounds[b], bounds[b + 1]
        x_b, mask_b = tokens[start:end], mask[start:end]
        branch_outputs = []
        for branch in (0, 1):
            if not active[branch]:
                branch_outputs.append(x_b.new_zeros(end - start, k))
                continue
            given = None if routes is None else routes[branch]
            if given is not None:
                index = given[b].reshape(-1).long()
                gates = torch.full((len(index),), 1 / len(index), dtype=accurate)
            else:
                if branch == 0:
                    average = x_b[mask_b].to(accurate).sum(0) / max(int(mask_b.sum()), 1)
                    z = vu_router.to(accurate) @ average
                else:
                    assert instruction is not None  # it routes this branch
                    embedding = instruction if instruction.dim() == 1 else instruction[b]
                    z = if_router.to(accurate) @ embedding.to(accurate)
                index, gates = _choose(z, top_k, straight_through)
                scores[branch].append(z)
            picked[branch].append(index)
            gates_of[branch].append(gates)
            factor = factors[branch]
            dropped = x_b if factor is None else x_b * factor[start:end]
            output = x_b.new_zeros(end - start, k)
            for e, gate in zip(index.tolist(), gates, strict=True):
                output = output + gate.to(dtype) * (
                    scaling * F.linear(F.linear(dropped, down[branch][e]), up[branch][e])
                )
            branch_outputs.append(output)
        x_vu, x_if = branch_outputs
        if fusion == "adaptive":
            score = torch.stack([x_vu @ importance[0], x_if @ importance[1]], -1)
            share = torch.softmax(score, -1)[:, 0]
        else:
            share = x_b.new_full((end - start,), {"mean": 0.5, "vu": 1.0, "if": 0.0}[fusion])
        shares.append(share)
        outputs.append(share[:, None] * x_vu + (1 - share)[:, None] * x_if)
    adapter = torch.cat(outputs) if outputs else tokens.new_zeros(0, k)
    y = F.linear(tokens, weight.to(dtype), None if bias is None else bias.to(dtype)) + adapter
    y = y.reshape(*x.shape[:-1], k)
    if not return_routing:
        return y
    stack = lambda rows: torch.stack(rows) if rows else None  # noqa: E731
    routing = Routing(
        (stack(picked[0]), stack(picked[1])),
        (stack(scores[0]), stack(scores[1])),
        (stack(gates_of[0]), stack(gates_of[1])),
        torch.cat(shares) if shares else tokens.new_zeros(0),
    )
    return y, routing


# ------------------------------------------------------------------------------------- the other mixtures, as written


def _bounds(x: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    """First and last-plus-one token of each sequence of (B, S, d), or of packed tokens."""
    edges = [b * x.shape[1] for b in range(x.shape[0] + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    return list(pairwise(edges))


def _dropped(tokens: Tensor, dropout: float, seed: int | None) -> Tensor:
    """Tokens after dropout, with the mask of stream 0."""
    if not dropout or seed is None:
        return tokens
    rows, columns = tokens.shape
    return tokens * dropout_factor(seed, rows, columns, 0, dropout).to(tokens.dtype)


def _over_base(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Tensor) -> Tensor:
    """W x + b + adapter, of x's shape with k in place of d."""
    tokens = x.reshape(-1, x.shape[-1])
    y = F.linear(tokens, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)) + adapter
    return y.reshape(*x.shape[:-1], weight.shape[0])


def moelora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    router: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """One MoELoRA layer (CoIN): y = W x + b + s sum_e softmax(R x)_e B_e A_e dropout(x), token by token.

    Args:
        x: (B, S, d) or (T, d). weight, bias: the frozen linear layer.
        A, B, router: (E, r, d), (E, k, r), (E, d).
        scaling: s. dropout, seed: as in `smolora_forward`.
    """
    tokens = x.reshape(-1, x.shape[-1])
    kept = _dropped(tokens, dropout, seed)
    share = torch.softmax(F.linear(tokens, router.to(x.dtype)), -1)
    adapter = tokens.new_zeros(len(tokens), weight.shape[0])
    for e in range(len(A)):
        adapter = adapter + share[:, e, None] * (scaling * F.linear(F.linear(kept, A[e].to(x.dtype)), B[e].to(x.dtype)))
    return _over_base(x, weight, bias, adapter)


def routedlora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    experts: Tensor,
    weights: Tensor | None = None,
    *,
    scaling: float,
    cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """Given LoRAs for each sequence: y = W x + b + s sum_j w_j B_e A_e dropout(x), e = experts[i, j]; -1 is no expert.

    Args:
        x: (B, S, d), or packed. weight, bias: the frozen linear layer.
        A, B: (E, r, d), (E, k, r). experts: int (n, c). weights: (n, c), or None for 1.
        scaling: s. dropout, seed: as in `smolora_forward`.
    """
    tokens = x.reshape(-1, x.shape[-1])
    kept = _dropped(tokens, dropout, seed)
    outputs = [tokens.new_zeros(0, weight.shape[0])]
    for i, (start, end) in enumerate(_bounds(x, cu_seqlens)):
        output = tokens.new_zeros(end - start, weight.shape[0])
        for j, e in enumerate(experts[i].tolist()):
            if e >= 0:
                one = scaling * F.linear(F.linear(kept[start:end], A[e].to(x.dtype)), B[e].to(x.dtype))
                output = output + (one if weights is None else weights[i, j].to(x.dtype) * one)
        outputs.append(output)
    return _over_base(x, weight, bias, torch.cat(outputs))


def branchlora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    router: Tensor,
    task: Tensor,
    *,
    scaling: float,
    top_k: int,
    router_input: str = "first",
    renormalize: bool = False,
    route_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """One BranchLoRA layer: y = W x + b + s sum of pi_b B_b A dropout(x) over the k largest pi = softmax(R_task x_r).

    Args:
        x: (B, S, d), or packed. weight, bias: the frozen linear layer.
        A, B, router: (r, d), (N, k, r), (tasks, N, d). task: int (n,).
        router_input: x_r is the "first", the "mean" or the "last" of the routed tokens.
        renormalize: the chosen pi are divided by their sum.
        scaling: s. dropout, seed: as in `smolora_forward`.
    """
    accurate = torch.float64 if x.dtype == torch.float64 else torch.float32
    tokens = x.reshape(-1, x.shape[-1])
    mask = torch.ones(len(tokens), dtype=torch.bool) if route_mask is None else route_mask.reshape(-1)
    kept = _dropped(tokens, dropout, seed)
    outputs = [tokens.new_zeros(0, weight.shape[0])]
    for i, (start, end) in enumerate(_bounds(x, cu_seqlens)):
        output = tokens.new_zeros(end - start, weight.shape[0])
        seen = tokens[start:end][mask[start:end]].to(accurate)
        seen = {"first": seen[:1], "mean": seen, "last": seen[-1:]}[router_input].sum(0) / max(
            len(seen) if router_input == "mean" else 1, 1
        )
        pi = torch.softmax(router[int(task[i])].to(accurate) @ seen, 0)
        chosen = torch.sort(pi, descending=True, stable=True).indices[:top_k]
        share = pi[chosen] / pi[chosen].sum() if renormalize else pi[chosen]
        for b, q in zip(chosen.tolist(), share, strict=True):
            one = F.linear(F.linear(kept[start:end], A.to(x.dtype)), B[b].to(x.dtype))
            output = output + q.to(x.dtype) * (scaling * one)
        outputs.append(output)
    return _over_base(x, weight, bias, torch.cat(outputs))


def lilora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    task_A: Tensor,
    task_B: Tensor,
    task_logit: Tensor,
    task: Tensor,
    *,
    scaling: float,
    cu_seqlens: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """One LiLoRA layer: y = W x + b + s (a B z + (1 - a) task_B (task_A z)), z = A dropout(x), a = sigmoid(task_logit).

    Args:
        x: (B, S, d), or packed. weight, bias: the frozen linear layer.
        A, B: (r, d), (k, r). task_A, task_B, task_logit: (tasks, t, r), (tasks, k, t), (tasks,). task: int (n,).
        scaling: s. dropout, seed: as in `smolora_forward`.
    """
    tokens = x.reshape(-1, x.shape[-1])
    kept = _dropped(tokens, dropout, seed)
    outputs = [tokens.new_zeros(0, weight.shape[0])]
    for i, (start, end) in enumerate(_bounds(x, cu_seqlens)):
        t = int(task[i])
        a = torch.sigmoid(task_logit[t]).to(x.dtype)
        z = F.linear(kept[start:end], A.to(x.dtype))
        pair = F.linear(F.linear(z, task_A[t].to(x.dtype)), task_B[t].to(x.dtype))
        outputs.append(scaling * (a * F.linear(z, B.to(x.dtype)) + (1 - a) * pair))
    return _over_base(x, weight, bias, torch.cat(outputs))


def moecl_expert(
    x: Tensor,
    block: tuple[Tensor, Tensor, Tensor],
    loras: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    scaling: float,
    dropped: Sequence[Tensor | float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """One expert of MoE-CL, a feed-forward block with LoRAs: F(x) = W_d u + s B_d A_d u, u = silu(gate) * up.

    Args:
        x: (..., d). block: W_g, W_u (m, d) and W_d (d, m), without biases.
        loras: (A, B) on each: (r, d), (m, r) on gate and up; (r, m), (d, r) on down.
        scaling: s. dropped: what multiplies the inputs of the three A.
    """
    (W_g, W_u, W_d), (gate, up, down) = block, loras

    def layer(inputs: Tensor, W: Tensor, lora: tuple[Tensor, Tensor], factor: Tensor | float) -> Tensor:
        A, B = lora[0].to(x.dtype), lora[1].to(x.dtype)
        return F.linear(inputs, W.to(x.dtype)) + scaling * F.linear(F.linear(inputs * factor, A), B)

    u = F.silu(layer(x, W_g, gate, dropped[0])) * layer(x, W_u, up, dropped[1])
    return layer(u, W_d, down, dropped[2])


def moecl_forward(
    x: Tensor,
    block: tuple[Tensor, Tensor, Tensor],
    gate_A: Tensor,
    gate_B: Tensor,
    up_A: Tensor,
    up_B: Tensor,
    down_A: Tensor,
    down_B: Tensor,
    router: Tensor,
    discriminator: Tensor,
    task: Tensor,
    *,
    scaling: float,
    cu_seqlens: Tensor | None = None,
    route_mask: Tensor | None = None,
    double_softmax: bool = True,
    dropout: float = 0.0,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One MoE-CL block: h = g_0 F_0(x) + g_1 F_t(x), g = softmax(G x), and the loss of its discriminator C.

    The loss is the mean over sequences of the cross-entropy of C on the mean of F_0(x) over the sequence's tokens, F_0
    being without dropout on the input of its down_A. It is differentiated as it stands: no gradient is reversed.

    Args:
        x: (B, S, d), or packed. block: see `moecl_expert`.
        gate_A, ..., down_B: of T + 1 experts, see `moecl_expert`. router, discriminator: G (2, d), C (T, d).
        task: int (n,). route_mask: bool, of x's shape without d: the tokens that C sees.
        double_softmax: whether the cross-entropy is of probabilities, as if these were logits.
        scaling: s. dropout, seed: as in `smolora_forward`; the task's expert has the mask's second half of rows.
    """
    tokens = x.reshape(-1, x.shape[-1])
    T, (m, d) = len(tokens), block[0].shape
    seen = torch.ones(T, dtype=torch.bool) if route_mask is None else route_mask.reshape(-1)
    g = torch.softmax(F.linear(tokens, router.to(x.dtype)), -1)
    masks: list[Tensor] = []
    if dropout and seed is not None:
        masks = [dropout_factor(seed, 2 * T, width, i, dropout).to(x.dtype) for i, width in enumerate((d, d, m))]
    outputs, losses = [tokens.new_zeros(0, d)], [tokens.new_zeros(0)]
    for i, (start, end) in enumerate(_bounds(x, cu_seqlens)):
        here, t = tokens[start:end], int(task[i])

        def expert(e: int, masks: list[Tensor], here: Tensor = here) -> Tensor:
            loras = ((gate_A[e], gate_B[e]), (up_A[e], up_B[e]), (down_A[e], down_B[e]))
            dropped: list[Tensor | float] = [*masks, 1.0, 1.0, 1.0]
            return moecl_expert(here, block, loras, scaling=scaling, dropped=dropped[:3])

        shared, own = ([mask[half * T + start : half * T + end] for mask in masks] for half in range(2))
        outputs.append(g[start:end, :1] * expert(0, shared) + g[start:end, 1:] * expert(t + 1, own))
        counted = seen[start:end]
        feature = (expert(0, shared[:2]) * counted[:, None]).sum(0) / max(int(counted.sum()), 1)
        logits = F.linear(feature, discriminator.to(x.dtype))
        if double_softmax:
            logits = torch.softmax(logits, -1)
        losses.append(-torch.log_softmax(logits, -1)[t : t + 1])
    return torch.cat(outputs).reshape(x.shape), torch.cat(losses).mean()
