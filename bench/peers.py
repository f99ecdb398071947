"""The implementations that are compared.

Every peer is built from the same `Layer` and maps the same `Batch` to y; what it trains is in `leaves`, under the names
of our layer's parameters. The written-out peers hold the adapter in the compute dtype, their fastest honest form; our
layer and `peft_lora_fp32` hold it as they do by default, in float32. What is written out here is SMoLoRA; the other
methods are in methods.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from operator import add

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import smolora
from workload import SCALING, Batch, Layer, SMoLoRABatch

Dropout = Callable[[Tensor], Tensor]


class Peer:
    """One implementation: `peer(batch)` is a training forward, `peer.step(batch)` one decode step."""

    formula = "method"  # which float64 formula it must agree with: the method's, "linear" or "lora"

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.leaves: dict[str, Tensor] = {}
        self.training = True

    def __call__(self, batch: Batch) -> Tensor:
        """Return y (B, S, k), recorded by autograd."""
        raise NotImplementedError

    def step(self, batch: Batch) -> Tensor:
        """Return y (B, 1, k) of one new token of each instance, without autograd, with the routes of its prompt."""
        raise NotImplementedError

    def train(self, mode: bool) -> None:
        """Turn dropout on or off."""
        self.training = mode

    def scope(self) -> AbstractContextManager:
        """Return the context in which forward and backward run."""
        return nullcontext()

    def parameters(self) -> list[Tensor]:
        """Return every tensor that it keeps between two forwards, its own or shared."""
        owned = [self.layer.weight, self.layer.bias, *self.leaves.values()]
        return [tensor for tensor in owned if tensor is not None]

    @property
    def weights_dtype(self) -> str:
        """Name the dtype in which the adapter is kept."""
        kept = {str(leaf.dtype).removeprefix("torch.") for leaf in self.leaves.values()}
        return "/".join(sorted(kept)) or "none"


class Linear(Peer):
    """The frozen base alone: dx is all its backward computes."""

    formula = "linear"

    def __call__(self, batch: Batch) -> Tensor:
        return F.linear(batch.x, self.layer.weight, self.layer.bias)

    step = __call__


def official(
    x: Tensor, base: Tensor, adapter: dict[str, Tensor], instruction: Tensor, routes: None, dropout: Dropout | None
) -> Tensor:
    """Compute as released: all experts on all tokens, each with its own dropout draw, then multiplied by a one-hot."""
    z = (F.linear(x.mean(1), adapter["vu_router"]), F.linear(instruction, adapter["if_router"]))
    branches = []
    for logits, down, up in zip(z, ("vu_A", "if_A"), ("vu_B", "if_B"), strict=True):
        one_hot = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(x.dtype)
        outputs = (
            F.linear(F.linear(x if dropout is None else dropout(x), A), B) * SCALING * one_hot[:, None, None, e]
            for e, (A, B) in enumerate(zip(adapter[down], adapter[up], strict=True))
        )
        branches.append(reduce(add, outputs))
    return _fuse(base, *branches, adapter)


def gathered(
    x: Tensor,
    base: Tensor,
    adapter: dict[str, Tensor],
    instruction: Tensor,
    routes: tuple[Tensor, Tensor] | None,
    dropout: Dropout | None,
) -> Tensor:
    """Compute the chosen experts only, and fuse k-sized vectors."""
    branches = []
    for index, down, up in zip(
        routes or _route(x, adapter, instruction), ("vu_A", "if_A"), ("vu_B", "if_B"), strict=True
    ):
        A, B = adapter[down].index_select(0, index), adapter[up].index_select(0, index)
        dropped = x if dropout is None else dropout(x)
        branches.append(SCALING * torch.bmm(torch.bmm(dropped, A.mT), B.mT))
    return _fuse(base, *branches, adapter)


def rank_space(
    x: Tensor,
    base: Tensor,
    adapter: dict[str, Tensor],
    instruction: Tensor,
    routes: tuple[Tensor, Tensor] | None,
    dropout: Dropout | None,
) -> Tensor:
    """Fuse in rank space, before the expansion: one rank-2r product makes the adapter's output."""
    v, i = routes or _route(x, adapter, instruction)
    A_v, A_i = adapter["vu_A"].index_select(0, v), adapter["if_A"].index_select(0, i)
    B_v, B_i = adapter["vu_B"].index_select(0, v), adapter["if_B"].index_select(0, i)
    if dropout is None:
        h_v, h_i = torch.bmm(x, torch.cat([A_v, A_i], 1).mT).chunk(2, -1)
    else:
        h_v, h_i = torch.bmm(dropout(x), A_v.mT), torch.bmm(dropout(x), A_i.mT)
    w_v, w_i = SCALING * (adapter["vu_importance"] @ B_v), SCALING * (adapter["if_importance"] @ B_i)  # (B, r)
    alpha = torch.sigmoid((h_v * w_v[:, None]).sum(-1, True) - (h_i * w_i[:, None]).sum(-1, True))
    mixed = torch.cat([alpha * h_v, (1 - alpha) * h_i], -1)
    return base + SCALING * torch.bmm(mixed, torch.cat([B_v, B_i], -1).mT)


def _route(x: Tensor, adapter: dict[str, Tensor], instruction: Tensor) -> tuple[Tensor, Tensor]:
    z_vu = F.linear(x.mean(1), adapter["vu_router"])
    return z_vu.argmax(-1), F.linear(instruction, adapter["if_router"]).argmax(-1)


def _fuse(base: Tensor, x_vu: Tensor, x_if: Tensor, adapter: dict[str, Tensor]) -> Tensor:
    scores = torch.stack([x_vu @ adapter["vu_importance"], x_if @ adapter["if_importance"]], -1)
    alpha, beta = torch.softmax(scores, -1).unsqueeze(-1).unbind(-2)
    return base + alpha * x_vu + beta * x_if


class Written(Peer):
    """An algorithm in ordinary torch operations under autograd."""

    def __init__(self, layer: Layer, algorithm: Callable[..., Tensor], routes_itself: bool = False) -> None:
        """Hold an algorithm; with `routes_itself` a decode step routes on its one token, as released."""
        super().__init__(layer)
        self.algorithm = algorithm
        self.routes_itself = routes_itself
        self.adapter = {name: tensor.clone() for name, tensor in layer.adapter.items()}
        self.leaves = {name: self.adapter[name].requires_grad_() for name in layer.trained}

    def __call__(self, batch: SMoLoRABatch) -> Tensor:
        p = self.layer.case.dropout
        dropout = (lambda x: F.dropout(x, p)) if p and self.training else None
        return self._run(batch, None, dropout)

    def step(self, batch: SMoLoRABatch) -> Tensor:
        return self._run(batch, None if self.routes_itself else batch.routes, None)

    def parameters(self) -> list[Tensor]:
        return super().parameters() + list(self.adapter.values())

    def _run(self, batch: SMoLoRABatch, routes: tuple[Tensor, Tensor] | None, dropout: Dropout | None) -> Tensor:
        base = F.linear(batch.x, self.layer.weight, self.layer.bias)
        return self.algorithm(batch.x, base, self.adapter, batch.instruction.to(batch.x.dtype), routes, dropout)


class Compiled(Written):
    """A written-out algorithm under `torch.compile`.

    Dropout is what Inductor makes of `F.dropout`, a comparison with random numbers that are never stored, but with the
    probability in a buffer: so the graph that is checked (at 0) is the graph that is timed.
    """

    def __init__(self, layer: Layer, algorithm: Callable[..., Tensor]) -> None:
        super().__init__(layer, algorithm)
        self.p = torch.full((), layer.case.dropout, device=layer.weight.device)
        has_dropout = layer.case.dropout > 0

        def forward(x, weight, bias, adapter, instruction, p):
            def dropout(x):
                keep = torch.rand(x.shape, device=x.device) >= p
                return x * (keep / (1 - p)).to(x.dtype)

            return algorithm(x, F.linear(x, weight, bias), adapter, instruction, None, dropout if has_dropout else None)

        def step(x, weight, bias, adapter, instruction, routes):
            return algorithm(x, F.linear(x, weight, bias), adapter, instruction, routes, None)

        self._forward = torch.compile(forward, fullgraph=True)
        self._step = torch.compile(step, fullgraph=True)

    def __call__(self, batch: SMoLoRABatch) -> Tensor:
        return self._forward(*self._operands(batch), self.p)

    def step(self, batch: SMoLoRABatch) -> Tensor:
        return self._step(*self._operands(batch), batch.routes)

    def parameters(self) -> list[Tensor]:
        return [*super().parameters(), self.p]

    def _operands(self, batch: SMoLoRABatch) -> tuple:
        instruction = batch.instruction.to(batch.x.dtype)
        return batch.x, self.layer.weight, self.layer.bias, self.adapter, instruction

    def train(self, mode: bool) -> None:
        self.p.fill_(self.layer.case.dropout if mode else 0.0)


def _base_module(layer: Layer) -> nn.Linear:
    """Make an `nn.Linear` on the layer's own weight, which peers share and none copies."""
    k, d = layer.weight.shape
    linear = nn.Linear(d, k, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias, requires_grad=False)
    return linear


class PeftLora(Peer):
    """PEFT's stock LoRA of the method's active rank (SMoLoRA: 2r): the same adapter size without a method."""

    formula = "lora"

    def __init__(self, layer: Layer, float32_adapter: bool) -> None:
        super().__init__(layer)
        with_values = layer.lora(layer.adapter, layer.case)
        rank = len(with_values[0])
        config = peft.LoraConfig(
            r=rank, lora_alpha=SCALING * rank, lora_dropout=layer.case.dropout, target_modules=["linear"]
        )
        model = nn.ModuleDict({"linear": _base_module(layer)})
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=float32_adapter)
        self.module = adapted.base_model.model["linear"]
        A, B = self.module.lora_A["default"].weight, self.module.lora_B["default"].weight
        with torch.no_grad():
            for parameter, value in zip((A, B), with_values, strict=True):
                parameter.copy_(value)
        self.leaves = {"lora_A": A, "lora_B": B}

    def __call__(self, batch: Batch) -> Tensor:
        return self.module(batch.x)

    def train(self, mode: bool) -> None:
        self.module.train(mode)

    step = __call__


class Fused(Peer):
    """Our layer of the method under one backend."""

    def __init__(self, layer: Layer, backend: str) -> None:
        super().__init__(layer)
        self.backend = backend
        self.module = layer.fused(_base_module(layer))
        with torch.no_grad():
            for name, tensor in layer.adapter.items():
                getattr(self.module, name).copy_(tensor)
        self.leaves = {name: getattr(self.module, name) for name in layer.trained}

    def __call__(self, batch: Batch) -> Tensor:
        return self.module(batch.x, **batch.call)

    def step(self, batch: Batch) -> Tensor:
        return self.module(batch.x, **batch.step_call)

    def train(self, mode: bool) -> None:
        self.module.train(mode)

    def parameters(self) -> list[Tensor]:
        return list(self.module.parameters())

    def scope(self) -> AbstractContextManager:
        return smolora.use_backend(self.backend)


PEERS: dict[str, Callable[[Layer], Peer]] = {
    "linear": Linear,
    "official": lambda layer: Written(layer, official, routes_itself=True),
    "gathered": lambda layer: Written(layer, gathered),
    "compiled_gathered": lambda layer: Compiled(layer, gathered),
    "compiled_rank_space": lambda layer: Compiled(layer, rank_space),
    "peft_lora": lambda layer: PeftLora(layer, float32_adapter=False),
    "peft_lora_fp32": lambda layer: PeftLora(layer, float32_adapter=True),
    "torch": lambda layer: Fused(layer, "torch"),
    "triton": lambda layer: Fused(layer, "triton"),
    "cuda": lambda layer: Fused(layer, "cuda"),
}
OURS = ("torch", "triton", "cuda")
