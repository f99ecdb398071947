"""Cases of the engine alone: any mix, banks and slots, against k-sized sums in a loop that torch differentiates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from smolora.engine.function import mixture_linear
from smolora.reference import dropout_factor
from smolora.spec import Bank, Dropout, Mixed, Router, Slots, Tokens
from support.oracle import collect, complaints

SEED = 12345


@dataclass(frozen=True)
class MixCase:
    """One call of the engine. `lengths` packs sequences of these lengths; else there are n of S tokens."""

    n: int = 3
    S: int = 7
    d: int = 40
    k: int = 56
    r: int = 8
    E: tuple[int, ...] = (5,)  # experts of each bank
    K: int = 2  # slots of each bank; 0: every expert has one
    mix: str = "weighted"
    shared: bool = False  # one A for all B
    own: bool = False  # an importance vector for each expert, of mix "smolora"
    weights: str = "seq"  # of mix "weighted": "one", "seq" (a slot and sequence) or "token" (T, K)
    routed: bool = False  # routers choose; else ids are given, or with K = 0 all experts have a slot
    reads_x: bool = True  # the first bank's router; a second bank's reads the instruction
    tasks: int = 0  # a router a task, of so many
    gate: str = "chosen"
    gate_grad: str | None = "chosen"
    empty: bool = False  # some slots are empty
    frozen: bool = False  # some experts get no gradient: neither their B nor, unless it is shared, their A
    threshold: int = 0
    mask: bool = False
    bias: bool = True
    base: bool = True
    lengths: tuple[int, ...] | None = None
    seed: int = 0

    def but(self, **changes) -> MixCase:
        return replace(self, **changes)

    def __str__(self) -> str:
        default = MixCase()
        changed = {f: v for f, v in vars(self).items() if v != getattr(default, f)}
        return "-".join(f"{name}={value}" for name, value in changed.items()) or "plain"


@dataclass
class Call:
    """The inputs of a call, and which of its tensors need a gradient."""

    x: Tensor
    cotangent: Tensor
    named: dict[str, Tensor]  # what may need a gradient, by name
    given: dict[str, Tensor]  # the rest
    case: MixCase

    def to(self, device: str, dtype: torch.dtype) -> Call:
        """Move; x, parameters and the base take the dtype, weights and instructions stay accurate."""
        accurate = torch.float64 if dtype == torch.float64 else torch.float32

        def move(name: str, t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t.to(device)
            return t.to(device, accurate if name in ("slot_weights", "token_weights", "instruction") else dtype)

        named = {name: move(name, t) for name, t in self.named.items()}
        given = {name: move(name, t) for name, t in self.given.items()}
        return Call(self.x.to(device, dtype), self.cotangent.to(device, dtype), named, given, self.case)


def build_call(case: MixCase) -> Call:
    """Draw a call in float64, its values rounded to bfloat16, so that every precision has the same ones."""
    random = torch.Generator().manual_seed(case.seed)
    c = case

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=random, dtype=torch.float64) * scale).bfloat16().double()

    lengths = c.lengths if c.lengths is not None else (c.S,) * c.n
    n, T = len(lengths), sum(lengths)
    named: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    for bank, E in enumerate(c.E):
        named[f"A{bank}"] = draw(1 if c.shared else E, c.r, c.d, scale=c.d**-0.5)
        named[f"B{bank}"] = draw(E, c.k, c.r, scale=c.r**-0.5)
        if c.mix == "smolora":
            named[f"I{bank}"] = draw(*((E, c.k) if c.own else (c.k,)), scale=c.k**-0.5)
        if c.frozen:
            given[f"trained{bank}"] = torch.arange(E) % 2 == 1
    owner = torch.repeat_interleave(torch.arange(n), torch.tensor(lengths, dtype=torch.int64))
    x = draw(T, c.d) + 2 * draw(max(n, 1), c.d)[owner]
    K = c.K or c.E[0]
    if c.routed:
        named["instruction"] = draw(n, 24)
        for bank, E in enumerate(c.E):
            size = c.d if c.reads_x and bank == 0 else 24
            named[f"router{bank}"] = draw(*((c.tasks,) if c.tasks else ()), E, size)
        if c.tasks:
            given["rows"] = torch.randint(c.tasks, (n,), generator=random)
    elif c.K:
        ids = torch.stack([torch.randint(E, (n, K), generator=random) for E in c.E], 1).int()
        if c.empty:
            ids[torch.rand(ids.shape, generator=random) < 0.4] = -1
        given["ids"] = ids
    if c.mix == "softmax":
        named["token_router"] = draw(c.E[0], c.d, scale=c.d**-0.5)
    elif not c.routed and (c.mix == "smolora" or c.weights == "seq"):
        named["slot_weights"] = torch.rand(n, len(c.E), K, generator=random, dtype=torch.float64).bfloat16().double()
    elif not c.routed and c.weights == "token":
        named["token_weights"] = draw(T, K)
    if c.mask:
        mask = torch.rand(T, generator=random) < 0.6
        for i, length in enumerate(lengths):
            if length:
                mask[sum(lengths[:i]) + (length - 1) // 2] = True
        given["route_mask"] = mask
    if c.lengths is not None:
        given["cu_seqlens"] = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    if c.base:
        given["weight"] = draw(c.k, c.d, scale=c.d**-0.5)
        if c.bias:
            given["bias"] = draw(c.k)
    return Call(x, draw(T, c.k), named, given, case)


def strided(call: Call) -> Call:
    """The same call with no parameter, weight or bias contiguous."""

    def spread(t: Tensor) -> Tensor:
        moved = torch.stack([t, torch.full_like(t, 7)], -1)[..., 0]
        assert t.numel() < 2 or not moved.is_contiguous()
        return moved

    named = {name: t if name == "instruction" else spread(t) for name, t in call.named.items()}
    loose = ("ids", "bias")
    given = {name: spread(t) if name in loose else t for name, t in call.given.items()}
    return Call(call.x, call.cotangent, named, given, call.case)


def run_call(call: Call, backend: str, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Forward and backward of the engine; `without` names what needs no gradient."""
    x = call.x.detach().requires_grad_("x" not in without)
    named = {name: t.detach().requires_grad_(name not in without) for name, t in call.named.items()}
    return collect(forward_call(call, backend, x, named).y, x, named, call.cotangent)


def forward_call(call: Call, backend: str, x: Tensor, named: dict[str, Tensor]) -> Mixed:
    """Forward of the engine."""
    c, given = call.case, call.given
    seed = torch.tensor([SEED], device=x.device) if c.threshold else None
    return mixture_linear(
        x,
        banks_of(call, named),
        tokens=Tokens(_num_seqs(call), given.get("cu_seqlens"), given.get("route_mask")),
        scaling=1.5,
        backend=backend,
        mix=c.mix,
        slots=slots_of(call, named),
        routers=routers_of(call, named),
        top_k=c.K if c.routed else 0,
        gate=c.gate,
        gate_grad=c.gate_grad,
        token_router=named.get("token_router"),
        token_weights=named.get("token_weights"),
        instruction=named.get("instruction"),
        dropout=Dropout(c.threshold, seed),
        weight=given.get("weight"),
        bias=given.get("bias"),
    )


def banks_of(call: Call, named: dict[str, Tensor]) -> list[Bank]:
    given = call.given
    return [
        Bank(
            named[f"A{i}"],
            named[f"B{i}"],
            i,
            named.get(f"I{i}"),
            given.get(f"trained{i}"),
            None if call.case.shared else given.get(f"trained{i}"),
        )
        for i in range(len(call.case.E))
    ]


def routers_of(call: Call, named: dict[str, Tensor]) -> list[Router]:
    c = call.case
    return [
        Router(named[f"router{i}"], c.reads_x and i == 0, call.given.get("rows"))
        for i in range(len(c.E) if c.routed else 0)
    ]


def slots_of(call: Call, named: dict[str, Tensor]) -> Slots | None:
    if call.case.routed or not ("ids" in call.given or "slot_weights" in named):
        return None
    return Slots(call.given.get("ids"), named.get("slot_weights"))


def _num_seqs(call: Call) -> int:
    return call.case.n if call.case.lengths is None else len(call.case.lengths)


def naive_call(call: Call) -> dict[str, Tensor]:
    """The same by the equation as written: every slot's k-sized output, sequence by sequence."""
    c, given = call.case, call.given
    x = call.x.detach().requires_grad_()
    named = {name: t.detach().requires_grad_() for name, t in call.named.items()}
    n = _num_seqs(call)
    bounds = given["cu_seqlens"].tolist() if "cu_seqlens" in given else [i * c.S for i in range(n + 1)]
    mask = given.get("route_mask", torch.ones(x.shape[0], dtype=torch.bool))
    outputs = []
    for i in range(n):
        start, end = bounds[i], bounds[i + 1]
        x_i = x[start:end]
        outs, scores = [], []
        for bank, E in enumerate(c.E):
            A, B, I = named[f"A{bank}"], named[f"B{bank}"], named.get(f"I{bank}")
            if "trained0" in given:
                learns = given[f"trained{bank}"][:, None, None]
                B = torch.where(learns, B, B.detach())
                A = A if c.shared else torch.where(learns, A, A.detach())
                I = torch.where(learns[:, 0], I, I.detach()) if c.own else I
            if c.routed:
                router = named[f"router{bank}"]
                router = router[given["rows"][i]] if c.tasks else router
                seen = named["instruction"][i].to(router.dtype)
                if c.reads_x and bank == 0:
                    seen = x_i[mask[start:end]].sum(0) / max(int(mask[start:end].sum()), 1)
                z = router @ seen
                ids = torch.sort(z, descending=True, stable=True).indices[: c.K]
                q = torch.softmax(z[ids], 0) if c.gate == "chosen" else torch.softmax(z, 0)[ids]
                if c.gate_grad != c.gate:
                    soft = torch.softmax(z, 0)[ids] if c.gate_grad == "all" else torch.zeros(c.K, dtype=z.dtype)
                    q = q.detach() + soft - soft.detach()
            else:
                ids = given["ids"][i, bank] if "ids" in given else torch.arange(E)
                q = named["slot_weights"][i, bank] if "slot_weights" in named else torch.ones(len(ids), dtype=x.dtype)
            kept = x_i
            if c.threshold:
                factor = dropout_factor(SEED, *x.shape, bank, c.threshold / 256)
                kept = x_i * factor[start:end].to(x.dtype)
            out, score = x.new_zeros(end - start, c.k), x.new_zeros(end - start)
            for j, e in enumerate(ids.tolist()):
                if e < 0:
                    continue
                expert = F.linear(F.linear(kept, A[0 if c.shared else e]), B[e])
                weight = q[j]
                if c.mix == "softmax":
                    weight = torch.softmax(x_i @ named["token_router"].T, -1)[:, j, None]
                elif "token_weights" in named:
                    weight = named["token_weights"][start:end, j, None]
                out = out + 1.5 * weight * expert
                score = score if I is None else score + 1.5 * weight * expert @ (I[e] if c.own else I)
            outs.append(out)
            scores.append(score)
        if c.mix == "smolora":
            share = torch.softmax(torch.stack(scores, -1), -1)
            outs = [o * share[:, bank, None] for bank, o in enumerate(outs)]
        outputs.append(sum(outs))
    y = torch.cat(outputs) if outputs else x.new_zeros(0, c.k)
    if c.base:
        y = y + F.linear(x, given["weight"], given.get("bias"))
    return collect(y.to(x.dtype), x, named, call.cotangent)


def check_call(case: MixCase, dtype: torch.dtype, backend: str, device: str = "cpu", slack: float = 1) -> None:
    """Hold a backend against the equation in float64, as far as the equation in `dtype` agrees with it."""
    call = build_call(case)
    got = run_call(call.to(device, dtype), backend)
    found = complaints(got, naive_call(call), naive_call(call.to("cpu", dtype)), dtype, slack)
    assert not found, f"{case} {dtype} {backend}: {'; '.join(found)}"


plain = MixCase()
smolora = plain.but(mix="smolora", E=(4, 4), K=1, routed=True, gate_grad=None)

MIX_OPTIONS = [
    plain,  # given experts with a weight a sequence, which gets a gradient
    plain.but(weights="one", threshold=26),
    plain.but(weights="token", mask=True),  # any (T, K) tensor
    plain.but(weights="token", K=0, threshold=64),  # independent gates over all experts
    plain.but(weights="one", K=0),  # every expert, unweighted
    plain.but(empty=True),  # empty slots, the number of experts of a sequence differs
    plain.but(empty=True, shared=True, threshold=26, frozen=True),
    plain.but(frozen=True, K=3),  # experts that stay
    plain.but(shared=True, K=3, threshold=64),  # one h for three B
    plain.but(shared=True, weights="token", K=0),
    plain.but(shared=True, routed=True, tasks=3, gate="all", gate_grad="all", mask=True),  # a router a task
    plain.but(shared=True, routed=True, tasks=3, threshold=26),  # the same, renormalised
    plain.but(routed=True, reads_x=False, K=1, gate="all", gate_grad="all"),
    plain.but(E=(4, 3), K=2, threshold=26),  # two banks, weighted
    plain.but(E=(4, 3), routed=True, mask=True, gate_grad="all"),
    plain.but(mix="softmax", K=0),
    plain.but(mix="softmax", K=0, threshold=64, bias=False),  # the router sees x without dropout
    plain.but(mix="softmax", K=0, shared=True, E=(3,)),
    plain.but(mix="softmax", K=0, E=(1,)),  # one expert: its weight is 1, its router gets none
    plain.but(mix="softmax", K=0, base=False, E=(8,)),
    smolora,
    smolora.but(K=2, E=(3, 5), gate_grad="chosen", threshold=64, mask=True),
    smolora.but(gate_grad="all"),
    smolora.but(routed=False, K=2, E=(4, 4)),
    smolora.but(shared=True, K=2, gate_grad="chosen", threshold=26),  # shared A under the fusion too
    smolora.but(own=True, routed=False, E=(4, 3)),  # an importance vector for each expert
    smolora.but(own=True, frozen=True, K=2, E=(3, 5), gate_grad="chosen", threshold=64),  # frozen ones keep theirs
    plain.but(frozen=True, empty=True, threshold=64),  # frozen, empty and training slots, with dropout
]

MIX_SHAPES = [
    plain.but(lengths=(5, 0, 17, 1)),
    plain.but(lengths=(40, 3, 90, 7), shared=True, routed=True, gate="all", gate_grad="all", mask=True, threshold=26),
    plain.but(lengths=(64, 65, 63), mix="softmax", K=0),
    plain.but(lengths=(40, 3), weights="token", K=0, d=41, k=57, r=12),
    plain.but(S=0),
    plain.but(n=0),
    plain.but(S=1),
    plain.but(S=0, mix="softmax", K=0),
    plain.but(S=65, n=2, d=130, k=150, mix="softmax", K=0, E=(8,), r=16),  # 128 columns and the router's
    plain.but(S=65, n=2, d=130, k=150, shared=True, K=2, E=(8,), r=16),
    plain.but(r=1, mix="softmax", K=0),
    plain.but(r=24, K=3, threshold=26),
    plain.but(r=64, shared=True, K=3, d=70, k=50),
    plain.but(r=128, K=2, d=70, k=50, S=20, threshold=26),
    plain.but(r=128, mix="softmax", K=0, E=(3,), d=70, k=50, S=20),
    plain.but(d=1, k=3),
    plain.but(d=130, k=1, mix="softmax", K=0),
]

STRIDED = [  # what a kernel reads by address: each kind of parameter and of weights
    plain,
    plain.but(shared=True, routed=True, tasks=3, gate="all", gate_grad="all"),
    plain.but(mix="softmax", K=0),
    plain.but(weights="token", K=0),
    smolora.but(K=2, gate_grad="chosen"),
]
