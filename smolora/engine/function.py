"""A linear layer with a mixture of low-rank experts on it, under autograd.

Differentiation lives in a thin `autograd.Function` around the four operators of `ops.py`, which torch.compile traces
through. Following x: `mixture_linear` -> `_Mixture.forward` -> `ops.route_shrink` -> `cpu_passes.route_shrink`, which
falls back to `torch_passes`, or the pass of that name in `kernels/` or `cuda_passes` (`ops.BACKENDS`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..spec import Bank, Dropout, Mixed, Router, Slots, Tokens, num_slots
from . import cpu_passes, cuda_passes, torch_passes
from .ops import decode, fuse_expand, grad_input, grad_output, route_shrink, without_autocast


class _Options(NamedTuple):
    """What `_Mixture` needs besides tensors."""

    banks: int
    num_seqs: int
    streams: list[int]
    threshold: int
    router_reads_x: list[bool]
    top_k: int
    gate: str
    gate_grad: str | None  # the softmax whose gradient the routers get; None: they get none
    scaling: float
    mix: str
    backend: str
    keep_x: bool


class _Mixture(torch.autograd.Function):
    """Forward and backward over the four passes. What it returns besides y is not differentiable.

    Saved for backward, besides parameters: x if an A or a token router trains (else nothing of x's size), h, the
    scores, per-sequence tensors, and dropout's masks as bits, T d / 8 bytes a bank, where a backend keeps them. Saved
    tensors are never modified in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        options: _Options,
        route_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        ids: Tensor | None,
        router_rows: Tensor | None,
        seed: Tensor | None,
        base_weight: Tensor | None,
        base_bias: Tensor | None,
        trained: tuple[Tensor, ...],
        trained_A: tuple[Tensor, ...],
        x: Tensor,
        slot_weights: Tensor | None,
        scores: Tensor | None,
        instruction: Tensor | None,
        token_router: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        o = options
        A, B, importance, routers = _split(parameters, o)
        h, w, routed_ids, routed_weights, logits, mean, token_logits, masks = route_shrink(
            x=x,
            num_seqs=o.num_seqs,
            cu_seqlens=cu_seqlens,
            route_mask=route_mask,
            instruction=instruction,
            ids=ids,
            A=A,
            B=B,
            importance=importance,
            routers=routers,
            router_reads_x=o.router_reads_x,
            router_rows=router_rows,
            token_router=token_router,
            seed=seed,
            streams=o.streams,
            threshold=o.threshold,
            top_k=o.top_k,
            gate=o.gate,
            scaling=o.scaling,
            mix=o.mix,
            need_mean=o.gate_grad is not None and any(o.router_reads_x),
            backend=o.backend,
        )
        if routers:
            ids, slot_weights = routed_ids, routed_weights
        if token_router is not None:
            scores = token_logits
        y, fused = fuse_expand(
            h=h,
            w=w,
            ids=ids,
            slot_weights=slot_weights,
            scores=scores,
            B=B,
            num_seqs=o.num_seqs,
            cu_seqlens=cu_seqlens,
            scaling=o.scaling,
            mix=o.mix,
            dtype=x.dtype,
            x=None if base_weight is None else x,
            base_weight=base_weight,
            base_bias=base_bias,
            backend=o.backend,
        )
        if o.mix == "smolora":
            scores = fused
        ctx.save_for_backward(
            x if o.keep_x else None,
            masks if masks.numel() else None,
            h,
            w,
            ids,
            slot_weights,
            scores,
            logits,
            mean,
            route_mask,
            cu_seqlens,
            router_rows,
            seed,
            base_weight,
            instruction,
            token_router,
            *trained,
            *trained_A,
            *parameters,
        )
        ctx.options, ctx.dtype, ctx.num_trained = o, x.dtype, (len(trained), len(trained_A))
        decided = (routed_ids, routed_weights, logits, token_logits, fused)
        ctx.mark_non_differentiable(*decided)
        return y, *decided

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, masks, h, w, ids, slot_weights, scores, logits, mean, *rest = ctx.saved_tensors
        route_mask, cu_seqlens, router_rows, seed, base_weight, instruction, token_router, *rest = rest
        o, (of_B, of_A) = ctx.options, ctx.num_trained
        trained, trained_A, parameters = rest[:of_B], rest[of_B : of_B + of_A], rest[of_B + of_A :]
        A, B, importance, routers = _split(parameters, o)
        needs = ctx.needs_input_grad[10:]
        need_x, need_weights, need_scores, need_instruction, need_token_router, *need_parameters = needs
        need_A, need_B, need_I, need_routers = _split(need_parameters, o)
        dy = dy.contiguous()
        learn = o.gate_grad is not None and (need_x or need_instruction or any(need_routers))
        through_tokens = token_router is not None and (need_x or need_token_router)
        need_dh = need_x or any(need_A) or need_token_router
        dh, dB, dI, dslot_weights, dscores = grad_output(
            g=dy,
            h=h,
            w=w,
            ids=ids,
            slot_weights=slot_weights,
            scores=scores,
            B=B,
            importance=importance,
            trained=trained,
            num_seqs=o.num_seqs,
            cu_seqlens=cu_seqlens,
            scaling=o.scaling,
            mix=o.mix,
            need_dh=need_dh,
            need_B=need_B,
            need_importance=any(need_I),
            need_slot_weights=need_weights or learn,
            need_scores=need_scores or through_tokens,
            backend=o.backend,
        )
        dx = dinstruction = dtoken_router = dmean = None
        drouters: list[Tensor | None] = [None] * len(routers)
        if learn:
            with without_autocast(dy.device.type):
                drouters, dmean, dinstruction = _routers_backward(
                    dslot_weights, slot_weights, ids, logits, mean, instruction, routers, router_rows, o
                )
                if dmean is not None:
                    dmean = dmean / torch_passes.routed_tokens(route_mask, h.shape[0], o.num_seqs, cu_seqlens, mean)
        dA: list[Tensor | None] = [None] * len(A)
        if need_dh:
            dx, dA, dtoken_router = grad_input(
                x=x,
                dh=dh,
                ids=ids,
                A=A,
                trained=trained_A,
                token_router=token_router,
                dtoken_logits=dscores if through_tokens else None,
                num_seqs=o.num_seqs,
                cu_seqlens=cu_seqlens,
                route_mask=route_mask,
                dmean=dmean if need_x else None,
                seed=seed,
                streams=o.streams,
                threshold=o.threshold,
                masks=masks,
                dtype=ctx.dtype,
                need_dx=need_x,
                need_A=need_A,
                need_token_router=need_token_router,
                g=None if base_weight is None else dy,
                base_weight=base_weight,
                backend=o.backend,
            )
        gradients = (dx, dslot_weights, dscores, dinstruction, dtoken_router, *dA, *dB, *dI, *drouters)
        kept = [grad if need else None for grad, need in zip(gradients, ctx.needs_input_grad[10:], strict=True)]
        return *(None,) * 10, *kept


def _split(parameters: Sequence[Any], options: _Options) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Split a per-parameter list (values, flags or gradients) into those of A, B, importance vectors and routers."""
    b = options.banks
    importance = b if options.mix == "smolora" else 0
    parameters = list(parameters)
    return (
        parameters[:b],
        parameters[b : 2 * b],
        parameters[2 * b : 2 * b + importance],
        parameters[2 * b + importance :],
    )


def _routers_backward(
    dslot_weights: Tensor,
    slot_weights: Tensor,
    ids: Tensor,
    logits: Tensor,
    mean: Tensor,
    instruction: Tensor | None,
    routers: list[Tensor],
    rows: Tensor | None,
    options: _Options,
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Return the gradients of the routers, of the mean that they saw, and of the instruction."""
    drouters, dmean, dinstruction, start = [], None, None, 0
    for bank, (router, reads_x) in enumerate(zip(routers, options.router_reads_x, strict=True)):
        z = logits[:, start : start + router.shape[-2]]
        start += router.shape[-2]
        dz = torch_passes.choose_backward(
            dslot_weights[:, bank], slot_weights[:, bank], ids[:, bank], z, options.gate_grad
        )
        seen = mean if reads_x else instruction.to(dz.dtype)
        weight = router.to(dz.dtype)
        if rows is None:
            drouter, dseen = dz.mT @ seen, dz @ weight
        else:
            # one-hot matmul: index_add_ is not deterministic
            one_hot = (rows == torch.arange(router.shape[0], device=rows.device)[:, None]).to(dz.dtype)
            drouter = (one_hot @ (dz[..., None] * seen[:, None]).flatten(1)).view_as(router)
            dseen = torch.bmm(dz[:, None], weight.index_select(0, rows))[:, 0]
        drouters.append(drouter.to(router.dtype))
        if reads_x:
            dmean = dseen if dmean is None else dmean + dseen
        else:
            dseen = dseen.to(instruction.dtype)
            dinstruction = dseen if dinstruction is None else dinstruction + dseen
    return drouters, dmean, dinstruction


def _dense(bank: Bank) -> Bank:
    """Return a bank with contiguous parameters: kernels read them by address."""
    importance = None if bank.importance is None else bank.importance.contiguous()
    return bank._replace(A=bank.A.contiguous(), B=bank.B.contiguous(), importance=importance)


def _dense_router(router: Router) -> Router:
    return router._replace(weight=router.weight.contiguous())


def mixture_linear(
    x: Tensor,
    banks: Sequence[Bank],
    *,
    tokens: Tokens,
    scaling: float,
    backend: str,
    mix: str = "weighted",
    slots: Slots | None = None,
    routers: Sequence[Router] = (),
    top_k: int = 0,
    gate: str = "chosen",
    gate_grad: str | None = None,
    token_router: Tensor | None = None,
    token_weights: Tensor | None = None,
    instruction: Tensor | None = None,
    dropout: Dropout = Dropout(),  # noqa: B008
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Mixed:
    """Apply a mixture of low-rank experts to tokens, with or without the linear layer under it.

    Args:
        x: (T, d), contiguous, in the compute dtype; `weight` (k, d) and `bias` (k,) are frozen and have the same dtype.
        banks: experts, of any floating dtype and strides; all banks have the same rank, k, and number of slots.
        tokens: sequences and their routed tokens, contiguous.
        scaling: s.
        backend: "torch", "triton" or "cuda".
        mix: "weighted": c is s times the slot's weight, or s times `token_weights` (T, K), of one bank; both may need
            a gradient. "softmax": c is s softmax(R x) over all experts, R being `token_router` (E, d). "smolora": Eq. 8
            and 9 of SMoLoRA over two banks.
        slots: given experts. Without them, and without `routers`, every expert of the bank has a slot, in order.
        routers: of each bank, which choose `top_k` experts; weights are the softmax over the chosen logits, or with
            `gate` "all" over all of them.
        gate_grad: the softmax whose gradient the routers get, "chosen" or "all"; None for none.
        instruction: (n, e), contiguous, for routers that do not read x.
        dropout: of the input of A. Routers see x without it.

    Returns:
        `Mixed`: y (T, k), the mixture's output alone if `weight` is None, and the routing decisions.

    Raises:
        RuntimeError: the backend is "cuda", whose kernels cannot take this mixture; the message says why.
        ValueError: coefficients are given twice, or a slot names an expert that does not exist.
    """
    banks, routers = [_dense(bank) for bank in banks], [_dense_router(router) for router in routers]
    if slots is not None:
        slots = Slots(*(None if each is None else each.contiguous() for each in slots))
    if bias is not None:
        bias = bias.contiguous()
    if backend == "cuda":
        given_ids = None if slots is None else slots.ids
        K = num_slots(given_ids, [bank.B for bank in banks], top_k)
        cuda_passes.refuse_unsupported(mix, len(banks), K, banks[0].B.shape[2], token_weights is not None)
        if cuda_passes.decodes(x, tokens.num_seqs, tokens.cu_seqlens, dropout.threshold, banks, K, routers, mix):
            (mixed,) = decode_linears(
                x,
                [banks],
                [(weight, bias)],
                tokens=tokens,
                scaling=scaling,
                backend=backend,
                mix=mix,
                slots=None if slots is None else [slots],
                routers=[routers],
                top_k=top_k,
                gate=gate,
                instruction=instruction,
            )
            return mixed
    fixed = not dropout.threshold and token_weights is None and token_router is None
    if fixed and cpu_passes.decodes(backend, x, banks, tokens, slots):
        return cpu_passes.decode(x, banks, slots, scaling, mix, weight, bias)
    ids = slot_weights = None
    if slots is not None:
        ids, slot_weights = slots
        if token_weights is not None and slot_weights is not None:
            raise ValueError("token_weights must come without weights of the slots: a coefficient is one or the other")
        if ids is not None and slot_weights is not None and mix == "weighted":
            slot_weights = slot_weights.masked_fill(ids < 0, 0)  # an empty slot
    A, B = [bank.A for bank in banks], [bank.B for bank in banks]
    importance = [bank.importance for bank in banks] if mix == "smolora" else []
    trained = tuple(bank.trained for bank in banks if bank.trained is not None)
    trained_A = tuple(bank.trained_A for bank in banks if bank.trained_A is not None)
    trains = [*A, *(() if token_router is None else (token_router,))]
    rows = [router.rows for router in routers if router.rows is not None]
    options = _Options(
        banks=len(banks),
        num_seqs=tokens.num_seqs,
        streams=[bank.stream for bank in banks],
        threshold=dropout.threshold,
        router_reads_x=[router.reads_x for router in routers],
        top_k=top_k,
        gate=gate,
        gate_grad=gate_grad if routers else None,
        scaling=scaling,
        mix=mix,
        backend=backend,
        keep_x=torch.is_grad_enabled() and any(p.requires_grad for p in trains),
    )
    y, routed_ids, routed_weights, logits, token_logits, fused = _Mixture.apply(
        options,
        tokens.route_mask,
        tokens.cu_seqlens,
        ids,
        rows[0] if rows else None,
        dropout.seed,
        weight,
        bias,
        trained,
        trained_A,
        x,
        slot_weights,
        None if token_weights is None else token_weights.contiguous(),
        instruction,
        None if token_router is None else token_router.contiguous(),
        *A,
        *B,
        *importance,
        *(router.weight for router in routers),
    )
    if routers:
        ids, slot_weights = routed_ids, routed_weights
    scores = fused if mix == "smolora" else token_weights if token_router is None else token_logits
    return Mixed(y, ids, slot_weights, logits if routers else None, scores)


def decode_linears(
    x: Tensor,
    banks: Sequence[Sequence[Bank]],
    bases: Sequence[tuple[Tensor | None, Tensor | None]],
    *,
    tokens: Tokens,
    scaling: float,
    backend: str,
    mix: str = "weighted",
    slots: Sequence[Slots] | None = None,
    routers: Sequence[Sequence[Router]] = (),
    top_k: int = 0,
    gate: str = "chosen",
    instruction: Tensor | None = None,
) -> list[Mixed]:
    """Apply mixtures to one token a sequence, in one launch for all projections of x; see `cuda_passes.decodes`.

    Args:
        banks: of each projection; every projection has the same number of banks, the same rank, and the same number of
            experts per bank.
        bases: (weight, bias) of each projection's frozen linear layer, or (None, None) for the mixture's output alone.
        slots, routers: per projection; give either for all projections or for none. Which router reads x is the
            same in all of them.
        tokens, scaling, backend, mix, top_k, gate, instruction: as in `mixture_linear`, the same for all projections.

    Returns:
        One `Mixed` per projection, as from `mixture_linear`, except that weights of empty slots are not zeroed.
    """
    ids = [] if slots is None else [each.ids for each in slots if each.ids is not None]
    slot_weights = [] if slots is None else [each.weights for each in slots if each.weights is not None]
    flat = [_dense(bank) for each in banks for bank in each]
    flat_routers = [_dense_router(router) for each in routers for router in each]
    results = decode(
        x,
        tokens.num_seqs,
        tokens.route_mask,
        instruction,
        ids,
        slot_weights,
        [bank.A for bank in flat],
        [bank.B for bank in flat],
        [bank.importance for bank in flat] if mix == "smolora" else [],
        [router.weight for router in flat_routers],
        [router.reads_x for router in flat_routers[: len(banks[0])]],
        [weight for weight, _ in bases],
        [None if bias is None else bias.contiguous() for _, bias in bases],
        top_k,
        gate,
        scaling,
        mix,
        backend,
    )
    decoded = []
    for i, (y, routed_ids, routed_weights, logits, scores) in enumerate(zip(*results, strict=True)):
        chosen = Slots(None) if slots is None else slots[i]
        if flat_routers:
            chosen = Slots(routed_ids, routed_weights)
        decoded.append(Mixed(y, *chosen, logits if flat_routers else None, scores if mix == "smolora" else None))
    return decoded
