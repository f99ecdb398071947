"""The four passes in plain torch: they run anywhere, and are the algebra that the kernels implement.

One token's h = A x has r numbers, and everything between A and B happens there: no expert's k-sized output is ever
formed. Tensors in rank space have these axes; `mixes.py` has the rest of the mixture's algebra.

    T tokens, n sequences, b banks, K slots (experts that a sequence uses) of each bank, r rank
    h             (T, b, K, r)  A x of the slots, x after dropout; K is 1 where the slots share an A
    w             (sum of E, r) s B^T I of every expert, mix "smolora" alone: a score I . (s B h) is w . h
    ids           (n, b, K)     int32, the slots' experts; None: every expert, in order
    slot_weights  (n, b, K)
    logits        (n, sum of E) of the routers side by side; (n, 0) where nothing is routed
    mean          (n, d)        what a router of x saw; (0, 0) when nobody needs it

Sums over tokens: dB in `grad_output`, as u^T g of each block, which `_by_expert` then adds up by expert; dA in
`grad_input`, in the same way.

Reductions, h, w, weights and scores are float32 (float64 for float64 inputs). Packed sequences are cut into blocks of
one sequence each (`varlen.py`), so that every product is one batched matrix product over blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import accurate_dtype, down_slots, grad_needs, has_own_importance, num_slots
from .mixes import MIX
from .philox import keep_masks
from .varlen import Blocks, cut, laid, whole

# ------------------------------------------------------------------------------------------------------------ routing


def choose(logits: Tensor, top_k: int, gate: str = "chosen") -> tuple[Tensor, Tensor]:
    """Choose the top k of (n, E) logits: experts (n, k) int32, ties to the lowest, and their weights (n, k).

    The weights are the softmax over the chosen logits (Eq. 5 and 6), or with `gate` "all" over all of them.
    """
    values, index = torch.sort(logits, dim=-1, descending=True, stable=True)
    if gate == "chosen":
        return index[:, :top_k].int(), torch.softmax(values[:, :top_k], -1)
    return index[:, :top_k].int(), torch.softmax(values, -1)[:, :top_k]


def choose_backward(dweights: Tensor, weights: Tensor, ids: Tensor, logits: Tensor, gate: str) -> Tensor:
    """Return the gradient of the logits (n, E) from that of the weights (n, k).

    With `gate` "all" the softmax is over all logits, dz_j = pi_j (dq_j - sum pi_e dq_e), whatever the forward's was:
    so a straight-through gradient is had.
    """
    index = ids.long()
    if gate == "all":
        pi = torch.softmax(logits, -1)
        dq = torch.zeros_like(logits).scatter_(1, index, dweights)
        return pi * (dq - (pi * dq).sum(-1, keepdim=True))
    dz = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    return torch.zeros_like(logits).scatter_(1, index, dz)


def _routed(
    route_mask: Tensor | None, tokens: int, num_seqs: int, blocks: Blocks, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Which places route, 1 or 0 (N, L), and how many do in each sequence (n, 1), at least 1."""
    if route_mask is None and blocks.token is None:
        return like.new_ones((blocks.number, blocks.length)), like.new_full((num_seqs, 1), max(blocks.length, 1))
    routed = like.new_ones(tokens) if route_mask is None else route_mask.to(like.dtype)
    routed = blocks.split(routed)
    return routed, blocks.gather(routed.sum(1, keepdim=True)).clamp(min=1)


def routed_tokens(
    route_mask: Tensor | None, tokens: int, num_seqs: int, cu_seqlens: Tensor | None, like: Tensor
) -> Tensor:
    """Count the tokens that route in each sequence (n, 1), at least 1, in the dtype of `like`."""
    return _routed(route_mask, tokens, num_seqs, cut(tokens, num_seqs, cu_seqlens), like)[1]


def mean_backward(
    dmean: Tensor, tokens: int, num_seqs: int, cu_seqlens: Tensor | None, route_mask: Tensor | None
) -> Tensor:
    """Spread the gradient of a sequence's mean (n, d), over its number of routed tokens, to those tokens: (T, d)."""
    blocks = cut(tokens, num_seqs, cu_seqlens)
    routed, _ = _routed(route_mask, tokens, num_seqs, blocks, dmean)
    return blocks.join(routed[..., None] * blocks.spread(dmean)[:, None])


def router_logits(seen: Tensor, weight: Tensor, rows: Tensor | None) -> Tensor:
    """Apply a router (E, c), or that of each sequence's task among (tasks, E, c), to (n, c): logits (n, E)."""
    weight = weight.to(seen.dtype)
    if weight.dim() == 2:
        return seen @ weight.mT
    return torch.bmm(weight.index_select(0, rows), seen[..., None])[..., 0]


def route(
    x_blocks: Tensor,
    blocks: Blocks,
    tokens: int,
    num_seqs: int,
    route_mask: Tensor | None,
    instruction: Tensor | None,
    routers: list[Tensor],
    router_reads_x: list[bool],
    router_rows: Tensor | None,
    top_k: int,
    gate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose each sequence's slots; `route_shrink` has the arguments, but for x's blocks (N, L, d), each of a sequence.

    Returns:
        ids (n, b, K), slot_weights, logits, and the mean (n, d) that a router of x saw, (0, 0) where none reads x.
    """
    mean = x_blocks.new_empty((0, 0))
    if any(router_reads_x):
        routed, count = _routed(route_mask, tokens, num_seqs, blocks, x_blocks)
        seen = x_blocks
        if route_mask is not None:  # mask with where, not by multiplying: 0 * NaN is NaN
            seen = x_blocks.masked_fill(routed[..., None] == 0, 0)
        mean = blocks.gather(torch.bmm(routed[:, None], seen)[:, 0]) / count
    sees = [mean if reads_x else instruction.to(mean.dtype) for reads_x in router_reads_x]
    logits = [router_logits(*pair, router_rows) for pair in zip(sees, routers, strict=True)]
    chosen = (choose(z, top_k, gate) for z in logits)
    ids, slot_weights = (torch.stack(parts, 1) for parts in zip(*chosen, strict=True))
    return ids, slot_weights, torch.cat(logits, 1), mean


# ------------------------------------------------------------------------------------------- experts and their slots


def _gathered(experts: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather a bank's experts by slots (N, K) and round them to the compute dtype: (N, K, ...)."""
    picked = experts.index_select(0, ids.reshape(-1).clamp(min=0)).to(dtype)
    return picked.view(*ids.shape, *experts.shape[1:])


def is_common(A: list[Tensor], ids: Tensor | None) -> bool:
    """Whether every sequence has the same A in its slots."""
    return ids is None or all(a.shape[0] == 1 for a in A)


def _down(A: list[Tensor], ids: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The slots' down projections, rounded to the compute dtype: (N, b, K r, d), or (1, ...) where all are alike."""
    if is_common(A, ids):
        picked = torch.stack([a.to(dtype) for a in A])[None] if len(A) > 1 else A[0].to(dtype)[None, None]
    else:
        picked = torch.stack([_gathered(a, i, dtype) for a, i in zip(A, ids.unbind(1), strict=True)], 1)
    return picked.flatten(2, 3).to(accurate_dtype(dtype))


def _up(B: list[Tensor], ids: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The slots' up projections side by side, rounded to the compute dtype: (N, k, b K r), or (1, ...)."""
    if ids is None:
        picked = [b.to(dtype)[None] for b in B]
    else:
        picked = [_gathered(b, i, dtype) for b, i in zip(B, ids.unbind(1), strict=True)]
    picked = [p.transpose(1, 2).flatten(2) for p in picked]
    return (torch.cat(picked, -1) if len(picked) > 1 else picked[0]).to(accurate_dtype(dtype))


def _slots_of_w(w: Tensor, ids: Tensor, B: list[Tensor]) -> Tensor:
    """The slots' rows of w, (N, b, K, r)."""
    rows = ids + torch.arange(0, len(B) * B[0].shape[0], B[0].shape[0], device=ids.device)[:, None]
    return w.index_select(0, rows.flatten()).view(*ids.shape, w.shape[1])


def _membership(ids: Tensor, experts: list[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """For each bank, 1 where a slot's expert is the expert and 0 elsewhere: (E, N, b, K)."""
    if len(experts) > 1:  # the banks' experts counted through
        starts = torch.tensor([0, *experts[:-1]], device=ids.device).cumsum(0)
        ids = ids + starts[:, None]
    number = torch.arange(sum(experts), device=ids.device).view(-1, 1, 1, 1)
    return (number == ids).to(dtype).split(experts)


def _by_expert(member: Tensor, slots: Tensor) -> Tensor:
    """Sum (N, b, K, ...) into (E, ...), as one product in a fixed order."""
    return torch.tensordot(member, slots, 3)


def _span(needed: list[bool]) -> slice | None:
    """The banks that are needed, as a slice; None if none is."""
    banks = [bank for bank, need in enumerate(needed) if need]
    return slice(banks[0], banks[-1] + 1) if banks else None


def _keep(seed: Tensor, tokens: int, d: int, threshold: int, streams: list[int], blocks: Blocks, dtype) -> Tensor:
    """The banks' dropout masks in blocks: (b, N, L, d)."""
    masks = keep_masks(seed, tokens, d, threshold, tuple(streams), dtype)
    if blocks.token is None:
        return masks.view(len(masks), blocks.number, blocks.length, d)
    return torch.stack([blocks.split(mask) for mask in masks])


def _scaled(h: Tensor, c: Tensor | float, slots: int) -> Tensor:
    """The right operand of the up-projection, c h: (N, L, b K r)."""
    if isinstance(c, Tensor):
        return (h * c[..., None]).flatten(2)
    return (h * c).expand(-1, -1, -1, slots, -1).flatten(2)


def mixed(
    h: Tensor,
    w: Tensor,
    ids: Tensor | None,
    slot_weights: Tensor | None,
    scores: Tensor | None,
    B: list[Tensor],
    blocks: Blocks,
    scaling: float,
    mix: str,
) -> tuple[Tensor, Tensor]:
    """Mix h (T, b, K, r), whose ids and slot weights are those of blocks.

    Returns:
        u = c h (N, L, b K r), and the scores (T,) that the mix made of h, or (0,).
    """
    h = blocks.split(h)
    fused = h.new_empty(0)
    if MIX[mix].fuse is not None:
        scores = MIX[mix].fuse(h, _slots_of_w(w, ids, B), slot_weights)
        fused = blocks.join(scores)
    elif scores is not None:
        scores = blocks.split(scores)
    c = MIX[mix].coefficients(slot_weights, scores, scaling)
    return _scaled(h, c, num_slots(ids, B, 0)), fused


def _accumulate(base: Tensor | None, left: Tensor, right: Tensor, blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """base (T, c) + left (N, L, j) @ right (N, j, c), in place where base has the shape and precision."""
    if base is not None and blocks.token is None and base.dtype == left.dtype:
        base.view(blocks.number, blocks.length, base.shape[1]).baddbmm_(left, right)
        return base
    out = left.new_empty(left.shape[0] * left.shape[1], right.shape[2])
    torch.bmm(left, right, out=out.view(*left.shape[:2], right.shape[2]))
    out = out if blocks.place is None else out.index_select(0, blocks.place)
    return (out if base is None else out.add_(base)).to(dtype)


# --------------------------------------------------------------------------------------------------------- the passes


def score_weights(B: Tensor, importance: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return w = s B^T I (E, r) of a bank from parameters that are rounded to `dtype`."""
    accurate = accurate_dtype(dtype)
    rounded, I = B.to(dtype).to(accurate), importance.to(dtype).to(accurate)
    # no matrix-vector product: its last bits depend on where in memory B lies
    return scaling * (rounded * I[..., None]).sum(1)


def route_shrink(
    x: Tensor,
    num_seqs: int,
    cu_seqlens: Tensor | None,
    route_mask: Tensor | None,
    instruction: Tensor | None,
    ids: Tensor | None,
    A: list[Tensor],
    B: list[Tensor],
    importance: list[Tensor],
    routers: list[Tensor],
    router_reads_x: list[bool],
    router_rows: Tensor | None,
    token_router: Tensor | None,
    seed: Tensor | None,
    streams: list[int],
    threshold: int,
    top_k: int,
    gate: str,
    scaling: float,
    mix: str,
    need_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Choose each sequence's slots and bring its tokens into rank space.

    Args:
        x: tokens (T, d).
        num_seqs: n; without `cu_seqlens` each sequence has T / n tokens.
        cu_seqlens: int32 (n + 1,).
        route_mask: bool (T,), tokens whose mean a router sees; a sequence with none of them routes by a zero mean.
        instruction: (n, e), for routers that do not read x.
        ids: (n, b, K), given slots; None with `routers`, or for all experts in order.
        A, B: of each bank, (E, r, d) or (1, r, d), and (E, k, r).
        importance: (k,) or (E, k) of each bank for mix "smolora", else none.
        routers: of each bank, (E, d) or (E, e), or (tasks, E, d) with `router_rows`; none where slots are given.
        router_reads_x: of each router, whether it reads the mean of x.
        router_rows: int64 (n,), the task of each sequence.
        token_router: (E, d), whose logits R x of each token, without dropout, are the scores of mix "softmax".
        seed, streams, threshold: of dropout, a stream a bank; there is none with threshold 0.
        top_k: slots that a router fills. gate: see `choose`.
        need_mean: return the mean, which the gradient of a router needs.

    Returns:
        h, w, ids, slot_weights, logits, mean, token logits (T, E), or (T, 0), and dropout's masks for `grad_input`, or
        (0,) if it is to draw them again. What is given is not returned: ids and slot_weights are empty where nothing is
        routed.
    """
    accurate = accurate_dtype(x.dtype)
    blocks = laid(x.shape[0], num_seqs, cu_seqlens, not routers and is_common(A, ids))
    x_blocks = blocks.split(x).to(accurate)
    mean = x.new_empty((0, 0), dtype=accurate)
    logits = x.new_zeros((num_seqs, 0), dtype=accurate)
    slot_weights = x.new_empty(0, dtype=accurate)
    chosen_ids = ids
    if routers:
        chosen_ids, slot_weights, logits, mean = route(
            x_blocks,
            blocks,
            x.shape[0],
            num_seqs,
            route_mask,
            instruction,
            routers,
            router_reads_x,
            router_rows,
            top_k,
            gate,
        )
    if is_common(A, chosen_ids) and blocks.number != 1:
        x_blocks, blocks = x.to(accurate)[None], whole(x.shape[0])
    down = _down(A, blocks.spread(chosen_ids), x.dtype)
    token_logits = x.new_empty((x.shape[0], 0), dtype=accurate)
    if threshold:
        kept = _keep(seed, *x.shape, threshold, streams, blocks, accurate).mul_(x_blocks)
        h = torch.bmm(kept.flatten(0, 1), down.transpose(0, 1).flatten(0, 1).mT)
        h = h.view(*kept.shape[:3], down.shape[2]).permute(1, 2, 0, 3).contiguous().mul_(256 / (256 - threshold))
        if token_router is not None:
            token_logits = x.to(accurate) @ token_router.to(x.dtype).to(accurate).mT
    elif token_router is not None:  # one read of x for both
        stacked = torch.cat([down.flatten(0, 2), token_router.to(x.dtype).to(accurate)])
        h, token_logits = (x.to(accurate) @ stacked.mT).split([down.shape[2], token_router.shape[0]], 1)
        h, token_logits = h.contiguous()[None], token_logits.contiguous()
    else:
        h = torch.bmm(x_blocks, down.flatten(1, 2).mT)
    h = blocks.join(h).reshape(x.shape[0], len(A), down_slots(A, num_slots(chosen_ids, B, 0)), A[0].shape[1])
    w = x.new_empty((0, A[0].shape[1]), dtype=accurate)
    if mix == "smolora":
        w = torch.cat([score_weights(b, i, scaling, x.dtype) for b, i in zip(B, importance, strict=True)])
    routed_ids = chosen_ids if routers else x.new_empty(0, dtype=torch.int32)
    mean = mean if need_mean else x.new_empty((0, 0), dtype=accurate)
    masks = x.new_empty(0, dtype=torch.int32)
    return h, w, routed_ids, slot_weights, logits, mean, token_logits, masks


def fuse_expand(
    h: Tensor,
    w: Tensor,
    ids: Tensor | None,
    slot_weights: Tensor | None,
    scores: Tensor | None,
    B: list[Tensor],
    num_seqs: int,
    cu_seqlens: Tensor | None,
    scaling: float,
    mix: str,
    dtype: torch.dtype,
    x: Tensor | None,
    base_weight: Tensor | None,
    base_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Mix in rank space and expand to the output.

    Args:
        scores: what the mix's coefficients are made of, where it is known by now: given ones (T, K), or token logits.
        x, base_weight, base_bias: with these the output has x W^T + b in it; else it is the mixture's alone.

    Returns:
        y (T, k), and the scores that the mix made of h, (T,), or (0,).
    """
    blocks = laid(h.shape[0], num_seqs, cu_seqlens, ids is None and slot_weights is None)
    ids, slot_weights = blocks.spread(ids), blocks.spread(slot_weights)
    u, fused = mixed(h, w, ids, slot_weights, scores, B, blocks, scaling, mix)
    base = None if base_weight is None else torch.nn.functional.linear(x, base_weight, base_bias)
    return _accumulate(base, u, _up(B, ids, dtype).mT, blocks, dtype), fused


def grad_output(
    g: Tensor,
    h: Tensor,
    w: Tensor,
    ids: Tensor | None,
    slot_weights: Tensor | None,
    scores: Tensor | None,
    B: list[Tensor],
    importance: list[Tensor],
    trained: list[Tensor],
    num_seqs: int,
    cu_seqlens: Tensor | None,
    scaling: float,
    mix: str,
    need_dh: bool,
    need_B: list[bool],
    need_importance: bool,
    need_slot_weights: bool,
    need_scores: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor, Tensor]:
    """From g = dL/dy (T, k) to rank space, and to the gradients of what lies behind it.

    Args:
        trained: bool (E,) of each bank, experts whose B gets a gradient (the others' is zero), and whose I where each
            has its own; none for all.

    Returns:
        dh, dB and dimportance of each bank, dslot_weights and dscores. What is not needed comes back empty. dB has what
        w brings to it.
    """
    accurate = accurate_dtype(g.dtype)
    slots = num_slots(ids, B, 0)
    blocks = laid(h.shape[0], num_seqs, cu_seqlens, ids is None and slot_weights is None)
    ids, slot_weights, h = blocks.spread(ids), blocks.spread(slot_weights), blocks.split(h)
    scores = None if scores is None else blocks.split(scores)
    g_blocks = blocks.split(g).to(accurate)
    need = grad_needs(mix, need_dh, any(need_B), need_importance, need_slot_weights, need_scores)
    dh, dslot_weights, dscores = (g.new_empty(0, dtype=accurate) for _ in range(3))
    dB = [b.new_empty(0) for b in B]
    dI = [i.new_empty(0) for i in importance]
    if need.p:
        up = _up(B, ids, g.dtype)
        p = torch.bmm(g_blocks, up).mul_(scaling).view(*h.shape[:3], slots, h.shape[4])
        w_slots = _slots_of_w(w, ids, B) if mix == "smolora" else None
        grads = MIX[mix].backward(p, h, w_slots, slot_weights, scores, need_slot_weights)
        dw_slots = grads.dw
        dh = blocks.join(grads.dh) if need_dh else dh
        dslot_weights = blocks.gather(grads.slot_weights) if need_slot_weights else dslot_weights
        dscores = blocks.join(grads.scores) if need_scores else dscores
    own_importance = has_own_importance(importance)
    if need_importance and not own_importance:
        by_bank = (dw_slots.flatten(2)[..., None] * torch.eye(2, dtype=accurate, device=g.device)[:, None]).flatten(
            1, 2
        )
        both = scaling * torch.bmm(up, by_bank).sum(0)  # (k, 2)
        dI = [grad.contiguous().to(like.dtype) for grad, like in zip(both.unbind(1), dI, strict=True)]
    used = _span(need_B)
    if ids is not None:
        member = _membership(ids, [b.shape[0] for b in B], accurate)
    if need.dw:
        dw = torch.cat([_by_expert(of_bank, dw_slots) for of_bank in member])
    if need_importance and own_importance:
        for bank, own in enumerate(dw.split([b.shape[0] for b in B])):
            grad = scaling * torch.bmm(B[bank].to(g.dtype).to(accurate), own[..., None])[..., 0]  # (E, k)
            if trained:
                grad.masked_fill_(~trained[bank][:, None], 0)
            dI[bank] = grad.to(dI[bank].dtype)
    if used is None:
        return dh, dB, dI, dslot_weights, dscores
    c = MIX[mix].coefficients(slot_weights, scores, scaling)
    banks = range(len(B))[used]
    live = _live_slots(ids, trained)
    if live is None or len(live):
        scaled = _scaled(h[:, :, used], c[:, :, used] if isinstance(c, Tensor) and c.shape[2] > 1 else c, slots)
        scaled = scaled.view(*h.shape[:2], len(banks), slots, h.shape[4])
        scaled = scaled if live is None else scaled.index_select(3, live)
        # sums over the tokens of each block; u^T g, since g^T u takes 1.5 times as long
        partial = torch.bmm(scaled.flatten(2).mT, g_blocks)
        partial = partial.view(blocks.number, *scaled.shape[2:], g.shape[1])  # (N, b, K, r, k)
    for bank in banks:
        E, k, r = B[bank].shape
        if live is not None and not len(live):
            grad = h.new_zeros(E, r, k)
        elif ids is None:
            grad = partial[0, bank - used.start]
        else:
            own = member[bank][:, :, used]
            grad = _by_expert(own if live is None else own.index_select(3, live), partial)  # (E, r, k)
        if need.dw:
            own = dw.split([b.shape[0] for b in B])[bank]
            I = importance[bank].to(accurate)
            grad.addcmul_(own[..., None], I[:, None] if own_importance else I, value=scaling)
        if trained:
            grad.masked_fill_(~trained[bank][:, None, None], 0)
        dB[bank] = grad.mT.contiguous().to(B[bank].dtype)
    return dh, dB, dI, dslot_weights, dscores


def _live_slots(ids: Tensor | None, trained: list[Tensor]) -> Tensor | None:
    """The slots that reach an expert that trains, where looking waits for no device; None for all."""
    if ids is None or len(trained) != 1 or trained[0].device.type != "cpu":
        return None
    alive = trained[0][ids[:, 0].long().clamp(min=0)].any(0)
    return None if bool(alive.all()) else alive.nonzero()[:, 0]


def grad_input(
    x: Tensor | None,
    dh: Tensor,
    ids: Tensor | None,
    A: list[Tensor],
    trained: list[Tensor],
    token_router: Tensor | None,
    dtoken_logits: Tensor | None,
    num_seqs: int,
    cu_seqlens: Tensor | None,
    route_mask: Tensor | None,
    dmean: Tensor | None,
    seed: Tensor | None,
    streams: list[int],
    threshold: int,
    masks: Tensor | None,
    dtype: torch.dtype,
    need_dx: bool,
    need_A: list[bool],
    need_token_router: bool,
    g: Tensor | None,
    base_weight: Tensor | None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """From dh to dx, and to the gradients of A and of the token router. What is not needed comes back empty.

    Args:
        x: tokens (T, d); None when neither A nor a token router needs a gradient.
        trained: bool (E,), or (1,) of a shared A, of each bank: rows of A that get a gradient (the others' is zero);
            none for all.
        dtoken_logits: (T, E), gradient of the token router's logits.
        dmean: (n, d), gradient of the mean that the routers saw, over the number of routed tokens; or None.
        masks: of dropout, from the same backend's `route_shrink`; None to draw them again.
        g, base_weight: with both, dx has the base's g W in it.

    Returns:
        dx (T, d), dA of each bank, dtoken_router.
    """
    accurate = accurate_dtype(dtype)
    common = is_common(A, ids)
    tokens, d = dh.shape[0], A[0].shape[2]
    blocks = laid(tokens, num_seqs, cu_seqlens, common)
    slots = dh.shape[2]
    dh, ids = blocks.split(dh).flatten(3), None if common else blocks.spread(ids)  # (N, L, b, K r)
    used = _span(need_A)
    keep = None
    if threshold:
        keep = _keep(seed, tokens, d, threshold, streams, blocks, accurate)
        dh = (dh * (256 / (256 - threshold))).permute(2, 0, 1, 3).contiguous()  # (b, N, L, K r)
    dx = dh.new_empty(0, dtype=dtype)
    dA = [a.new_empty(0) for a in A]
    drouter = dh.new_empty(0) if token_router is None else token_router.new_empty(0)
    if need_dx:
        down = _down(A, ids, dtype)
        base = None if base_weight is None else g @ base_weight
        if dtoken_logits is not None:
            router = token_router.to(dtype).to(accurate)
            extra = (dtoken_logits @ router).to(dtype) if base is None else None
            base = extra if base is None else base.addmm_(dtoken_logits.to(base.dtype), router.to(base.dtype))
        if keep is None:
            dx = _accumulate(base, dh.flatten(2), down.flatten(1, 2), blocks, dtype)
        else:
            parts = torch.bmm(dh.flatten(0, 1), down.transpose(0, 1).flatten(0, 1)).view_as(keep)
            dx = parts[0].mul_(keep[0])
            dx = blocks.join(dx if len(parts) == 1 else dx.addcmul_(parts[1], keep[1]))
            dx = (dx if base is None else dx.add_(base)).to(dtype)
        if dmean is not None:
            dx += mean_backward(dmean, tokens, num_seqs, cu_seqlens, route_mask)
    if need_token_router:
        drouter = (dtoken_logits.mT @ x.to(accurate)).to(token_router.dtype)
    if used is None:
        return dx, dA, drouter
    banks = range(len(A))[used]
    live = _live_slots(ids, trained)
    if live is not None:
        if not len(live):
            return (
                dx,
                [a.new_zeros(a.shape) if need else a.new_empty(0) for a, need in zip(A, need_A, strict=True)],
                drouter,
            )
        dh, slots = dh.unflatten(3, (slots, -1)).index_select(3, live).flatten(3), len(live)
    x_blocks = blocks.split(x).to(accurate)
    if keep is None:
        partial = torch.bmm(dh[:, :, used].flatten(2).mT, x_blocks)
        partial = partial.view(blocks.number, len(banks), slots, *A[0].shape[1:])
    else:
        partial = torch.bmm(dh[used].flatten(0, 1).mT, keep[used].mul_(x_blocks).flatten(0, 1))
        partial = partial.view(len(banks), blocks.number, slots, *A[0].shape[1:]).transpose(0, 1)
    if not common:
        member = _membership(ids, [a.shape[0] for a in A], accurate)
    for bank in banks:
        if common:
            grad = partial[0, bank - used.start]
        else:
            own = member[bank][:, :, used]
            grad = _by_expert(own if live is None else own.index_select(3, live), partial)
        if trained:
            grad = grad.masked_fill(~trained[bank][:, None, None], 0)
        dA[bank] = grad.to(A[bank].dtype)
    return dx, dA, drouter
