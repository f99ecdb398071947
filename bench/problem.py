"""Random layers and batches for a `Case`, the same values for every implementation that is compared."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shapes import Case
from smolora.routing import Chosen

SCALING = 2.0  # lora_alpha / r in the paper's setting
INSTRUCTION_DIM = 384
# Every instance leans this far (in units of a router row) towards an expert of its own, so that which expert is chosen
# does not hang on the rounding of a mean: otherwise a low-precision peer could differ by routing, not by arithmetic.
LEAN = 8.0


@dataclass(frozen=True)
class Layer:
    """A frozen linear layer and its adapter, all rounded to the case's dtype.

    weight (k, d), bias (k,) or None; adapter: vu_A (M, r, d), vu_B (M, k, r), if_A (N, r, d), if_B (N, k, r),
    vu_router (M, d), if_router (N, e), vu_importance (k,), if_importance (k,).
    """

    case: Case
    weight: Tensor
    bias: Tensor | None
    adapter: dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """x (B, S, d), its cotangent dy (B, S, k), instruction (B, e) float32, routes: experts (B,), (B,) int32."""

    x: Tensor
    dy: Tensor
    instruction: Tensor
    routes: tuple[Tensor, Tensor]

    @cached_property
    def chosen(self) -> Chosen:
        """The routes as a model keeps them from its prompt, ready for the passes."""
        routes = torch.stack(self.routes, 1)[..., None].int()
        return Chosen(routes, torch.ones_like(routes, dtype=torch.float32))


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def draw_layer(case: Case, device: torch.device, seed: int = 0) -> Layer:
    """A layer as in mid-training: the adapter's output is about as large as the base's, so an error in it shows."""
    generator = _generator(device, seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(std).to(dtype)

    def uniform(*shape: int) -> Tensor:
        bound = shape[-1] ** -0.5
        return torch.rand(shape, generator=generator, device=device).mul_(2 * bound).sub_(bound).to(dtype)

    d, k, r = case.d, case.k, case.r
    std_A = 0.01
    std_B = 1 / (SCALING * std_A * (r * d) ** 0.5)
    return Layer(
        case,
        normal(k, d, std=d**-0.5),
        normal(k, std=1.0) if case.bias else None,
        {
            "vu_A": normal(case.vu, r, d, std=std_A),
            "vu_B": normal(case.vu, k, r, std=std_B),
            "if_A": normal(case.if_, r, d, std=std_A),
            "if_B": normal(case.if_, k, r, std=std_B),
            "vu_router": uniform(case.vu, d),
            "if_router": uniform(case.if_, INSTRUCTION_DIM),
            "vu_importance": uniform(k),
            "if_importance": uniform(k),
        },
    )


def draw_batch(layer: Layer, batch: int, seq: int, seed: int = 1) -> Batch:
    """`batch` instances of `seq` tokens; instance b is routed to VU expert b % M and IF expert (b + 1) % N."""
    device, dtype = layer.weight.device, layer.weight.dtype
    generator = _generator(device, seed)
    k, d = layer.weight.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def lean(router: Tensor, experts: Tensor) -> Tensor:
        rows = router.float().index_select(0, experts)
        return LEAN * rows / rows.norm(dim=1, keepdim=True)

    instance = torch.arange(batch, device=device)
    routes = (instance % layer.case.vu, (instance + 1) % layer.case.if_)
    x = normal(batch, seq, d) + lean(layer.adapter["vu_router"], routes[0])[:, None]
    instruction = normal(batch, INSTRUCTION_DIM) + lean(layer.adapter["if_router"], routes[1])
    return Batch(
        x.to(dtype),
        normal(batch, seq, k).to(dtype),
        instruction.to(dtype).float(),
        (routes[0].int(), routes[1].int()),
    )
