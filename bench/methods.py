"""The other methods that are measured: parameters, batches, and the form that their authors released.

A batch is one of a training stage: all of its sequences are of one task, the newest, and RoutedLoRA's use the same
experts, as D-MoLE sets them once a batch. BranchLoRA routes each sequence by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peers
import smolora
from shapes import MixtureCase
from smolora import reference
from smolora.engine.cuda_passes import unsupported_reason
from smolora.routing import TopK
from workload import SCALING, STD_A, Batch, Draw, Layer, towards, up_std

Dropout = Callable[[Tensor], Tensor]


class MixtureLayer(Layer):
    """A frozen linear layer and the adapter of a method, under the names of our layer's parameters; all of them train.

    A method's class has `draw_adapter`, `lora` and `reference` of `Layer`, and `official`.
    """

    case: MixtureCase
    mix: ClassVar[str] = "weighted"  # of the engine

    @property
    def trained(self) -> tuple[str, ...]:
        return tuple(self.adapter)

    def call(self, sequences: int) -> dict[str, Any]:
        """Return the layer's arguments besides x."""
        return {}

    def draw_batch(self, x: Tensor, normal: Draw) -> Batch:
        """Make a batch of x (B, S, d) in float32."""
        dtype, call = self.weight.dtype, self.call(len(x))
        return Batch(x.to(dtype), normal(*x.shape[:2], self.case.k).to(dtype), call, call)

    def fused(self, linear: nn.Linear) -> nn.Module:
        method = smolora.MIXTURES[self.case.method]
        numbers = {
            "num_experts": self.case.experts,
            "num_branches": self.case.experts,
            "num_tasks": self.case.tasks,
            "top_k": self.case.active,
            "task_r": self.case.task_r,
        }
        config = method.config(
            r=self.case.r,
            lora_alpha=SCALING * self.case.r,
            lora_dropout=self.case.dropout,
            **{field.name: numbers[field.name] for field in fields(method.config) if field.name in numbers},
        )
        return method.layer(linear, config)

    @staticmethod
    def official(x: Tensor, base: Tensor, adapter: dict[str, Tensor], call: dict[str, Any], dropout: Dropout) -> Tensor:
        """Compute y (B, S, k) as the authors' code does; `base` (B, S, k) may be written to."""
        raise NotImplementedError


class MoELoRA(MixtureLayer):
    """A (E, r, d), B (E, k, r), router (E, d); CoIN's code."""

    mix = "softmax"

    @staticmethod
    def draw_adapter(case: MixtureCase, normal: Draw, uniform: Draw) -> dict[str, Tensor]:
        E, d, k, r = case.experts, case.d, case.k, case.r
        return {
            "A": normal(E, r, d, std=STD_A),
            "B": normal(E, k, r, std=E**0.5 * up_std(r, d)),
            "router": uniform(E, d),
        }

    @staticmethod
    def official(x, base, adapter, call, dropout):
        """Expert by expert, each with a dropout draw of its own, weighted after the expansion."""
        share = torch.softmax(F.linear(x, adapter["router"]), -1)
        for e, (A, B) in enumerate(zip(adapter["A"], adapter["B"], strict=True)):
            base += F.linear(F.linear(dropout(x), A), B) * SCALING * share[..., e, None]
        return base

    @staticmethod
    def lora(adapter: dict[str, Tensor], case: MixtureCase) -> tuple[Tensor, Tensor]:
        return _side_by_side(adapter["A"], adapter["B"])

    def reference(self, x, weight, bias, adapter, batch, b):
        return reference.moelora_forward(x, weight, bias, **adapter, scaling=SCALING)


class BranchLoRA(MixtureLayer):
    """A (r, d), B (N, k, r), router (tasks, N, d); no code is released: all branches dense, zero where not chosen."""

    @staticmethod
    def draw_adapter(case: MixtureCase, normal: Draw, uniform: Draw) -> dict[str, Tensor]:
        N, d, k, r = case.experts, case.d, case.k, case.r
        return {
            "A": normal(r, d, std=STD_A),
            "B": normal(N, k, r, std=up_std(r, d)),
            "router": uniform(case.tasks, N, d),
        }

    def call(self, sequences: int) -> dict[str, Any]:
        return {"task": self.case.tasks - 1}

    def draw_batch(self, x: Tensor, normal: Draw) -> Batch:
        """Move each sequence's first token, which the router reads, towards branches of its own."""
        router, top_k = self.adapter["router"][-1], self.case.active
        first = torch.arange(len(x), device=x.device) * top_k
        for j in range(top_k):
            x[:, 0] += towards(router, (first + j) % len(router))
        batch = super().draw_batch(x, normal)
        pi = torch.softmax(batch.x[:, 0].float() @ router.float().mT, -1)
        weights, ids = pi.topk(top_k)
        return replace(batch, step_call={"routes": TopK(ids[:, None].int(), weights[:, None])})

    @staticmethod
    def official(x, base, adapter, call, dropout):
        """Shrink once, then weight every branch's k-sized output by its gate; most gates are 0."""
        pi = torch.softmax(F.linear(x[:, 0].float(), adapter["router"][call["task"]].float()), -1)
        weights, ids = pi.topk(call["top_k"])
        gate = torch.zeros_like(pi).scatter(-1, ids, weights).to(x.dtype)
        z = F.linear(dropout(x), adapter["A"])
        for b, B in enumerate(adapter["B"]):
            base += F.linear(z, B) * SCALING * gate[:, b, None, None]
        return base

    @staticmethod
    def lora(adapter: dict[str, Tensor], case: MixtureCase) -> tuple[Tensor, Tensor]:
        return adapter["A"].clone(), adapter["B"][0].clone()

    def reference(self, x, weight, bias, adapter, batch, b):
        task = torch.tensor([batch.call["task"]])
        return reference.branchlora_forward(
            x, weight, bias, **adapter, task=task, scaling=SCALING, top_k=self.case.active
        )


class LiLoRA(MixtureLayer):
    """A (r, d), B (k, r), task_A (tasks, t, r), task_B (tasks, k, t), task_logit (tasks,)."""

    @staticmethod
    def draw_adapter(case: MixtureCase, normal: Draw, uniform: Draw) -> dict[str, Tensor]:
        tasks, t, d, k, r = case.tasks, case.task_r, case.d, case.k, case.r
        return {
            "A": normal(r, d, std=STD_A),
            "B": normal(k, r, std=up_std(r, d)),
            "task_A": normal(tasks, t, r, std=r**-0.5),
            "task_B": normal(tasks, k, t, std=up_std(t, d)),
            "task_logit": normal(tasks, std=1.0),
        }

    def call(self, sequences: int) -> dict[str, Any]:
        return {"task": self.case.tasks - 1}

    def draw_batch(self, x: Tensor, normal: Draw) -> Batch:
        """Move dy towards what the task's logit changes: else its gradient is a sum that cancels to rounding."""
        batch = super().draw_batch(x, normal)
        B, A_t, B_t = (self.adapter[name].float() for name in ("B", "task_A", "task_B"))
        change = F.linear(F.linear(batch.x.float(), self.adapter["A"].float()), B - B_t[-1] @ A_t[-1])
        return replace(batch, dy=(batch.dy + change).to(batch.dy.dtype))

    @staticmethod
    def official(x, base, adapter, call, dropout):
        """Form the task's B from copies of its parts, then compute a LoRA with it."""
        A_t, B_t, logit = (adapter[f"task_{name}"][call["task"]] for name in ("A", "B", "logit"))
        share = torch.sigmoid(logit)
        z = F.linear(dropout(x), adapter["A"])
        B = share * adapter["B"].clone() + (1 - share) * (B_t.clone() @ A_t.clone())
        return base + z @ B.mT * SCALING

    @staticmethod
    def lora(adapter: dict[str, Tensor], case: MixtureCase) -> tuple[Tensor, Tensor]:
        return adapter["A"].clone(), adapter["B"].clone()

    def reference(self, x, weight, bias, adapter, batch, b):
        task = torch.tensor([batch.call["task"]])
        return reference.lilora_forward(x, weight, bias, **adapter, task=task, scaling=SCALING)


class RoutedLoRA(MixtureLayer):
    """A (E, r, d), B (E, k, r); D-MoLE's code."""

    @staticmethod
    def draw_adapter(case: MixtureCase, normal: Draw, uniform: Draw) -> dict[str, Tensor]:
        E, d, k, r = case.experts, case.d, case.k, case.r
        return {"A": normal(E, r, d, std=STD_A), "B": normal(E, k, r, std=up_std(r, d))}

    def call(self, sequences: int) -> dict[str, Any]:
        experts = torch.arange(self.case.active, device=self.weight.device)
        return {"experts": experts.expand(sequences, -1).contiguous()}

    @staticmethod
    def official(x, base, adapter, call, dropout):
        """Sum the active experts' outputs, each with a dropout draw of its own, then scale and add."""
        total = torch.zeros_like(base)
        for e in call["experts"][0].tolist():
            total += F.linear(F.linear(dropout(x), adapter["A"][e]), adapter["B"][e])
        base += total * SCALING
        return base

    @staticmethod
    def lora(adapter: dict[str, Tensor], case: MixtureCase) -> tuple[Tensor, Tensor]:
        return _side_by_side(adapter["A"][: case.active], adapter["B"][: case.active])

    def reference(self, x, weight, bias, adapter, batch, b):
        experts = batch.call["experts"][b : b + 1].cpu()
        return reference.routedlora_forward(x, weight, bias, **adapter, experts=experts, scaling=SCALING)


def _side_by_side(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return experts (E, r, d) and (E, k, r) as one LoRA, (E r, d) and (k, E r)."""
    return A.flatten(0, 1).clone(), B.transpose(0, 1).flatten(1).clone()


LAYERS: dict[str, type[MixtureLayer]] = {
    "moelora": MoELoRA,
    "branchlora": BranchLoRA,
    "lilora": LiLoRA,
    "routedlora": RoutedLoRA,
}


class Released(peers.Written):
    """A method in ordinary torch operations, as its authors released it."""

    def __init__(self, layer: MixtureLayer) -> None:
        super().__init__(layer, layer.official, routes_itself=True)

    def _run(self, batch: Batch, routes: None, dropout: Dropout | None) -> Tensor:
        base = F.linear(batch.x, self.layer.weight, self.layer.bias)
        call = batch.call | {"top_k": self.layer.case.active}
        return self.algorithm(batch.x, base, self.adapter, call, dropout or (lambda x: x))


PEERS: dict[str, Callable[[MixtureLayer], peers.Peer]] = {
    name: Released if name == "official" else peers.PEERS[name]
    for name in ("linear", "official", "peft_lora", "peft_lora_fp32", *peers.OURS)
}


def cuda_refuses(case: MixtureCase) -> str | None:
    """Return why the CUDA kernels cannot take a method; None if they can."""
    slots = case.mixed // case.r
    return unsupported_reason(LAYERS[case.method].mix, 1, slots, case.r, False)
