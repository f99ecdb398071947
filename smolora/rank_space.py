"""The four passes in plain torch: the CPU backend, and the algebra that the kernels implement.

One token's h = A x has r numbers, and everything else between A and B happens there: the k-sized expert outputs of
Eq. 7 to 9 never exist. The two branches lie side by side, VU first, in tensors with these axes:

    T tokens, n instances, b branches in use (2, or 1 with fusion "vu" or "if"), c chosen experts, r rank
    h       (T, b, c, r)   A x of the chosen experts, x after dropout
    w       (M + N, r)     s B^T I of every expert, so that an expert's score I . (s B h) is w . h
    routes  (n, b, c)      int32, the chosen experts
    gates   (n, b, c)      softmax over the chosen logits
    logits  (n, M + N)     router outputs; (n, 0) when the routes were given
    mean    (n, d)         what the VU router saw; (0, 0) when nobody needs it
    lead    (T,)           by how much the VU branch's score leads: its share alpha is sigmoid(lead), the IF branch's
                           beta is sigmoid(-lead), which 1 - alpha would round away where beta is small

Reductions, h, w, gates and lead are float32 (float64 for float64 inputs). Packed instances of unequal lengths are cut
into blocks of one instance each, so that every product is one batched matrix product over blocks.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .common import FIXED_LEAD, accurate_dtype, active_streams, branches, wanted

try:
    compiled: ModuleType | None = importlib.import_module("._cpu", __package__)
except ImportError:  # no C++ compiler where smolora was built
    compiled = None

LOW = 0xFFFFFFFF

# ---------------------------------------------------------------------------------------------------------- dropout


def keep_masks(
    seed: Tensor, rows: int, columns: int, threshold: int, streams: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Dropout masks (streams, rows, columns) of `dtype`: 1 where an element is kept and 0 where it is dropped.

    Philox4x32-10 with counter (column // 16, row low, row high, stream) and key `seed` (int64 (1,), on the device);
    byte `column % 16` of its output is compared with `threshold`.
    """
    device, blocks = seed.device, -(-columns // 16)
    masks = torch.empty((len(streams), rows, 16 * blocks), dtype=dtype, device=device)
    if compiled is not None and device.type == "cpu" and dtype in (torch.float32, torch.float64):
        key = int(seed) % 2**64
        for mask, stream in zip(masks, streams, strict=True):
            address, is_double = mask.data_ptr(), dtype == torch.float64
            compiled.keep_mask(address, is_double, rows * blocks, blocks, stream, key, threshold)
        return masks[..., :columns]
    # a CPU goes through some rows at a time, so that ten rounds of a counter find it in the cache
    step = max(1, rows)
    if device.type == "cpu":
        step = max(1, 32768 * torch.get_num_threads() // max(1, len(streams) * blocks))
    column = torch.arange(blocks, device=device)
    stream = torch.tensor(streams, device=device)[:, None, None]
    for start in range(0, rows, step):
        row = torch.arange(start, min(rows, start + step), device=device)[:, None]
        words = torch.empty((len(streams), row.shape[0], blocks, 4), dtype=torch.int32, device=device)
        for i, word in enumerate(_philox(column, row & LOW, row >> 32, stream, seed)):
            words[..., i] = word  # wraps to the lower half
        torch.ge(words.view(torch.uint8).flatten(2), threshold, out=masks[:, start : start + step])
    return masks[..., :columns]


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of counters that broadcast together: four 32-bit words, each the lower half of an int64.

    A product of two 32-bit words wraps in int64, but has the right 64 bits. The counters are broadcast by the rounds
    themselves: in the first three, most words depend on the row, the column or the stream alone.
    """
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = _xor((b >> 32).bitwise_xor_(k0), c1).bitwise_and_(LOW)
        c2 = _xor((a >> 32).bitwise_xor_(k1), c3).bitwise_and_(LOW)
        c1, c3 = b, a
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


def _xor(own: Tensor, other: Tensor) -> Tensor:
    """own ^ other, in place where it has room for the result."""
    return own.bitwise_xor_(other) if own.shape == other.shape else own ^ other


# ------------------------------------------------------------------------------------------------ instances and blocks


class Blocks(NamedTuple):
    """Tokens cut into N equal blocks of L tokens, each of one instance: (B, S) itself, or packed tokens re-laid."""

    number: int
    length: int
    instance: Tensor | None  # (N,) the instance of a block; None: block = instance
    count: Tensor | None  # (n,) blocks of an instance, which lie together
    token: Tensor | None  # (N * L,) the token at a place, T for a place that is empty; None: the token itself
    place: Tensor | None  # (T,) the place of a token

    def split(self, tokens: Tensor) -> Tensor:
        """(T, ...) -> (N, L, ...), zero where a block has no token."""
        if self.token is not None:
            tokens = torch.cat([tokens, tokens.new_zeros(1, *tokens.shape[1:])]).index_select(0, self.token)
        return tokens.reshape(self.number, self.length, *tokens.shape[1:])

    def join(self, blocks: Tensor) -> Tensor:
        """(N, L, ...) -> (T, ...)."""
        tokens = blocks.reshape(self.number * self.length, *blocks.shape[2:])
        return tokens if self.place is None else tokens.index_select(0, self.place)

    def spread(self, per_instance: Tensor) -> Tensor:
        """(n, ...) -> (N, ...), each block's instance."""
        return per_instance if self.instance is None else per_instance.index_select(0, self.instance)

    def gather(self, per_block: Tensor) -> Tensor:
        """(N, ...) -> (n, ...), summed over the blocks of an instance, in their order."""
        if self.count is None:
            return per_block
        flat = torch.segment_reduce(per_block.flatten(1), "sum", lengths=self.count, axis=0, unsafe=True, initial=0)
        return flat.reshape(-1, *per_block.shape[1:])


def cut(tokens: int, instances: int, cu_seqlens: Tensor | None) -> Blocks:
    """The blocks of a batch: `instances` of equal length, or packed ones with boundaries `cu_seqlens` (n + 1,)."""
    if cu_seqlens is None or not instances:
        return Blocks(instances, tokens // max(instances, 1), None, None, None, None)
    cu = cu_seqlens.long()
    length = 16
    while length < 256 and length * instances < tokens:
        length *= 2
    lengths = cu[1:] - cu[:-1]
    count = (lengths + length - 1) // length
    ends = count.cumsum(0)
    number = tokens // length + instances  # an upper bound that no value on the device is needed for
    block = torch.arange(number, device=cu.device)
    instance = torch.searchsorted(ends, block, right=True).clamp_(max=instances - 1)
    start = cu[:-1].index_select(0, instance) + (block - (ends - count)[instance]) * length
    token = start[:, None] + torch.arange(length, device=cu.device)
    inside = (token < cu[1:].index_select(0, instance)[:, None]) & (block < ends[-1])[:, None]
    token = torch.where(inside, token, tokens).view(-1)
    place = torch.empty(tokens + 1, dtype=torch.long, device=cu.device)
    place[token] = torch.arange(number * length, device=cu.device)
    return Blocks(number, length, instance, count, token, place[:tokens])


def members(routes: Tensor, experts: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """For each branch in use, 1 where a chosen expert is the expert and 0 elsewhere: (experts, N, b, c).

    Args:
        routes: (N, b, c).
        experts: how many each branch in use has.
        dtype: of the result.
    """
    if len(experts) == 2:  # counted through, IF experts after those of VU
        routes = routes + torch.arange(0, 2 * experts[0], experts[0], device=routes.device)[:, None]
    number = torch.arange(sum(experts), device=routes.device).view(-1, 1, 1, 1)
    return (number == routes).to(dtype).split(experts)


def by_expert(member: Tensor, chosen: Tensor) -> Tensor:
    """Sum (N, b, c, ...) into (experts, ...), as one product in a fixed order; `member` is a branch's."""
    return torch.tensordot(member, chosen, 3)


# ---------------------------------------------------------------------------------------------------- routing and mix


def choose(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """softmax(top_k(logits)) of Eq. 5 and 6 over (n, E): experts (n, c) int32, ties to the lowest, and gates (n, c)."""
    values, index = torch.sort(logits, dim=-1, descending=True, stable=True)
    return index[:, :top_k].int(), torch.softmax(values[:, :top_k], -1)


def route_backward(
    dgates: Tensor, gates: Tensor, routes: Tensor, logits: Tensor, num_vu: int, fusion: str, straight_through: bool
) -> Tensor:
    """Gradient of the router logits (n, M + N) from that of the gates (n, b, c).

    The softmax over the chosen logits, or, straight through, over all of them: dz_j = pi_j (dq_j - sum pi_e dq_e).
    """
    dlogits = torch.zeros_like(logits)
    for slot, branch in enumerate(active_streams(fusion)):
        columns = slice(0, num_vu) if branch == 0 else slice(num_vu, None)
        z, chosen, dq = logits[:, columns], routes[:, slot].long(), dgates[:, slot]
        if straight_through:
            pi = torch.softmax(z, -1)
            dq = torch.zeros_like(z).scatter_(1, chosen, dq)
            dlogits[:, columns] = pi * (dq - (pi * dq).sum(-1, keepdim=True))
        else:
            q = gates[:, slot]
            dlogits[:, columns] = torch.zeros_like(z).scatter_(1, chosen, q * (dq - (q * dq).sum(-1, keepdim=True)))
    return dlogits


def mix(h: Tensor, w: Tensor, gates: Tensor, fusion: str) -> Tensor:
    """The lead (N, L), I . x_vu - I . x_if of Eq. 8, from h (N, L, b, c, r), the chosen w (N, b, c, r) and gates."""
    if fusion != "adaptive":
        return h.new_full(h.shape[:2], FIXED_LEAD[fusion])
    score = (h * (w * gates[..., None])[:, None]).sum((3, 4))
    return score[..., 0] - score[..., 1]


def shares(lead: Tensor, fusion: str) -> Tensor:
    """The lead (...) -> the shares (..., b) of the branches in use, alpha and beta."""
    return torch.sigmoid(torch.stack([(lead, -lead)[branch] for branch in active_streams(fusion)], -1))


def mix_backward(
    p: Tensor, h: Tensor, w: Tensor, gates: Tensor, share: Tensor, fusion: str, need_gates: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative of mix and of the gating, from p = s B^T g (N, L, b, c, r) and the shares (N, L, b).

    Returns:
        dh (N, L, b, c, r); c = sum over tokens of the score's gradient times q h (N, b, c, r), which carries it to B
        and I, empty unless the fusion is adaptive; and the gates' gradient (N, b, c), empty if it is not needed.
    """
    q = gates[:, None, ..., None]
    gated = share[..., None, None] * p
    c = h.new_empty(0)
    if fusion == "adaptive":
        qh = q * h
        ph = (p * qh).sum((3, 4))  # (N, L, 2)
        delta = share.prod(-1) * (ph[..., 0] - ph[..., 1])  # (N, L)
        delta = torch.stack([delta, -delta], -1)[..., None, None]
        gated = gated.addcmul_(delta, w[:, None])
        c = (delta * qh).sum(1)
    return q * gated, c, (gated * h).sum((1, 4)) if need_gates else h.new_empty(0)


# ---------------------------------------------------------------------------------------------------------- the passes


def _routed(
    route_mask: Tensor | None, tokens: int, instances: int, blocks: Blocks, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Which places route, 1 or 0 (N, L), and how many do in each instance (n, 1), at least 1."""
    if route_mask is None and blocks.token is None:
        return like.new_ones((blocks.number, blocks.length)), like.new_full((instances, 1), max(blocks.length, 1))
    routed = like.new_ones(tokens) if route_mask is None else route_mask.to(like.dtype)
    routed = blocks.split(routed)
    return routed, blocks.gather(routed.sum(1, keepdim=True)).clamp(min=1)


def routed_tokens(
    route_mask: Tensor | None, tokens: int, instances: int, cu_seqlens: Tensor | None, like: Tensor
) -> Tensor:
    """How many tokens route in each instance (n, 1), at least 1, in the dtype of `like`."""
    return _routed(route_mask, tokens, instances, cut(tokens, instances, cu_seqlens), like)[1]


def _picked(experts: tuple[Tensor, Tensor], routes: Tensor, fusion: str, dtype: torch.dtype) -> list[Tensor]:
    """For each branch in use its chosen experts (N, c, ...), rounded to the compute dtype; routes (N, b, c)."""
    chosen = zip((experts[branch] for branch in active_streams(fusion)), routes.unbind(1), strict=True)
    return [e.index_select(0, route.reshape(-1)).to(dtype).view(*route.shape, *e.shape[1:]) for e, route in chosen]


def _chosen_A(A: tuple[Tensor, Tensor], routes: Tensor, fusion: str, dtype: torch.dtype) -> Tensor:
    """The chosen down projections (N, b, c r, d), rounded to the compute dtype; routes (N, b, c)."""
    picked = torch.stack(_picked(A, routes, fusion, dtype), 1)
    return picked.flatten(2, 3).to(accurate_dtype(dtype))


def _chosen_B(B: tuple[Tensor, Tensor], routes: Tensor, fusion: str, dtype: torch.dtype) -> Tensor:
    """The chosen up projections side by side (N, k, b c r), rounded to the compute dtype; routes (N, b, c)."""
    picked = [b.transpose(1, 2).flatten(2) for b in _picked(B, routes, fusion, dtype)]
    return torch.cat(picked, -1).to(accurate_dtype(dtype))


def _chosen_w(w: Tensor, routes: Tensor, num_vu: int, fusion: str) -> Tensor | None:
    """The chosen rows of w (N, b, c, r); None unless the fusion is adaptive."""
    if fusion != "adaptive":
        return None
    rows = routes + torch.arange(0, 2 * num_vu, num_vu, device=routes.device)[:, None]
    return w.index_select(0, rows.flatten()).view(*routes.shape, w.shape[1])


def _keep(seed: Tensor, tokens: int, d: int, threshold: int, fusion: str, blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """The dropout masks of the branches in use, in blocks: (b, N, L, d)."""
    masks = keep_masks(seed, tokens, d, threshold, active_streams(fusion), dtype)
    if blocks.token is None:
        return masks.view(len(masks), blocks.number, blocks.length, d)
    return torch.stack([blocks.split(mask) for mask in masks])


def _fused(h: Tensor, share: Tensor, gates: Tensor, scaling: float) -> Tensor:
    """What B is multiplied with, s (alpha q h_vu | beta q h_if): (N, L, b c r)."""
    return (h * (scaling * share[..., None] * gates[:, None])[..., None]).flatten(2)


def route_shrink(
    x: Tensor,
    instances: int,
    cu_seqlens: Tensor | None,
    route_mask: Tensor | None,
    instruction: Tensor | None,
    given_routes: Tensor | None,
    given_gates: Tensor | None,
    vu_A: Tensor,
    if_A: Tensor,
    vu_B: Tensor,
    if_B: Tensor,
    vu_router: Tensor,
    if_router: Tensor,
    vu_importance: Tensor,
    if_importance: Tensor,
    seed: Tensor | None,
    threshold: int,
    top_k: int,
    scaling: float,
    fusion: str,
    need_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Route each instance and bring its tokens into rank space: (h, w, routes, gates, logits, mean).

    Args:
        x: tokens (T, d).
        instances: n; without `cu_seqlens` each has T / n tokens.
        cu_seqlens: int32 (n + 1,).
        route_mask: bool (T,), tokens the VU router averages; an instance without any routes by a zero mean.
        instruction: (n, e); None if the IF branch routes nothing.
        given_routes, given_gates: (n, b, c), instead of routing.
        seed, threshold: of dropout; there is none with threshold 0.
        need_mean: return the mean, which the gradient of a router needs.
    """
    accurate = accurate_dtype(x.dtype)
    blocks = cut(x.shape[0], instances, cu_seqlens)
    x_blocks = blocks.split(x).to(accurate)
    mean = x.new_empty((0, 0), dtype=accurate)
    logits = x.new_zeros((instances, 0), dtype=accurate)
    if given_routes is not None:
        routes, gates = given_routes.clone(), given_gates.to(accurate, copy=True)
    else:
        use_vu, use_if = branches(fusion)
        z_vu, z_if = (
            None if used else x.new_zeros((instances, router.shape[0]), dtype=accurate)
            for used, router in ((use_vu, vu_router), (use_if, if_router))
        )
        if use_vu:
            routed, count = _routed(route_mask, x.shape[0], instances, blocks, x_blocks)
            seen = x_blocks  # a NaN in the padding is nobody's, but 0 times it is one
            if route_mask is not None:
                seen = x_blocks.masked_fill(routed[..., None] == 0, 0)
            mean = blocks.gather(torch.bmm(routed[:, None], seen)[:, 0]) / count
            z_vu = mean @ vu_router.to(accurate).mT
        if use_if:
            z_if = instruction.to(accurate) @ if_router.to(accurate).mT
        logits = torch.cat([z_vu, z_if], 1)
        chosen = [choose(z, top_k) for z, used in ((z_vu, use_vu), (z_if, use_if)) if used]
        routes, gates = (torch.stack(parts, 1) for parts in zip(*chosen, strict=True))
    A = _chosen_A((vu_A, if_A), blocks.spread(routes), fusion, x.dtype)
    if threshold:
        kept = _keep(seed, *x.shape, threshold, fusion, blocks, accurate).mul_(x_blocks)
        h = torch.bmm(kept.flatten(0, 1), A.transpose(0, 1).flatten(0, 1).mT)
        h = h.view(*kept.shape[:3], A.shape[2]).permute(1, 2, 0, 3).contiguous().mul_(256 / (256 - threshold))
    else:
        h = torch.bmm(x_blocks, A.flatten(1, 2).mT)
    h = blocks.join(h).reshape(x.shape[0], *routes.shape[1:], vu_A.shape[1])
    w = x.new_empty((0, vu_A.shape[1]), dtype=accurate)
    if fusion == "adaptive":
        rounded = [
            (B.to(x.dtype).to(accurate), I.to(x.dtype).to(accurate))
            for B, I in ((vu_B, vu_importance), (if_B, if_importance))
        ]
        # no matrix-vector product: its last bits depend on where in memory B lies
        w = scaling * torch.cat([(B * I[:, None]).sum(1) for B, I in rounded])
    return h, w, routes, gates, logits, mean if need_mean else x.new_empty((0, 0), dtype=accurate)


def fuse_expand(
    h: Tensor,
    w: Tensor,
    routes: Tensor,
    gates: Tensor,
    vu_B: Tensor,
    if_B: Tensor,
    instances: int,
    cu_seqlens: Tensor | None,
    scaling: float,
    fusion: str,
    dtype: torch.dtype,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Fuse the branches and expand them to the output: (y (T, k), lead (T,)).

    Without `weight` y is the adapter's output alone; with it, x weight^T + bias is in it too.
    """
    blocks = cut(h.shape[0], instances, cu_seqlens)
    routes, gates, h = blocks.spread(routes), blocks.spread(gates), blocks.split(h)
    lead = mix(h, _chosen_w(w, routes, vu_B.shape[0], fusion), gates, fusion)
    u = _fused(h, shares(lead, fusion), gates, scaling)
    B = _chosen_B((vu_B, if_B), routes, fusion, dtype)
    base = None if weight is None else torch.nn.functional.linear(x, weight, bias)
    return _accumulate(base, u, B.mT, blocks, dtype), blocks.join(lead)


def _accumulate(base: Tensor | None, left: Tensor, right: Tensor, blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """base (T, columns) + left (N, L, j) @ right (N, j, columns), in place where base has the shape and precision."""
    if base is not None and blocks.token is None and base.dtype == left.dtype:
        base.view(blocks.number, blocks.length, base.shape[1]).baddbmm_(left, right)
        return base
    out = left.new_empty(left.shape[0] * left.shape[1], right.shape[2])
    torch.bmm(left, right, out=out.view(*left.shape[:2], right.shape[2]))
    out = out if blocks.place is None else out.index_select(0, blocks.place)
    return (out if base is None else out.add_(base)).to(dtype)


def grad_output(
    g: Tensor,
    h: Tensor,
    w: Tensor,
    routes: Tensor,
    gates: Tensor,
    lead: Tensor,
    vu_B: Tensor,
    if_B: Tensor,
    vu_importance: Tensor,
    if_importance: Tensor,
    instances: int,
    cu_seqlens: Tensor | None,
    scaling: float,
    fusion: str,
    need_dh: bool,
    need_vu_B: bool,
    need_if_B: bool,
    need_importance: bool,
    need_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From g = dL/dy (T, k): (dh (T, b, c, r), dvu_B, dif_B, dvu_importance, dif_importance, dgates (n, b, c)).

    What is not needed, or not in use, comes back empty.
    """
    accurate = accurate_dtype(g.dtype)
    blocks = cut(h.shape[0], instances, cu_seqlens)
    routes, gates, h = blocks.spread(routes), blocks.spread(gates), blocks.split(h)
    share = shares(blocks.split(lead), fusion)
    g_blocks = blocks.split(g).to(accurate)
    streams = active_streams(fusion)
    need = wanted(fusion, need_dh, need_vu_B, need_if_B, need_importance, need_gates)
    used = _span([(need.vu_B, need.if_B)[branch] for branch in streams])
    dh = dgates = g.new_empty(0, dtype=accurate)
    dB = [B.new_empty(0) for B in (vu_B, if_B)]
    dI = [importance.new_empty(0) for importance in (vu_importance, if_importance)]
    if need.p:
        B = _chosen_B((vu_B, if_B), routes, fusion, g.dtype)
        p = torch.bmm(g_blocks, B).mul_(scaling).view_as(h)
        dh, c, dgates = mix_backward(
            p, h, _chosen_w(w, routes, vu_B.shape[0], fusion), gates, share, fusion, need_gates
        )
        dh = blocks.join(dh) if need_dh else g.new_empty(0, dtype=accurate)
        dgates = blocks.gather(dgates) if need_gates else dgates
    if need.importance:
        by_branch = (c.flatten(2)[..., None] * torch.eye(2, dtype=accurate, device=c.device)[:, None]).flatten(1, 2)
        both = scaling * torch.bmm(B, by_branch).sum(0)  # (k, 2)
        dI = [grad.contiguous().to(like.dtype) for grad, like in zip(both.unbind(1), dI, strict=True)]
    if used is not None:
        # u^T g: g^T u would take half as long again
        partial = torch.bmm(_fused(h[:, :, used], share[..., used], gates[:, used], scaling).mT, g_blocks)
        partial = partial.view(blocks.number, used.stop - used.start, *h.shape[3:], g.shape[1])  # (N, b, c, r, k)
        member = members(routes, tuple((vu_B, if_B)[branch].shape[0] for branch in streams), accurate)
        for slot in range(len(streams))[used]:
            branch = streams[slot]
            grad = by_expert(member[slot][:, :, used], partial)  # (E, r, k)
            if need.c:
                importance = (vu_importance, if_importance)[branch].to(accurate)
                grad.addcmul_(by_expert(member[slot], c)[..., None], importance, value=scaling)
            dB[branch] = grad.mT.contiguous().to(dB[branch].dtype)
    return dh, *dB, *dI, dgates


def _span(needed: list[bool]) -> slice | None:
    """The branches that are needed, as a slice of those in use; None if none is."""
    slots = [slot for slot, need in enumerate(needed) if need]
    return slice(slots[0], slots[-1] + 1) if slots else None


def grad_input(
    x: Tensor | None,
    dh: Tensor,
    routes: Tensor,
    vu_A: Tensor,
    if_A: Tensor,
    instances: int,
    cu_seqlens: Tensor | None,
    route_mask: Tensor | None,
    dmean: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    fusion: str,
    dtype: torch.dtype,
    need_dx: bool,
    need_vu_A: bool,
    need_if_A: bool,
    g: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """From dh (T, b, c, r): (dx (T, d), dvu_A, dif_A); what is not needed comes back empty.

    Args:
        x: tokens (T, d); None when no A needs a gradient.
        dmean: (n, d), gradient of the mean that the VU router saw, over the number of routed tokens; or None.
        g, weight: with both, dx has the base's g weight in it.
    """
    accurate = accurate_dtype(dtype)
    blocks = cut(dh.shape[0], instances, cu_seqlens)
    tokens, d = dh.shape[0], vu_A.shape[2]
    dh, routes = blocks.split(dh).flatten(3), blocks.spread(routes)  # (N, L, b, c r)
    streams = active_streams(fusion)
    used = _span([(need_vu_A, need_if_A)[branch] for branch in streams])
    keep = None
    if threshold:
        keep = _keep(seed, tokens, d, threshold, fusion, blocks, accurate)
        dh = (dh * (256 / (256 - threshold))).permute(2, 0, 1, 3).contiguous()  # (b, N, L, c r)
    dx = dh.new_empty(0, dtype=dtype)
    dA = [A.new_empty(0) for A in (vu_A, if_A)]
    if need_dx:
        A = _chosen_A((vu_A, if_A), routes, fusion, dtype)
        base = None if weight is None else g @ weight
        if keep is None:
            dx = _accumulate(base, dh.flatten(2), A.flatten(1, 2), blocks, dtype)
        else:
            parts = torch.bmm(dh.flatten(0, 1), A.transpose(0, 1).flatten(0, 1)).view_as(keep)
            dx = parts[0].mul_(keep[0])
            dx = blocks.join(dx if len(parts) == 1 else dx.addcmul_(parts[1], keep[1]))
            dx = (dx if base is None else dx.add_(base)).to(dtype)
        if dmean is not None:
            routed, _ = _routed(route_mask, tokens, instances, blocks, dh)
            dx += blocks.join(routed[..., None] * blocks.spread(dmean)[:, None])
    if used is not None:
        x_blocks = blocks.split(x).to(accurate)
        if keep is None:
            partial = torch.bmm(dh[:, :, used].flatten(2).mT, x_blocks)
            partial = partial.view(blocks.number, used.stop - used.start, routes.shape[2], *vu_A.shape[1:])
        else:
            partial = torch.bmm(dh[used].flatten(0, 1).mT, keep[used].mul_(x_blocks).flatten(0, 1))
            partial = partial.view(used.stop - used.start, blocks.number, routes.shape[2], *vu_A.shape[1:])
            partial = partial.transpose(0, 1)
        member = members(routes, tuple((vu_A, if_A)[branch].shape[0] for branch in streams), accurate)
        for slot in range(len(streams))[used]:
            branch = streams[slot]
            dA[branch] = by_expert(member[slot][:, :, used], partial).to(dA[branch].dtype)
    return dx, *dA
