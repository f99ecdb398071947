"""A layer's or the engine's forward and backward as compiled for a card, against float64; for the worker's process."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from support import mixtures, oracle
from support.mixtures import MixCase
from support.oracle import Case
from support.ptx.faults import Faults
from support.ptx.launcher import Machine, installed

ORDERS = ("forward", "reverse", "shuffled")
FEW = 4  # processors, as the launchers take a CPU for


@cache
def machine_for(arch: int, processors: int) -> Machine:
    """One machine for all cases, which has parsed every program once."""
    return Machine(arch, processors)


def run_once(
    machine: Machine, case: Case | MixCase, dtype: torch.dtype, order: str = ORDERS[0], aligned: bool = True
) -> dict[str, Tensor]:
    """One forward and backward of a case, its kernels compiled and executed."""
    machine.order = order
    with installed(machine):
        if isinstance(case, MixCase):
            return mixtures.run_call(mixtures.build_call(case).to("cpu", dtype), "triton")
        layer, batch = oracle.build(case, dtype)
        if not aligned:
            batch.x, batch.cotangent = _one_further(batch.x), _one_further(batch.cotangent)
            for parameter in layer.parameters():
                parameter.data = _one_further(parameter.data)
        return oracle.run(layer, batch, "triton")


def _one_further(tensor: Tensor) -> Tensor:
    """The same at an address that is a multiple of nothing but an element: kernels are compiled anew for it."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def equations(case: Case | MixCase, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same by the equations as written, in float64 and in `dtype`."""
    if isinstance(case, Case):
        layer, batch = oracle.build(case, dtype)
        return oracle.reference(layer, batch, torch.float64), oracle.reference(layer, batch, dtype)
    call = mixtures.build_call(case)
    return mixtures.naive_call(call), mixtures.naive_call(call.to("cpu", dtype))


def check(
    case: Case | MixCase,
    dtype: torch.dtype,
    arch: int,
    orders: tuple[str, ...] = ORDERS[:1],
    *,
    processors: int = FEW,
    aligned: bool = True,
) -> None:
    """Hold a case against float64, and every order of a launch's programs against the first one.

    Raises:
        AssertionError: an error above its bound, other bits in another order, or a fault of any launch.
    """
    machine, at = machine_for(arch, processors), f"{case} {dtype} sm_{arch}"
    machine.faults = Faults()
    results = [run_once(machine, case, dtype, order, aligned) for order in orders]
    assert not machine.faults, f"{at}:\n{machine.faults}"
    found = oracle.complaints(results[0], *equations(case, dtype), dtype)
    assert not found, f"{at}: {'; '.join(found)}"
    for order, result in zip(orders, results, strict=True):
        other = [name for name in result if not torch.equal(result[name], results[0][name])]
        assert not other, f"{at}: {other} have other bits in {order} order"
