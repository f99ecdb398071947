"""Random layers and batches for a `Case`, the same values for every implementation that is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import smolora
from shapes import Shape
from smolora.reference import smolora_forward
from smolora.routing import Chosen

TRAINED = ("vu_A", "vu_B", "if_A", "if_B", "vu_importance", "if_importance")

SCALING = 2.0  # lora_alpha / r in the paper's setting
INSTRUCTION_DIM = 384
STD_A = 0.01  # of A at its start
# Every instance leans this far (in units of a router row) towards an expert of its own, so that which expert is chosen
# does not hang on the rounding of a mean: otherwise a low-precision peer could differ by routing, not by arithmetic.
LEAN = 8.0


Draw = Callable[..., Tensor]  # random numbers of a shape


@dataclass(frozen=True)
class Batch:
    """x (B, S, d), its cotangent dy (B, S, k), instruction (B, e) float32, routes: experts (B,), (B,) int32."""

    x: Tensor
    dy: Tensor
    instruction: Tensor
    routes: tuple[Tensor, Tensor]

    @property
    def call(self) -> dict[str, Any]:
        """What `FusedSMoLoRA` takes besides x."""
        return {"instruction": self.instruction}

    @property
    def step_call(self) -> dict[str, Any]:
        """The same for a decode step."""
        return {"routes": self.chosen}

    @cached_property
    def chosen(self) -> Chosen:
        """The routes as a model keeps them from its prompt, ready for the passes."""
        routes = torch.stack(self.routes, 1)[..., None].int()
        return Chosen(routes, torch.ones_like(routes, dtype=torch.float32))


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

    def draw_batch(self, x: Tensor, normal: Draw) -> Batch:
        """Make a batch of x (B, S, d) in float32; instance b goes to VU expert b % M and IF expert (b + 1) % N."""
        instance = torch.arange(len(x), device=x.device)
        routes = (instance % self.case.vu, (instance + 1) % self.case.if_)
        x = x + lean(self.adapter["vu_router"], routes[0])[:, None]
        instruction = normal(len(x), INSTRUCTION_DIM) + lean(self.adapter["if_router"], routes[1])
        dtype = self.weight.dtype
        return Batch(
            x.to(dtype),
            normal(*x.shape[:2], self.case.k).to(dtype),
            instruction.to(dtype).float(),
            (routes[0].int(), routes[1].int()),
        )

    def fused(self, linear: nn.Linear) -> nn.Module:
        """Our layer over `linear`, with parameters of its own."""
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
        """A (R, d) and B (k, R) of a LoRA of equal active rank R, from the adapter's own values."""
        A, B = (torch.cat([adapter[f"vu_{ab}"][0], adapter[f"if_{ab}"][0]], dim) for ab, dim in (("A", 0), ("B", 1)))
        return A, B

    def reference(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, adapter: dict[str, Tensor], batch: Batch, b: int
    ) -> Tensor:
        """y (1, S, k) of instance b, x being its (1, S, d), by the equations as written."""
        instruction = batch.instruction[b : b + 1].to(x.dtype)
        return smolora_forward(x, weight, bias, **adapter, instruction=instruction, scaling=SCALING)


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def up_std(r: int, d: int) -> float:
    """The spread of B at which an expert's output is about as large as the base's."""
    return 1 / (SCALING * STD_A * (r * d) ** 0.5)


def lean(router: Tensor, experts: Tensor) -> Tensor:
    """A vector (n, c) towards one row each of a router (E, c)."""
    rows = router.float().index_select(0, experts)
    return LEAN * rows / rows.norm(dim=1, keepdim=True)


def draw_layer(case: Shape, device: torch.device, seed: int = 0, kind: type[Layer] = Layer) -> Layer:
    """A layer as in mid-training: the adapter's output is about as large as the base's, so an error in it shows."""
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
    """`batch` instances of `seq` tokens."""
    device = layer.weight.device
    generator = _generator(device, seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    return layer.draw_batch(normal(batch, seq, layer.case.d), normal)
