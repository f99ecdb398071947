"""SMoLoRA (ICCV 2025): a visual-understanding and an instruction-following expert, fused token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..config import SMoLoRAConfig
from ..engine.torch_passes import choose
from ..routing import Routing, TopK
from ..spec import Bank, Mixed, Router, Slots, accurate_dtype
from .base import Decision, DropIn, Mixture, MixtureExperts, Prepared
from .checks import check_ids, check_tensor
from .released import SMOLORA_NAMES, load_released
from .routers import ExpertRouters
from .slices import SlicedParameter

# The branches that a fusion uses, which are also their dropout streams: VU is 0, IF is 1.
BRANCHES = {"adaptive": (0, 1), "mean": (0, 1), "vu": (0,), "if": (1,)}
# The fusion logit (VU less IF) where the fusion is not adaptive.
FIXED_LOGIT = {"mean": 0.0, "vu": float("inf"), "if": -float("inf")}
NOT_CHOSEN = -1e30  # logit of an expert that was not chosen: finite, since it is multiplied by 0


class SMoLoRAExperts(MixtureExperts):
    """One SMoLoRA adapter on one linear layer (Eq. 4 to 9).

    Parameters (d inputs, k outputs, M VU and N IF experts, e the size of the embedding):
        vu_A (M, r, d), vu_B (M, k, r), if_A (N, r, d), if_B (N, k, r): the experts; A ~ N(0, 0.01^2), B = 0.
        vu_router (M, d), if_router (N, e): fixed random projections unless they can learn (`top_k` above 1 or
            `router_grad="straight_through"`). A branch whose router is computed has none.
        vu_importance (k,), if_importance (k,): the fusion's scores; with `importance="expert"` (M, k) and (N, k).

    With computed routers, experts that are not in the batch keep their values under any optimiser.

    Buffers, with computed routers alone:
        vu_frozen (M,), if_frozen (N,): bool, experts that get no gradient.

    Attributes:
        keep_alpha: whether `last_routing()` includes alpha and beta.
        router_row: which of the VU routers is this layer's, where each layer has one.
    """

    config: SMoLoRAConfig
    config_class = SMoLoRAConfig
    vu_A: Tensor
    vu_B: Tensor
    if_A: Tensor
    if_B: Tensor
    vu_router: Tensor
    if_router: Tensor
    vu_importance: Tensor
    if_importance: Tensor

    vu_frozen: Tensor
    if_frozen: Tensor

    def __init__(self, in_features: int, out_features: int, config: SMoLoRAConfig, **kwargs: Any) -> None:
        if config.computes_routes:
            names = ("A", "B", "importance") if config.importance == "expert" else ("A", "B")
            self.sliced = tuple(f"{branch}_{name}" for branch in ("vu", "if") for name in names)
        super().__init__(in_features, out_features, config, **kwargs)
        self.keep_alpha = False
        self.router_row = 0
        if config.computes_routes:
            for branch in ("vu", "if"):
                frozen = torch.zeros(config.num_experts(branch), dtype=torch.bool, device=self.vu_A.device)
                self.register_buffer(f"{branch}_frozen", frozen)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        c, d, k = self.config, self.in_features, self.out_features
        M, N = c.num_vu_experts, c.num_if_experts
        own = c.importance == "expert"
        shapes: dict[str, tuple[int, ...]] = {
            "vu_A": (M, c.r, d),
            "vu_B": (M, k, c.r),
            "if_A": (N, c.r, d),
            "if_B": (N, k, c.r),
            "vu_router": (M, d),
            "if_router": (N, c.instruction_dim),
            "vu_importance": (M, k) if own else (k,),
            "if_importance": (N, k) if own else (k,),
        }
        return {name: s for name, s in shapes.items() if name.removesuffix("_router") not in c.computed_branches}

    def reset_parameter(self, name: str, parameter: Tensor) -> None:
        """Initialise a parameter as `MixtureExperts` does; A of a branch with a computed router, as PEFT's LoRA does.

        Each task starts with an expert there that has learned nothing, and from a small A it learns less.
        """
        branch, _, letter = name.partition("_")
        if letter == "A" and branch in self.config.computed_branches:
            bound = self.in_features**-0.5
            torch.nn.init.uniform_(parameter, -bound, bound)
        else:
            super().reset_parameter(name, parameter)

    def trains(self, name: str) -> bool:
        branch, _, kind = name.partition("_")
        if ("vu", "if").index(branch) not in BRANCHES[self.config.fusion]:
            return False
        if kind == "router":
            return self.config.routers_learn
        return kind != "importance" or self.config.fusion == "adaptive"

    def prepare(
        self,
        x: Tensor,
        instruction: Tensor | None = None,
        *,
        route_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        routes: TopK | Tensor | tuple[Tensor | None, Tensor | None] | None = None,
        gates: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    ) -> Prepared:
        """Check a call and translate it for the engine.

        Args:
            x: (B, S, d), or packed (T, d) or (1, T, d) with `cu_seqlens`; computed in the autocast dtype, else in its
                own.
            instruction: embeddings (n, e), or (e,) for all of the n instances. Needed unless the routes are given or
                the fusion is "vu".
            route_mask: bool, x's shape without d: the tokens that the VU router averages (default: all). An empty mask
                of an instance means a zero mean, where values are not checked.
            cu_seqlens: int32 (n + 1,), boundaries of the packed instances.
            routes: chosen experts (VU, IF), (n,) or (n, top_k) each, instead of routing; None for an unused branch. Or
                the result of `last_chosen()`, which includes the gates. Or what computed routers found, as
                `ExpertRouters.choose` returns it, with `gates`; where one branch has a random router, that is used.
            gates: weights of the chosen experts (VU, IF), (n, top_k) each, with `routes`; by default 1 / top_k.

        Raises:
            TypeError, ValueError: see `MixtureExperts.prepare`.
        """
        c = self.config
        batch = self.batch(x, cu_seqlens, route_mask)
        how: dict[str, Any] = {"mix": "weighted"}
        if c.fusion == "adaptive":
            how["mix"] = "smolora"
        elif c.fusion == "mean":
            how["scaling"] = c.scaling / 2
        n, accurate = batch.tokens.num_seqs, accurate_dtype(batch.x.dtype)
        if c.computes_routes and isinstance(routes, Tensor) and isinstance(gates, Tensor):
            row = self.router_row if routes.shape[1] > 1 else 0
            how |= self._found(routes[:, row], gates[:, row].to(accurate), instruction, n)
        elif (chosen := self._as_topk(routes, gates, n, accurate)) is not None:  # type: ignore[arg-type]
            how["slots"] = Slots(*chosen)
        elif c.computes_routes:
            raise ValueError(
                "routes must be given to a layer whose routers are computed, experts (VU, IF) of each instance; a "
                "whole model finds them, see smolora.fit_routers"
            )
        else:
            how |= {"routers": self._in_use(Router(self.vu_router, True), Router(self.if_router, False))}
            how |= {"instruction": self._instruction(instruction, n), "top_k": c.top_k}
            if c.routers_learn:
                how["gate_grad"] = "all" if c.router_grad == "straight_through" else "chosen"
        return Prepared(batch, self._in_use(self._bank("vu", 0), self._bank("if", 1)), how)

    def _bank(self, branch: str, stream: int) -> Bank:
        """Return the experts of a branch."""
        A, B, importance = (getattr(self, f"{branch}_{name}") for name in ("A", "B", "importance"))
        trained = ~self.get_buffer(f"{branch}_frozen") if self.config.computes_routes else None
        return Bank(A, B, stream, importance, trained, trained)

    def _found(self, routes: Tensor, gates: Tensor, instruction: Tensor | None, num_seqs: int) -> dict[str, Any]:
        """Return the engine's arguments for what computed routers found, routes and gates (n, 2, K)."""
        c, K = self.config, routes.shape[2]
        if tuple(routes.shape) != (num_seqs, 2, K):
            raise ValueError(f"routes must be those of {num_seqs} instances, got shape {tuple(routes.shape)}")
        used = BRANCHES[c.fusion]
        if c.if_router_kind == "random" and 1 in used:
            seen = self._instruction(instruction, num_seqs)
            assert seen is not None  # the branch is in use
            ids, weights = choose(seen.to(gates.dtype) @ self.if_router.to(gates.dtype).mT, min(K, c.num_if_experts))
            empty = (0, K - ids.shape[1])
            routes = torch.stack([routes[:, 0], pad(ids.to(routes.dtype), empty, value=-1)], 1)
            gates = torch.stack([gates[:, 0], pad(weights, empty)], 1)
        elif c.vu_router_kind == "random" and 0 in used:
            # The engine routes both banks or none: its IF router reads the logarithms of the gates that were found.
            logits = gates.new_full((num_seqs, c.num_if_experts), NOT_CHOSEN)
            found = gates[:, 1].clamp(min=1e-20).log().masked_fill(routes[:, 1] < 0, NOT_CHOSEN)
            logits.scatter_reduce_(1, routes[:, 1].long().clamp(min=0), found, "amax")  # an empty slot changes nothing
            same = torch.eye(c.num_if_experts, dtype=gates.dtype, device=gates.device)
            return {
                "routers": [Router(self.vu_router, True), Router(same, False)],
                "instruction": logits,
                "top_k": min(K, c.num_vu_experts, c.num_if_experts),
            }
        return {"slots": Slots(routes[:, used].contiguous(), gates[:, used].contiguous())}

    # ---- experts for new tasks

    @torch.no_grad()
    def grow(self) -> None:
        """Add the experts that the configuration has and the layer does not, as new ones start.

        Grown parameters are new objects, so optimisers are made after it.
        """
        for name, shape in self.shapes().items():
            old = self.get_parameter(name)
            if tuple(old.shape) == shape:
                continue
            new = torch.empty(shape, dtype=old.dtype, device=old.device)
            self.reset_parameter(name, new)
            new[: old.shape[0]] = old
            kind = SlicedParameter if name in self.sliced else torch.nn.Parameter
            setattr(self, name, kind(new, requires_grad=old.requires_grad))
        for branch in ("vu", "if"):
            frozen = self.get_buffer(f"{branch}_frozen")
            grown = frozen.new_zeros(self.config.num_experts(branch))
            grown[: len(frozen)] = frozen
            setattr(self, f"{branch}_frozen", grown)

    @torch.no_grad()
    def freeze_experts(self, branch: str, frozen: Tensor) -> None:
        """Set which experts of a branch, "vu" or "if", get no gradient: bool (E,)."""
        self.get_buffer(f"{branch}_frozen").copy_(frozen)

    def trained_slices(self) -> dict[str, int]:
        """Return the experts that are not frozen."""
        masks = {name: self.get_buffer(f"{name.partition('_')[0]}_frozen") for name in self.sliced}
        # a mask without values freezes nothing
        return {name: mask.shape[0] if mask.is_meta else int((~mask).sum()) for name, mask in masks.items()}

    def _in_use(self, *pair: Any) -> list[Any]:
        """Return the items of a pair (VU, IF) whose branches the fusion uses."""
        return [pair[branch] for branch in BRANCHES[self.config.fusion]]

    def _instruction(self, instruction: Tensor | None, num_seqs: int) -> Tensor | None:
        """Return the embeddings (n, e) that the IF branch routes by; None if it routes nothing.

        Raises:
            TypeError, ValueError: they are missing, or do not fit.
        """
        if self.config.fusion == "vu":
            return None
        e = self.config.instruction_dim
        if instruction is None:
            raise ValueError(
                f"instruction must be given, an embedding of shape ({e},) or ({num_seqs}, {e}): the IF branch routes "
                "by it; got None"
            )
        check_tensor("instruction", instruction, self.vu_A.device)
        if not instruction.is_floating_point():
            raise TypeError(f"instruction must be floating point, got {instruction.dtype}")
        if tuple(instruction.shape) not in ((e,), (num_seqs, e)):
            raise ValueError(
                f"instruction must have shape ({e},) or ({num_seqs}, {e}), {num_seqs} being the batch size of x, "
                f"got {tuple(instruction.shape)}"
            )
        return (instruction if instruction.dim() == 2 else instruction.expand(num_seqs, -1)).contiguous()

    def _as_topk(
        self,
        routes: TopK | tuple[Tensor | None, Tensor | None] | None,
        gates: tuple[Tensor | None, Tensor | None] | None,
        num_seqs: int,
        dtype: torch.dtype,
    ) -> TopK | None:
        """Check given routes and gates; return them for the engine, gates in `dtype`.

        Raises:
            TypeError, ValueError: they do not fit.
        """
        if routes is None:
            if gates is not None:
                raise ValueError("gates must come with routes, got gates alone")
            return None
        if isinstance(routes, TopK):
            if routes.routes.shape[0] != num_seqs:
                raise ValueError(f"routes must be those of {num_seqs} instances, got {routes.routes.shape[0]}")
            return routes
        top_k = self.config.top_k
        shapes = ((num_seqs,), (num_seqs, top_k)) if top_k == 1 else ((num_seqs, top_k),)
        picked: dict[str, list[Tensor]] = {"routes": [], "gates": []}
        for name, pair in (("routes", routes), ("gates", gates)):
            if pair is None:
                continue
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(f"{name} must be a pair (VU, IF), got {type(pair).__name__}")
            for branch in BRANCHES[self.config.fusion]:
                value, label = pair[branch], f"{name}[{branch}]"
                if name == "routes":
                    experts = (self.vu_A, self.if_A)[branch].shape[0]
                    value = check_ids(
                        label,
                        value,
                        shapes,
                        self.vu_A.device,
                        below=experts,
                        what=("a VU expert", "an IF expert")[branch],
                    )
                else:
                    value = _check_gates(label, value, shapes, self.vu_A.device)
                picked[name].append(value.view(num_seqs, top_k))
        chosen = torch.stack(picked["routes"], 1).int()
        if gates is None:
            return TopK(chosen, torch.full(chosen.shape, 1 / top_k, dtype=dtype, device=chosen.device))
        return TopK(chosen, torch.stack(picked["gates"], 1).to(dtype))

    def last_routing(self) -> Routing:
        """Return what the last forward decided, with alpha and beta if `keep_alpha` was set then.

        Raises:
            RuntimeError: there was no forward yet.
        """
        return self.routing(self._decided("last_routing()"))

    def routing(self, decided: Mixed) -> Routing:
        """Split a decision into branches; it has alpha and beta if it has scores."""
        pair: dict[str, list[Tensor | None]] = {"routes": [None, None], "logits": [None, None], "gates": [None, None]}
        experts = self._in_use(self.config.num_vu_experts, self.config.num_if_experts)
        ids, weights = decided.ids, decided.slot_weights
        assert ids is not None and weights is not None  # every branch has slots
        for bank, branch in enumerate(BRANCHES[self.config.fusion]):
            pair["routes"][branch] = ids[:, bank, 0] if self.config.top_k == 1 else ids[:, bank]
            pair["gates"][branch] = weights[:, bank]
            if decided.logits is not None:
                pair["logits"][branch] = decided.logits.split(experts, 1)[bank]
        alpha = beta = None
        if decided.scores is not None:
            alpha, beta = torch.sigmoid(decided.scores), torch.sigmoid(-decided.scores)
        routes, logits, gates = ((vu, if_) for vu, if_ in pair.values())
        return Routing(routes, logits, gates, alpha, beta)

    def finish(self, x: Tensor, mixed: Mixed, decision: Decision | None = None) -> Tensor:
        keep = self.keep_alpha or decision is not None
        scores = mixed.scores if keep else None
        if keep and self.config.fusion != "adaptive":
            fixed = FIXED_LOGIT[self.config.fusion]
            assert mixed.slot_weights is not None  # every branch has slots
            scores = torch.full(mixed.y.shape[:1], fixed, dtype=mixed.slot_weights.dtype, device=mixed.y.device)
        return super().finish(x, mixed._replace(scores=scores), decision)

    def last_chosen(self) -> TopK:
        """Return the experts and gates of the last forward, for the argument `routes`.

        Raises:
            RuntimeError: there was no forward yet.
        """
        last = self._decided("last_chosen()")
        assert last.ids is not None and last.slot_weights is not None  # every branch has slots
        return TopK(last.ids, last.slot_weights)

    def facts(self) -> dict[str, Any]:
        c = self.config
        return {
            "experts": f"{c.num_vu_experts} VU + {c.num_if_experts} IF",
            "top_k": c.top_k,
            "fusion": repr(c.fusion),
            "router_grad": repr(c.router_grad),
            **({"routers": f"{c.vu_router_kind}, {c.if_router_kind}"} if c.computes_routes else {}),
            **({"importance": repr(c.importance)} if c.importance != "shared" else {}),
        }


def _check_gates(name: str, gates: Tensor | None, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Check the given gates of a branch, and return them.

    Raises:
        ValueError: they do not fit.
    """
    if not isinstance(gates, Tensor) or tuple(gates.shape) not in shapes:
        got = tuple(gates.shape) if isinstance(gates, Tensor) else gates
        raise ValueError(f"{name} must be a tensor of shape {' or '.join(map(str, shapes))}, got {got}")
    if gates.device != device:
        raise ValueError(f"{name} must be on {device}, got {gates.device}")
    if not gates.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {gates.dtype}")
    return gates


class FusedSMoLoRA(DropIn, SMoLoRAExperts):
    """A linear layer with a SMoLoRA adapter (Eq. 4 to 9), a drop-in for the `nn.Linear` it wraps.

    There are M visual-understanding (VU) and N instruction-following (IF) experts of rank r. Each instance uses `top_k`
    of either branch, by default one. The VU router sees the mean of its tokens, the IF router its instruction
    embedding. A softmax over two learned scores fuses the branches token by token.
    """

    def load_official_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a layer of the released code: its live state dict, or the keys under one layer of a saved adapter.

        The released code numbers VU experts first, then IF experts. The linear layer's own keys (`weight`, `bias`), if
        present, are loaded into the base.

        Args:
            state_dict: `lora_A.default.loraA.0.weight` and the like; the adapter's name may be missing, and the second
                name of an expert (`...loraA.0.mlp.weight`) is the same tensor again.

        Raises:
            KeyError, ValueError: see `released.load_released`.
        """
        targets: dict[str, Tensor] = {released: self.get_parameter(name) for name, released in SMOLORA_NAMES.items()}
        for letter in "AB":
            experts = [*self.get_parameter(f"vu_{letter}").unbind(0), *self.get_parameter(f"if_{letter}").unbind(0)]
            targets |= {f"lora_{letter}.{i}": expert for i, expert in enumerate(experts)}
        load_released(targets, dict(self.base_layer.named_parameters()), state_dict)


SMOLORA = Mixture(
    "smolora",
    SMoLoRAConfig,
    SMoLoRAExperts,
    FusedSMoLoRA,
    "SMoLoRA cannot be merged into the base: which experts a sample uses, and their shares alpha and beta, depend on "
    "the sample and the token, so no single weight equals base and adapter; keep the adapter, or unload() it",
    selector=ExpertRouters.of_adapter,
)
