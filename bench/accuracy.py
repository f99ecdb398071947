"""Right before fast: every peer is checked against float64, on the inputs that it is timed on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from peers import Peer
from workload import SCALING, Batch, Layer

# Relative norm errors that a correct computation stays under: about twice what k-sized torch shows in 16 bits (0.3% for
# y and dx, 0.5% for gradients in bfloat16), ten times in float32, where sums grow longer with the shape.
LIMITS = {
    "float32": {"y": 1e-5, "dx": 1e-5, "grads": 1e-5},
    "float16": {"y": 8e-4, "dx": 8e-4, "grads": 1.5e-3},
    "bfloat16": {"y": 6e-3, "dx": 6e-3, "grads": 1.2e-2},
}


class WrongResult(Exception):
    """A peer disagrees with float64; the message names the peer and its error."""


@dataclass(frozen=True)
class Expected:
    """float64 results of one formula: y and dx as the batch's, gradients by name."""

    y: Tensor
    dx: Tensor
    grads: dict[str, Tensor]


@dataclass(frozen=True)
class Errors:
    """Relative norm errors; `grads` is the largest over the parameters, `worst` names it."""

    y: float
    dx: float | None = None
    grads: float | None = None
    worst: str | None = None


def expect(formula: str, layer: Layer, batch: Batch) -> Expected:
    """Compute the "method", "linear" or "lora" in float64, one instance at a time to bound the memory."""
    weight = layer.weight.double()
    bias = None if layer.bias is None else layer.bias.double()
    adapter = {name: tensor.double() for name, tensor in layer.adapter.items()}
    if formula == "lora":
        leaves = dict(zip(("lora_A", "lora_B"), layer.lora(adapter, layer.case), strict=True))
    else:
        leaves = {name: adapter[name] for name in layer.trained} if formula == "method" else {}
    for leaf in leaves.values():
        leaf.requires_grad_()
    grads = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    ys, dxs = [], []
    for b in range(len(batch.x)):
        x = batch.x[b : b + 1].double().requires_grad_()
        if formula == "method":
            y = layer.reference(x, weight, bias, adapter, batch, b)
        else:
            y = F.linear(x, weight, bias)
            if formula == "lora":
                y = y + SCALING * F.linear(F.linear(x, leaves["lora_A"]), leaves["lora_B"])
        dx, *parts = torch.autograd.grad(y, [x, *leaves.values()], batch.dy[b : b + 1].double(), allow_unused=True)
        for grad, part in zip(grads.values(), parts, strict=True):
            if part is not None:
                grad += part
        ys.append(y.detach())
        dxs.append(dx)
    return Expected(torch.cat(ys), torch.cat(dxs), grads)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected|; infinite if a number is not finite, or a zero is missed."""
    difference = (actual.double() - expected).norm().item()
    scale = expected.norm().item()
    if not math.isfinite(difference):
        return math.inf
    return difference / scale if scale else (math.inf if difference else 0.0)


def forward_backward(peer: Peer, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return y, dx and the gradients of the peer's parameters."""
    x = batch.x.detach().requires_grad_()
    with peer.scope():
        y = peer(replace(batch, x=x))
    dx, *grads = torch.autograd.grad(y, [x, *peer.leaves.values()], batch.dy)
    return y.detach(), dx, dict(zip(peer.leaves, grads, strict=True))


def check(name: str, peer: Peer, batch: Batch, expected: Expected) -> Errors:
    """Return the errors of a training step with dropout off; then check that dropout, when on, is as strong as p.

    Raises:
        WrongResult: an error is over its limit.
    """
    peer.train(False)
    y, dx, grads = forward_backward(peer, batch)
    each = {leaf: relative(grads[leaf], expected.grads[leaf]) for leaf in expected.grads}
    worst = max(each, key=each.get, default=None)
    errors = Errors(relative(y, expected.y), relative(dx, expected.dx), each[worst] if worst else None, worst)
    for what, limit in LIMITS[peer.layer.case.dtype].items():
        error = getattr(errors, what)
        if error is not None and not error <= limit:
            of = f"gradient of {worst}" if what == "grads" else what
            raise WrongResult(f"{name}: relative error of {of} against float64 is {error:.2e}, over {limit:.0e}")
    peer.train(True)
    if peer.layer.case.dropout and peer.leaves:
        _check_dropout(name, peer, batch, y)
    return errors


def _check_dropout(name: str, peer: Peer, batch: Batch, y: Tensor) -> None:
    """Check that dropout's noise is as large as p makes it: a peer without dropout would be timed on less work."""
    p, (instances, seq, d) = peer.layer.case.dropout, batch.x.shape
    if instances * seq < 64 or d * p < 2:
        return  # too few elements are dropped for their noise to be predictable
    with peer.scope():  # recorded as in training: a compiled peer would be compiled anew without
        noisy = peer(replace(batch, x=batch.x.detach().requires_grad_())).detach()
    base = F.linear(batch.x, peer.layer.weight, peer.layer.bias)
    noise = (noisy.double() - y.double()).norm() / (y.double() - base.double()).norm()
    ratio = noise.item() / math.sqrt(p / (1 - p))
    if not 0.5 < ratio < 2:
        raise WrongResult(f"{name}: dropout {p:g} changes y by {ratio:.2f} times what it should")


def check_step(name: str, peer: Peer, y: Tensor, expected: Tensor) -> Errors:
    """Return the error of a decode step's output.

    Raises:
        WrongResult: it is over the limit.
    """
    error = relative(y, expected)
    limit = LIMITS[peer.layer.case.dtype]["y"]
    if not error <= limit:
        raise WrongResult(f"{name}: relative error of a decode step against float64 is {error:.2e}, over {limit:.0e}")
    return Errors(error)
