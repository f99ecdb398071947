"""`FusedSMoLoRA`: a frozen linear layer with a SMoLoRA adapter on it, and the adapter by itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import cuda
from .backends import resolve_backend
from .common import accurate_dtype, active_streams, branches
from .config import SMoLoRAConfig, dropout_threshold
from .ops import decode_linears, smolora_linear
from .routing import Chosen, Routing

OFFICIAL_KEY = re.compile(
    r"(?P<kind>lora_[AB]|lora_vu_gate|lora_ins_gate|lora_fc_[AB])(?:\.(?!lora[AB]\.)(?!weight$)[^.]+)?"
    r"(?:\.lora(?P<letter>[AB])\.(?P<expert>\d+)(?:\.mlp)?)?\.weight"
)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a layer computes in: autocast's, else x's own."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's forward: it has hooks, or a replaced forward (offloading)."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    return any(hooks) or "forward" in module.__dict__ or hasattr(module, "_hf_hook")


def is_local(parameter: Tensor) -> bool:
    """Whether all of a parameter is here: it is neither sharded nor partitioned."""
    return type(parameter) in (nn.Parameter, Tensor) and not hasattr(parameter, "ds_id")


def is_plain_linear(base: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `base` is nothing but x W^T + b with frozen weights in `dtype`, so that its products may be taken over.

    Hooks, parametrisations, sharded weights and subclasses all mean that calling it does more than this product.
    """
    if type(base) is not nn.Linear or has_hooks(base):
        return False
    parameters = [base._parameters.get("weight"), base._parameters.get("bias")]
    if parameters[0] is None:
        return False
    return all(p is None or (is_local(p) and p.dtype == dtype and not p.requires_grad) for p in parameters)


class Decision:
    """Takes what one forward decided, for callers that may run several at a time.

    Attributes:
        last: routes, gates, logits and lead.
    """

    last: tuple[Tensor | None, ...]


class SMoLoRAExperts(nn.Module):
    """The parameters of one adapter on one linear layer, and the forward that uses them (Eq. 4 to 9).

    They lie on one module whose `forward` is called, which is where FSDP and ZeRO-3 gather them.

    Parameters (d inputs, k outputs, e the size of the embedding):
        vu_A (M, r, d), vu_B (M, k, r), if_A (N, r, d), if_B (N, k, r): the experts; A ~ N(0, 0.01^2), B = 0.
        vu_router (M, d), if_router (N, e): fixed random projections unless they can learn (`top_k` above 1 or
            `router_grad="straight_through"`).
        vu_importance (k,), if_importance (k,): the fusion's scores.

    Args:
        in_features, out_features: d and k.
        config: the adapter's configuration.
        device, dtype: of the parameters.

    Attributes:
        config: `config`.
        keep_alpha: set it to True to have `last_routing()` carry alpha.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: SMoLoRAConfig,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.in_features, self.out_features = in_features, out_features
        self.keep_alpha = False
        self._threshold = dropout_threshold(config.lora_dropout)
        self._last: tuple[Tensor | None, ...] | None = None
        M, N, r, d, k = config.num_vu_experts, config.num_if_experts, config.r, in_features, out_features
        for name, shape in (
            ("vu_A", (M, r, d)), ("vu_B", (M, k, r)), ("if_A", (N, r, d)), ("if_B", (N, k, r)), ("vu_router", (M, d)),
            ("if_router", (N, config.instruction_dim)), ("vu_importance", (k,)), ("if_importance", (k,)),
        ):  # fmt: skip
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()
        SMoLoRAExperts.freeze(self)  # a subclass has more to freeze, which is not there yet

    def reset_parameters(self) -> None:
        """Initialise the adapter: A ~ N(0, 0.01^2), B = 0, routers and importances like `nn.Linear`."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_A"):
                nn.init.normal_(parameter, std=0.01)
            elif name.endswith("_B"):
                nn.init.zeros_(parameter)
            else:  # nn.Linear draws from U(-1 / sqrt(inputs), 1 / sqrt(inputs))
                bound = parameter.shape[-1] ** -0.5
                nn.init.uniform_(parameter, -bound, bound)

    def freeze(self) -> None:
        """Freeze what the configuration gives no gradient; everything else trains."""
        use_vu, use_if = branches(self.config.fusion)
        for name, parameter in self.named_parameters(recurse=False):
            learns = (use_vu if name.startswith("vu") else use_if) and parameter.is_floating_point()
            if name.endswith("router"):
                learns = learns and self.config.routers_learn
            if name.endswith("importance"):
                learns = learns and self.config.fusion == "adaptive"
            parameter.requires_grad_(learns)

    def forward(
        self,
        x: Tensor,
        instruction: Tensor | None = None,
        *,
        route_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        routes: Chosen | tuple[Tensor | None, Tensor | None] | None = None,
        gates: tuple[Tensor | None, Tensor | None] | None = None,
        base: nn.Module | None = None,
        decision: Decision | None = None,
    ) -> Tensor:
        """The adapted layer's output, or the adapter's alone without a `base`.

        Args:
            x: (B, S, d), or packed (T, d) or (1, T, d) with `cu_seqlens`; computed in the autocast dtype, else in its
                own.
            instruction: embeddings (n, e), or (e,) for all of the n instances. Needed unless the routes are given or
                the fusion is "vu".
            route_mask: bool, x's shape without d: the tokens that the VU router averages (default: all). An instance
                whose mask is empty routes by a zero mean where the values are not checked.
            cu_seqlens: int32 (n + 1,), boundaries of the packed instances.
            routes: chosen experts (VU, IF), (n,) or (n, top_k) each, instead of routing; None for a branch not in use.
                Or what `last_chosen()` gave, which has the gates in it.
            gates: weights of the chosen experts (VU, IF), (n, top_k) each, with `routes`; by default 1 / top_k.
            base: the linear layer under the adapter, whose output is in y.
            decision: takes what is decided.

        Returns:
            y, of x's shape with k in place of d.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it, its value and what was expected.
                What only values can tell (a NaN, an empty mask, a route out of range) is checked on CPU tensors, and
                on a GPU when the environment variable SMOLORA_CHECK is 1, since reading them waits for the GPU.
            RuntimeError: the backend that was asked for cannot run.
        """
        inputs = self._inputs(x, instruction, route_mask, cu_seqlens, routes, gates)
        tokens, instruction = inputs.pop("x"), inputs.pop("instruction")
        plain = base is not None and is_plain_linear(base, tokens.dtype)
        y, *last = smolora_linear(
            tokens, *self._weights(), instruction, **inputs, router_grad=self.config.router_grad,
            weight=base.weight if plain else None, bias=base.bias if plain else None,
        )  # fmt: skip
        if base is not None and not plain:
            y = y.add_(base(x).view_as(y))
        return self.finish(x, (y, *last), decision)

    def _weights(self) -> tuple[Tensor, ...]:
        """The parameters in the order of `smolora_linear`."""
        return (
            self.vu_A, self.vu_B, self.if_A, self.if_B, self.vu_router, self.if_router, self.vu_importance,
            self.if_importance,
        )  # fmt: skip

    def finish(self, x: Tensor, result: tuple[Tensor, ...], decision: Decision | None = None) -> Tensor:
        """The output for x, of what `smolora_linear` gave; keeps what was decided."""
        y, *last, lead = result
        self._last = (*last, lead if self.keep_alpha else None)
        if decision is not None:
            decision.last = (*last, lead)
        return y.view(*x.shape[:-1], self.out_features)

    def _inputs(
        self,
        x: Tensor,
        instruction: Tensor | None = None,
        route_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        routes: Chosen | tuple[Tensor | None, Tensor | None] | None = None,
        gates: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> dict[str, Any]:
        """The arguments of `smolora_linear` that a call decides, from those of `forward`, checked."""
        config = self.config
        instances = self._check(x, instruction, route_mask, cu_seqlens, routes, gates)
        dtype = compute_dtype(x)
        backend = resolve_backend(x.device.type, dtype)
        threshold = self._threshold if self.training else 0
        seed = None
        if threshold:  # on the device: nothing waits for it, and a recomputed forward draws the same
            seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
        if routes is None:
            if config.fusion == "vu":
                instruction = None
            elif instruction.dim() == 1:
                instruction = instruction.expand(instances, -1)
        else:
            if not isinstance(routes, Chosen):
                routes = self._given(routes, gates, instances, accurate_dtype(dtype))
            routes, gates = routes
            instruction = None
        return dict(
            x=x.reshape(-1, x.shape[-1]).to(dtype).contiguous(),
            instruction=None if instruction is None else instruction.contiguous(), instances=instances,
            threshold=threshold, top_k=config.top_k, scaling=config.scaling, fusion=config.fusion, backend=backend,
            route_mask=None if route_mask is None else route_mask.reshape(-1).contiguous(),
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(), routes=routes, gates=gates, seed=seed,
        )  # fmt: skip

    @property
    def has_routed(self) -> bool:
        """Whether there was a forward since the start, or since `forget_routing()`."""
        return self._last is not None

    def forget_routing(self) -> None:
        """Drop what the last forward decided."""
        self._last = None

    def last_routing(self) -> Routing:
        """What the last forward decided; `alpha` is in it if `keep_alpha` was set then.

        Raises:
            RuntimeError: there was no forward yet.
        """
        if self._last is None:
            raise RuntimeError("last_routing() needs a forward first")
        return self.routing(*self._last)

    def routing(self, routes: Tensor, gates: Tensor, logits: Tensor, lead: Tensor | None) -> Routing:
        """What a forward decided, branch by branch; alpha and beta are in it if `lead` is given."""
        pair: dict[str, list[Tensor | None]] = {"routes": [None, None], "logits": [None, None], "gates": [None, None]}
        M = self.config.num_vu_experts
        for slot, branch in enumerate(active_streams(self.config.fusion)):
            pair["routes"][branch] = routes[:, slot, 0] if self.config.top_k == 1 else routes[:, slot]
            pair["gates"][branch] = gates[:, slot]
            if logits.shape[1]:
                pair["logits"][branch] = logits[:, :M] if branch == 0 else logits[:, M:]
        return Routing(
            *(tuple(values) for values in pair.values()),
            None if lead is None else torch.sigmoid(lead),
            None if lead is None else torch.sigmoid(-lead),
        )

    def last_chosen(self) -> Chosen:
        """The experts and gates of the last forward, as `forward` takes them for `routes`.

        Raises:
            RuntimeError: there was no forward yet.
        """
        if self._last is None:
            raise RuntimeError("last_chosen() needs a forward first")
        return Chosen(*self._last[:2])

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={c.r}, scaling={c.scaling:g}, "
            f"experts={c.num_vu_experts} VU + {c.num_if_experts} IF, top_k={c.top_k}, fusion={c.fusion!r}, "
            f"router_grad={c.router_grad!r}, dropout={self._threshold / 256:g}"
        )

    def _check(
        self,
        x: Tensor,
        instruction: Tensor | None,
        route_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        routes: tuple[Tensor | None, Tensor | None] | None,
        gates: tuple[Tensor | None, Tensor | None] | None,
    ) -> int:
        """Refuse what does not fit, by shape, dtype and device; returns the number of instances."""
        c = self.config
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating point tensor, got {got}")
        tensors = {"instruction": instruction, "route_mask": route_mask, "cu_seqlens": cu_seqlens}
        for name, tensor in tensors.items():
            if tensor is not None and not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} inputs in its last dimension, got shape {tuple(x.shape)}")
        if cu_seqlens is None:
            if x.dim() != 3:
                raise ValueError(
                    f"x must be (B, S, {self.in_features}), or packed (T, {self.in_features}) with cu_seqlens, "
                    f"got shape {tuple(x.shape)}"
                )
            instances = x.shape[0]
        else:
            if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
                raise ValueError(
                    f"cu_seqlens must be int32 of shape (n + 1,), got {cu_seqlens.dtype} of {tuple(cu_seqlens.shape)}"
                )
            if x.dim() != 2 and not (x.dim() == 3 and x.shape[0] == 1):
                raise ValueError(f"x must be (T, d) or (1, T, d) when cu_seqlens packs it, got shape {tuple(x.shape)}")
            instances = cu_seqlens.shape[0] - 1
        for name, tensor in (*tensors.items(), ("the layer's parameters", self.vu_A)):
            if tensor is not None and tensor.device != x.device:
                raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
        if route_mask is not None and (route_mask.dtype != torch.bool or route_mask.shape != x.shape[:-1]):
            raise ValueError(
                f"route_mask must be bool of shape {tuple(x.shape[:-1])}, "
                f"got {route_mask.dtype} of {tuple(route_mask.shape)}"
            )
        if isinstance(routes, Chosen) and routes.routes.shape[0] != instances:
            raise ValueError(f"routes must be those of {instances} instances, got {routes.routes.shape[0]}")
        if gates is not None and routes is None:
            raise ValueError("gates must come with routes, got gates alone")
        if routes is not None or c.fusion == "vu":
            return instances
        if instruction is None:
            raise ValueError(
                f"instruction must be given, an embedding of shape ({c.instruction_dim},) or "
                f"({instances}, {c.instruction_dim}): the IF branch routes by it; got None"
            )
        if not instruction.is_floating_point():
            raise TypeError(f"instruction must be floating point, got {instruction.dtype}")
        if tuple(instruction.shape) not in ((c.instruction_dim,), (instances, c.instruction_dim)):
            raise ValueError(
                f"instruction must have shape ({c.instruction_dim},) or ({instances}, {c.instruction_dim}), "
                f"{instances} being the batch size of x, got {tuple(instruction.shape)}"
            )
        return instances

    def _given(
        self,
        routes: tuple[Tensor | None, Tensor | None],
        gates: tuple[Tensor | None, Tensor | None] | None,
        instances: int,
        dtype: torch.dtype,
    ) -> Chosen:
        """Given routes, and gates in `dtype`, as the passes take them."""
        top_k = self.config.top_k
        picked: dict[str, list[Tensor]] = {"routes": [], "gates": []}
        for name, pair in (("routes", routes), ("gates", gates)):
            if pair is None:
                continue
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(f"{name} must be a pair (VU, IF), got {type(pair).__name__}")
            for branch in active_streams(self.config.fusion):
                value = pair[branch]
                shapes = ((instances,), (instances, top_k)) if top_k == 1 else ((instances, top_k),)
                if not isinstance(value, Tensor) or tuple(value.shape) not in shapes:
                    got = tuple(value.shape) if isinstance(value, Tensor) else value
                    raise ValueError(
                        f"{name}[{branch}] must be a tensor of shape {' or '.join(map(str, shapes))}, got {got}"
                    )
                if value.device != self.vu_A.device:
                    raise ValueError(f"{name}[{branch}] must be on {self.vu_A.device}, got {value.device}")
                if name == "routes":
                    if value.dtype not in (torch.int32, torch.int64):
                        raise ValueError(f"routes[{branch}] must be int32 or int64, got {value.dtype}")
                    value = value.clamp(-1, 2**31 - 1)  # so that int32 cannot wrap a wrong route into a right one
                elif not value.is_floating_point():
                    raise ValueError(f"gates[{branch}] must be floating point, got {value.dtype}")
                picked[name].append(value.view(instances, top_k))
        chosen = torch.stack(picked["routes"], 1).int()
        if gates is None:
            return Chosen(chosen, torch.full(chosen.shape, 1 / top_k, dtype=dtype, device=chosen.device))
        return Chosen(chosen, torch.stack(picked["gates"], 1).to(dtype))


def decode_together(
    x: Tensor, layers: Sequence[tuple[SMoLoRAExperts, nn.Linear, Mapping[str, Any]]]
) -> list[tuple[Tensor, ...]] | None:
    """One token an instance through adapted plain layers that share x, in one launch.

    Args:
        x: (B, 1, d).
        layers: experts, the plain base under them, and the arguments of their forward besides, of which only routes
            and gates may differ between layers.

    Returns:
        what `SMoLoRAExperts.finish` takes to make the output of each; None if no launch takes these layers.
    """
    first = layers[0][0]
    c = first.config
    if any(experts.config is not c or (experts.training and experts._threshold) for experts, *_ in layers):
        return None
    inputs = [experts._inputs(x, **arguments) for experts, _, arguments in layers]
    call = inputs[0]  # the others have the same, but for routes and gates
    if call["backend"] != "cuda" or not cuda.decodes(
        call["x"], call["instances"], call["cu_seqlens"], call["threshold"], c.top_k, c.fusion, first.vu_A, first.if_A
    ):
        return None
    given = call["routes"] is not None
    return decode_linears(
        call["x"], call["instruction"], [experts._weights() for experts, *_ in layers],
        [(base.weight, base.bias) for _, base, _ in layers], instances=call["instances"], top_k=c.top_k,
        scaling=c.scaling, fusion=c.fusion, backend=call["backend"], route_mask=call["route_mask"],
        routes=[each["routes"] for each in inputs] if given else [],
        gates=[each["gates"] for each in inputs] if given else [],
    )  # fmt: skip


class FusedSMoLoRA(SMoLoRAExperts):
    """A linear layer with a SMoLoRA adapter (Eq. 4 to 9), a drop-in for the `nn.Linear` it wraps.

    Of M visual-understanding (VU) and N instruction-following (IF) experts of rank r, each instance uses one of either
    branch (`top_k` of them in general): the VU expert its tokens' mean is routed to, and the IF expert its instruction
    embedding is routed to. A learned share, token by token, fuses the two.

    The parameters are those of `SMoLoRAExperts`, in float32, or in float64 over a float64 layer. What cannot get a
    gradient, and the base, is frozen (`requires_grad` False); what a user freezes costs no work.

    Args:
        linear: the layer to adapt; its weight and bias are frozen.
        config: the adapter's configuration.

    Attributes:
        base_layer: `linear`.

    Raises:
        TypeError: `linear` is no linear layer, or `config` no `SMoLoRAConfig`.
    """

    def __init__(self, linear: nn.Module, config: SMoLoRAConfig) -> None:
        if not isinstance(config, SMoLoRAConfig):
            raise TypeError(f"config must be a SMoLoRAConfig, got {type(config).__name__}")
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a linear layer (torch.nn.Linear), got {type(linear).__name__}")
        weight = linear.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        super().__init__(linear.in_features, linear.out_features, config, device=weight.device, dtype=dtype)
        self.base_layer = linear
        self.freeze()

    def freeze(self) -> None:
        """Freeze the base, and of the adapter what the configuration gives no gradient; everything else trains."""
        super().freeze()
        self.base_layer.requires_grad_(False)

    def forward(
        self,
        x: Tensor,
        instruction: Tensor | None = None,
        *,
        route_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        routes: Chosen | tuple[Tensor | None, Tensor | None] | None = None,
        gates: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> Tensor:
        """The adapted layer's output: `SMoLoRAExperts.forward`, arguments and errors, with `base_layer` as the base."""
        return super().forward(
            x, instruction, route_mask=route_mask, cu_seqlens=cu_seqlens, routes=routes, gates=gates,
            base=self.base_layer,
        )  # fmt: skip

    def load_official_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a layer of the released code: its live state dict, or the keys under one layer of a saved adapter.

        VU experts come first there, IF experts after them. The keys of the linear layer itself (`weight`, `bias`) are
        loaded into the base if they are in.

        Args:
            state_dict: `lora_A.default.loraA.0.weight` and the like; the adapter's name may be missing, and the second
                name of an expert (`...loraA.0.mlp.weight`) is the same tensor again.

        Raises:
            KeyError: keys are missing or unknown; all are named, and nothing is loaded.
            ValueError: a tensor has the wrong shape, or two keys of one expert differ.
        """
        targets: dict[str, Tensor] = {"weight": self.base_layer.weight}
        if self.base_layer.bias is not None:
            targets["bias"] = self.base_layer.bias
        required = set()
        for letter in "AB":
            experts = [*getattr(self, f"vu_{letter}").unbind(0), *getattr(self, f"if_{letter}").unbind(0)]
            for i, expert in enumerate(experts):
                targets[f"lora_{letter}.{i}"] = expert
        for key, name in (
            ("lora_vu_gate", "vu_router"), ("lora_ins_gate", "if_router"), ("lora_fc_A", "vu_importance"),
            ("lora_fc_B", "if_importance"),
        ):  # fmt: skip
            targets[key] = getattr(self, name)
        required = targets.keys() - {"weight", "bias"}
        found: dict[str, Tensor] = {}
        unknown = []
        for key, value in state_dict.items():
            match = OFFICIAL_KEY.fullmatch(key)
            name = key
            if match is not None:
                name = match["kind"] if match["expert"] is None else f"{match['kind']}.{match['expert']}"
                if match["letter"] is not None and not match["kind"].endswith(f"_{match['letter']}"):
                    name = key
            if name not in targets:
                unknown.append(key)
                continue
            target = targets[name]
            expected = (1, *target.shape) if name.startswith("lora_fc") else tuple(target.shape)
            if tuple(value.shape) != expected:
                raise ValueError(f"{key} must have shape {expected}, got {tuple(value.shape)}")
            if name in found and not torch.equal(found[name], value):
                raise ValueError(f"{key} differs from another key of the same tensor")
            found[name] = value
        missing = sorted(required - found.keys())
        if missing or unknown:
            raise KeyError(f"official state dict: missing {missing}, unknown {unknown}")
        with torch.no_grad():
            for name, value in found.items():
                targets[name].copy_(value.view(targets[name].shape))
