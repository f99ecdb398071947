"""Random layers and batches for a `SMoLoRACase`, the same values for every implementation that is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import smolora
from shapes import Shape
from smolora.reference import smolora_forward
from smolora.routing import TopK

TRAINED = ("vu_A", "vu_B", "if_A", "if_B", "vu_importance", "if_importance")

SCALING = 2.0  # lora_alpha / r in the paper's setting
INSTRUCTION_DIM = 384
STD_A = 0.01  # of A at its start
# Every instance is moved this far (in units of a router row) towards an expert of its own. Then the choice does not
# depend on how a mean is rounded, and a peer of low precision differs by its arithmetic and not by its routes.
ROUTE_MARGIN = 8.0


Draw = Callable[..., Tensor]  # random numbers of a shape


@dataclass(frozen=True)
class Batch:
    """x (B, S, d), its cotangent dy (B, S, k), and the layer's other arguments, in training and in a decode step."""

    x: Tensor
    dy: Tensor
    call: dict[str, Any]
    step_call: dict[str, Any]


@dataclass(frozen=True)
class SMoLoRABatch(Batch):
    """A batch with its instruction (B, e) float32, and its routes: VU and IF expert, int32 (B,) each."""

    instruction: Tensor
    routes: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Layer:
    """A frozen linear layer and its adapter, all rounded to the case's dtype: SMoLoRA's, others are in methods.py.

    weight (k, d), bias (k,) or None; adapter: vu_A (M, r, d), vu_B (M, k, r), if_A (N, r, d), if_B (N, k, r),
    vu_router (M, d), if_router (N, e), vu_importance (k,), if_importance (k,).
    """

    trained: ClassVar[tuple[str, ...]] = TRAINED

    case: Shape
    weight: Tensor
    bias: Tensor | None
    adapter: dict[str, Tensor]

    @staticmethod
    def draw_adapter(case: Shape, normal: Draw, uniform: Draw) -> dict[str, Tensor]:
        """Draw the adapter: `normal(*shape, std=...)`; `uniform(*shape)` as `nn.Linear` starts."""
        d, k, r = case.d, case.k, case.r
        std_B = up_std(r, d)
        return {
            "vu_A": normal(case.vu, r, d, std=STD_A),
            "vu_B": normal(case.vu, k, r, std=std_B),
            "if_A": normal(case.if_, r, d, std=STD_A),
            "if_B": normal(case.if_, k, r, std=std_B),
            "vu_router": uniform(case.vu, d),
            "if_router": uniform(case.if_, INSTRUCTION_DIM),
            "vu_importance": uniform(k),
            "if_importance": uniform(k),
        }

    def draw_batch(self, x: Tensor, normal: Draw) -> SMoLoRABatch:
        """Make a batch of x (B, S, d) in float32; instance b goes to VU expert b % M and IF expert (b + 1) % N."""
        instance = torch.arange(len(x), device=x.device)
        routes = (instance % self.case.vu, (instance + 1) % self.case.if_)
        x = x + towards(self.adapter["vu_router"], routes[0])[:, None]
        instruction = normal(len(x), INSTRUCTION_DIM) + towards(self.adapter["if_router"], routes[1])
        dtype = self.weight.dtype
        instruction = instruction.to(dtype).float()
        ids = torch.stack(routes, 1)[..., None].int()  # as a model keeps them from its prompt
        return SMoLoRABatch(
            x.to(dtype),
            normal(*x.shape[:2], self.case.k).to(dtype),
            call={"instruction": instruction},
            step_call={"routes": TopK(ids, torch.ones_like(ids, dtype=torch.float32))},
            instruction=instruction,
            routes=(routes[0].int(), routes[1].int()),
        )

    def fused(self, linear: nn.Linear) -> nn.Module:
        """Put our layer on `linear`, with parameters of its own."""
        config = smolora.SMoLoRAConfig(
            r=self.case.r,
            lora_alpha=SCALING * self.case.r,
            lora_dropout=self.case.dropout,
            num_vu_experts=self.case.vu,
            num_if_experts=self.case.if_,
            instruction_dim=INSTRUCTION_DIM,
        )
        return smolora.FusedSMoLoRA(linear, config)

    @staticmethod
    def lora(adapter: dict[str, Tensor], case: Shape) -> tuple[Tensor, Tensor]:
        """Return A (R, d) and B (k, R) of a LoRA of equal active rank R, with the adapter's own values."""
        A, B = (torch.cat([adapter[f"vu_{ab}"][0], adapter[f"if_{ab}"][0]], dim) for ab, dim in (("A", 0), ("B", 1)))
        return A, B

    def reference(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, adapter: dict[str, Tensor], batch: Batch, b: int
    ) -> Tensor:
        """Return y (1, S, k) of instance b from its x (1, S, d), by the equations as written."""
        instruction = batch.instruction[b : b + 1].to(x.dtype)
        return smolora_forward(x, weight, bias, **adapter, instruction=instruction, scaling=SCALING)


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def up_std(r: int, d: int) -> float:
    """Return the spread of B that makes an expert's output about as large as the base's."""
    return 1 / (SCALING * STD_A * (r * d) ** 0.5)


def towards(router: Tensor, experts: Tensor) -> Tensor:
    """Return vectors (n, c) of length ROUTE_MARGIN along one row each of a router (E, c)."""
    rows = router.float().index_select(0, experts)
    return ROUTE_MARGIN * rows / rows.norm(dim=1, keepdim=True)


def draw_layer(case: Shape, device: torch.device, seed: int = 0, kind: type[Layer] = Layer) -> Layer:
    """Draw a layer as in mid-training: the adapter's output is as large as the base's, so that its errors show."""
    generator = _generator(device, seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(std).to(dtype)

    def uniform(*shape: int) -> Tensor:
        bound = shape[-1] ** -0.5
        return torch.rand(shape, generator=generator, device=device).mul_(2 * bound).sub_(bound).to(dtype)

    weight = normal(case.k, case.d, std=case.d**-0.5)
    bias = normal(case.k, std=1.0) if case.bias else None
    return kind(case, weight, bias, kind.draw_adapter(case, normal, uniform))


def draw_batch(layer: Layer, batch: int, seq: int, seed: int = 1) -> Batch:
    """Draw a batch of `batch` instances of `seq` tokens."""
    device = layer.weight.device
    generator = _generator(device, seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    return layer.draw_batch(normal(batch, seq, layer.case.d), normal)
