"""Base classes of every mixture of low-rank experts: its parameters, its call of the engine, its drop-in layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ..backends import resolve_backend
from ..config import MixtureConfig, dropout_threshold
from ..engine import cuda_passes
from ..engine.function import decode_linears, mixture_linear
from ..spec import Bank, Dropout, Mixed, Tokens, num_slots
from .checks import check_route_mask, check_x
from .selector import Selector
from .slices import SlicedParameter


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a layer computes in: autocast's, else x's own."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def is_recomputed() -> bool:
    """Return whether this forward repeats one within a backward, as activation checkpointing does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling a module does more than its class's forward: hooks, or a replaced forward (offloading)."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or "forward" in module.__dict__ or hasattr(module, "_hf_hook")


def is_local(parameter: Tensor) -> bool:
    """Return whether all of a parameter is here: it is neither sharded nor partitioned."""
    return type(parameter) in (nn.Parameter, SlicedParameter, Tensor) and not hasattr(parameter, "ds_id")


def is_plain_linear(base: nn.Module | None, dtype: torch.dtype) -> TypeGuard[nn.Linear]:
    """Return whether `base` is nothing but x W^T + b with frozen weights in `dtype`, whose products may be taken over.

    Hooks, parametrisations, sharded weights and subclasses all mean that calling it does more than this product.
    """
    if type(base) is not nn.Linear or has_hooks(base):
        return False
    parameters = [base._parameters.get("weight"), base._parameters.get("bias")]
    if parameters[0] is None:
        return False
    return all(p is None or (is_local(p) and p.dtype == dtype and not p.requires_grad) for p in parameters)


class Batch(NamedTuple):
    """The tokens of a call, checked and flattened for the engine."""

    x: Tensor  # (T, d), contiguous, in the compute dtype
    tokens: Tokens
    backend: str


class Prepared(NamedTuple):
    """A call of a layer, as the engine takes it."""

    batch: Batch
    banks: list[Bank]
    how: dict[str, Any]  # the other arguments of `engine.function.mixture_linear`


class Decision:
    """Receives what one forward decided, for callers that run several forwards at a time.

    Attributes:
        last: the forward's result without y.
    """

    last: Mixed


class MixtureExperts(nn.Module):
    """The parameters of one adapter on one linear layer, and the forward that uses them.

    One module owns all of them and its `forward` is called, because FSDP and ZeRO-3 gather parameters there. A method
    subclasses it with `shapes` and `prepare`, and if need be with `reset_parameter` and `trains`.

    Args:
        in_features, out_features: d and k.
        config: the adapter's configuration.
        device, dtype: of the parameters.
    """

    config_class: type[MixtureConfig]
    sliced: tuple[str, ...] = ()  # parameters whose slices along dimension 0 may be frozen or unused
    optional_state: tuple[str, ...] = ()  # entries that adapters saved by an older version lack: they start at 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: MixtureConfig,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.in_features, self.out_features = in_features, out_features
        self._threshold = dropout_threshold(config.lora_dropout)
        self._last: Mixed | None = None  # the last forward's result without y
        for name, shape in self.shapes().items():
            kind = SlicedParameter if name in self.sliced else nn.Parameter
            setattr(self, name, kind(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()
        MixtureExperts.freeze(self)  # not the override: what a subclass freezes besides does not exist yet

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the parameters' shapes by name, in the order of their initialisation."""
        raise NotImplementedError  # every mixture has its own: there is no default

    def reset_parameters(self) -> None:
        """Initialise the adapter."""
        for name, parameter in self.named_parameters(recurse=False):
            self.reset_parameter(name, parameter)

    def reset_parameter(self, name: str, parameter: Tensor) -> None:
        """Initialise a parameter: A ~ N(0, 0.01^2), B = 0, anything else as `nn.Linear`."""
        letter = name.rpartition("_")[2]
        if letter == "A":
            nn.init.normal_(parameter, std=0.01)
        elif letter == "B":
            nn.init.zeros_(parameter)
        else:  # nn.Linear draws from U(-1 / sqrt(inputs), 1 / sqrt(inputs))
            bound = parameter.shape[-1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound)

    def trains(self, name: str) -> bool:
        """Return whether the configuration lets a parameter learn."""
        return True

    def freeze(self) -> None:
        """Freeze the parameters that the configuration gives no gradient, and no others."""
        for name, parameter in self.named_parameters(recurse=False):
            parameter.requires_grad_(parameter.is_floating_point() and self.trains(name))

    def trained_slices(self) -> dict[str, int]:
        """Return how many slices of each parameter in `sliced` train."""
        return {name: self.get_parameter(name).shape[0] for name in self.sliced}

    def num_trained(self) -> int:
        """Count the trained numbers; a sliced parameter counts its trained slices alone."""
        slices = self.trained_slices()
        total = 0
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.requires_grad:
                share = slices[name] if name in slices else parameter.shape[0]
                total += share * parameter[0].numel()
        return total

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: Any, *lists: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        missing = lists[0]
        for name in self.optional_state:
            if prefix + name in missing:
                missing.remove(prefix + name)
                self.get_buffer(name).zero_()

    # ---- a call

    def prepare(self, x: Tensor, *args: Any, **kwargs: Any) -> Prepared:
        """Check a call and translate it for the engine.

        A method overrides it with its own arguments after x. It calls `batch`; routing is the engine's.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it, its value and what was expected.
                Values (a NaN, an empty mask, an id out of range) are checked on CPU tensors. On a GPU reading them
                syncs, so there they are checked only with SMOLORA_CHECK=1 in the environment.
        """
        raise NotImplementedError  # every mixture has its own: there is no default

    def forward(
        self,
        x: Tensor,
        *args: Any,
        base: nn.Module | None = None,
        decision: Decision | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the adapted layer's output, or the adapter's alone without a `base`.

        Args:
            x: (B, S, d), or packed (T, d) or (1, T, d) with `cu_seqlens`; computed in the autocast dtype, else in its
                own.
            args, kwargs: see the method's `prepare`.
            base: the linear layer under the adapter, whose output is in y.
            decision: takes what is decided, for callers that may run several forwards at a time.

        Returns:
            y, of x's shape with k in place of d.

        Raises:
            TypeError, ValueError: see `prepare`.
            RuntimeError: the backend that was asked for cannot run.
        """
        batch, banks, how = self.prepare(x, *args, **kwargs)
        plain = base if is_plain_linear(base, batch.x.dtype) else None
        mixed = mixture_linear(
            batch.x,
            banks,
            tokens=batch.tokens,
            dropout=self._dropout(x.device),
            backend=batch.backend,
            weight=None if plain is None else plain.weight,
            bias=None if plain is None else plain.bias,
            **{"scaling": self.config.scaling, **how},
        )
        if base is not None and plain is None:
            mixed = mixed._replace(y=mixed.y.add_(base(x).view_as(mixed.y)))
        return self.finish(x, mixed, decision)

    def batch(self, x: Tensor, cu_seqlens: Tensor | None = None, route_mask: Tensor | None = None) -> Batch:
        """Check a batch and flatten it for the engine.

        Raises:
            TypeError, ValueError: an argument does not fit.
            RuntimeError: the backend that was asked for cannot run.
        """
        num_seqs = check_x(x, self.in_features, cu_seqlens, next(self.parameters()).device)
        check_route_mask(route_mask, x)
        dtype = compute_dtype(x)
        tokens = Tokens(
            num_seqs,
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            None if route_mask is None else route_mask.reshape(-1).contiguous(),
        )
        return Batch(x.reshape(-1, x.shape[-1]).to(dtype).contiguous(), tokens, resolve_backend(x.device.type, dtype))

    def _dropout(self, device: torch.device) -> Dropout:
        """Draw the masks' seed, on the device: that needs no sync, and a recomputed forward draws the same seed."""
        if not self.training or not self._threshold:
            return Dropout()
        return Dropout(self._threshold, torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device))

    def finish(self, x: Tensor, mixed: Mixed, decision: Decision | None = None) -> Tensor:
        """Keep what was decided, and return the output in the shape of x."""
        decided = (None if t is None else t.detach() for t in mixed[1:])
        self._last = Mixed(None, *decided)  # type: ignore[arg-type]  # y is not kept
        if decision is not None:
            decision.last = self._last
        return mixed.y.view(*x.shape[:-1], self.out_features)

    @property
    def has_routed(self) -> bool:
        """Whether there was a forward since the start, or since `forget_routing()`."""
        return self._last is not None

    def forget_routing(self) -> None:
        """Drop what the last forward decided."""
        self._last = None

    def _decided(self, method: str) -> Mixed:
        """Return what the last forward decided.

        Raises:
            RuntimeError: there was no forward yet.
        """
        if self._last is None:
            raise RuntimeError(f"{method} needs a forward first")
        return self._last

    def extra_repr(self) -> str:
        facts: dict[str, Any] = {"in_features": self.in_features, "out_features": self.out_features, "r": self.config.r}
        facts |= {"scaling": f"{self.config.scaling:g}", **self.facts(), "dropout": f"{self._threshold / 256:g}"}
        return ", ".join(f"{name}={value}" for name, value in facts.items())

    def facts(self) -> dict[str, Any]:
        """Return the method's part of the layer's repr."""
        return {}


def decode_layers(
    x: Tensor, layers: Sequence[tuple[MixtureExperts, nn.Linear, Mapping[str, Any]]]
) -> list[Mixed] | None:
    """Run one token a sequence through adapted plain layers that share x, in one launch.

    Args:
        x: (B, 1, d).
        layers: experts, the plain linear layer under them, and the other arguments of their `prepare`. Only routes may
            differ between layers.

    Returns:
        a result for each layer's `MixtureExperts.finish`; None if no kernel takes these layers.
    """
    first = layers[0][0]
    if any(experts.config is not first.config or (experts.training and experts._threshold) for experts, *_ in layers):
        return None
    calls = [experts.prepare(x, **arguments) for experts, _, arguments in layers]
    batch, banks, how = calls[0]  # the others differ in parameters and routes alone
    mix, slots, routers = how.get("mix", "weighted"), how.get("slots"), how.get("routers", ())
    K = num_slots(None if slots is None else slots.ids, [bank.B for bank in banks], how.get("top_k", 0))
    n = batch.tokens.num_seqs
    if batch.backend != "cuda" or not cuda_passes.decodes(batch.x, n, None, 0, banks, K, routers, mix):
        return None
    return decode_linears(
        batch.x,
        [call.banks for call in calls],
        [(base.weight, base.bias) for _, base, _ in layers],
        tokens=batch.tokens,
        scaling=how.get("scaling", first.config.scaling),
        backend=batch.backend,
        mix=mix,
        slots=None if slots is None else [call.how["slots"] for call in calls],
        routers=[call.how["routers"] for call in calls] if routers else (),
        top_k=how.get("top_k", 0),
        gate=how.get("gate", "chosen"),
        instruction=how.get("instruction"),
    )


class DropIn(MixtureExperts):
    """A drop-in for an `nn.Linear`: mixed into the experts of a method, it makes them wrap the layer.

    The parameters are those of the experts, in float32, or in float64 over a float64 layer. The base and the parameters
    that cannot get a gradient are frozen (`requires_grad` is False). A parameter that the user freezes costs no work.

    Args:
        linear: the layer to adapt; its weight and bias are frozen.
        config: the adapter's configuration.

    Attributes:
        base_layer: `linear`.

    Raises:
        TypeError: `linear` is no linear layer, or `config` not the method's.
    """

    def __init__(self, linear: nn.Module, config: MixtureConfig) -> None:
        if not isinstance(config, self.config_class):
            raise TypeError(f"config must be a {self.config_class.__name__}, got {type(config).__name__}")
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a linear layer (torch.nn.Linear), got {type(linear).__name__}")
        weight = linear.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        super().__init__(linear.in_features, linear.out_features, config, device=weight.device, dtype=dtype)
        self.base_layer = linear
        self.freeze()

    def freeze(self) -> None:
        """Freeze the base, and the adapter's parameters that the configuration gives no gradient."""
        super().freeze()
        self.base_layer.requires_grad_(False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base plus adapter; arguments and errors are those of the experts' `prepare`."""
        return super().forward(x, *args, base=self.base_layer, **kwargs)


class Mixture(NamedTuple):
    """A method as `smolora.MIXTURES` lists it."""

    name: str  # in lower case; upper case, its `peft.PeftType`
    config: type[MixtureConfig]
    experts: type[MixtureExperts]
    layer: type[nn.Module]  # `Fused<Name>`
    no_merge: str  # why it cannot be merged into the base
    target: Literal["linear", "block", "projector"] = "linear"  # a layer, a feed-forward block of three, or a projector
    selector: Callable[[Any, torch.device], Selector | None] | None = None  # for a configuration, in a whole model

    @property
    def title(self) -> str:
        """The method's name as papers write it, such as "SMoLoRA"."""
        return self.layer.__name__.removeprefix("Fused")
