"""Kernels with a fault put in, to see that it is found; for the worker's process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import torch
import triton
import triton.language as tl

from support.oracle import Case
from support.ptx import layers, movement
from support.ptx.faults import Faults
from support.ptx.launcher import Launch
from support.ptx.operands import Instruction, nothing
from support.ptx.program import Program

Mutants = Callable[[Program], Iterator[tuple[int, Instruction]]]  # where, and what stands there instead


def without_a_barrier(program: Program) -> Iterator[tuple[int, Instruction]]:
    for i, instruction in enumerate(program.code):
        if instruction.control == "barrier":
            yield i, replace(instruction, control="", run=nothing)


def without_a_fence(program: Program) -> Iterator[tuple[int, Instruction]]:
    """Before a wgmma, which reads by another path than stores write by."""
    for i, instruction in enumerate(program.code):
        if instruction.op[0] == "fence" and "proxy" in instruction.op:
            yield i, replace(instruction, run=nothing)


def waiting_for_less(program: Program) -> Iterator[tuple[int, Instruction]]:
    """Leaves one more group of cp.async under way."""
    for i, instruction in enumerate(program.code):
        if instruction.op[0] == "cp" and "wait_group" in instruction.op:
            left = int(instruction.operands[0]) + 1
            yield i, replace(instruction, run=movement.wait_for_copies(left, instruction.where))


def without_a_mask(program: Program) -> Iterator[tuple[int, Instruction]]:
    """Stores to global memory that all threads run."""
    for i, instruction in enumerate(program.code):
        if instruction.op[:2] == ["st", "global"] and instruction.guard is not None:
            yield i, replace(instruction, guard=None)


MUTANTS: dict[str, Mutants] = {
    "barrier": without_a_barrier,
    "fence": without_a_fence,
    "wait": waiting_for_less,
    "mask": without_a_mask,
}


def unnoticed(which: str, case: Case, dtype: torch.dtype, arch: int, ends: bool) -> dict[str, tuple[int, list[str]]]:
    """For each kernel of a forward and backward, how many mutants it has, and those without a fault or another result.

    Args:
        which: a key of MUTANTS; one instruction is changed at a time.
        ends: run only the first and the last program of a launch.
    """
    machine = layers.machine_for(arch, layers.FEW)
    seen: set[int] = set()
    counts: dict[str, tuple[int, list[str]]] = {}

    def intercept(launch: Launch) -> None:
        tensors = launch.tensors()
        before = [tensor.clone() for tensor in tensors]
        machine.faults = Faults()
        machine.execute(launch)
        assert not machine.faults, machine.faults
        if id(launch.program) in seen:
            return
        seen.add(id(launch.program))
        after = [tensor.clone() for tensor in tensors]
        if ends:  # what these programs alone make of it
            _put(tensors, before)
            machine.execute(launch, ends)
        expected = [tensor.clone() for tensor in tensors]
        number, missed = counts.get(launch.program.name, (0, []))
        for i, instruction in MUTANTS[which](launch.program):
            mutant = copy.copy(launch.program)
            mutant.code = list(mutant.code)
            mutant.code[i] = instruction
            _put(tensors, before)
            machine.faults = Faults()
            machine.execute(launch.but(program=mutant), ends)
            number += 1
            if not machine.faults and all(map(_same_bits, tensors, expected)):
                missed.append(instruction.where)
        counts[launch.program.name] = number, missed
        _put(tensors, after)

    with mock.patch.object(machine, "intercept", intercept):
        layers.run_once(machine, case, dtype)
    return counts


def _put(tensors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.detach().copy_(value)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Poison is NaN, and equals itself here."""
    return torch.equal(a.detach().contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


@triton.jit
def _swapped_share(state, scores_ptr, rows, inside, slot, bank: tl.constexpr, K: tl.constexpr):
    """SMoLoRA's share with alpha and beta swapped."""
    if bank == 0:
        b_share = tl.sigmoid(-state)
    else:
        b_share = tl.sigmoid(state)
    return b_share[:, None]


def with_swapped_shares(case: Case, dtype: torch.dtype, arch: int) -> None:
    """Check a case with alpha and beta swapped."""
    from smolora.kernels.mixes import MIXES

    swapped = MIXES["smolora"]._replace(share=_swapped_share)
    with mock.patch.dict(MIXES, smolora=swapped):
        layers.check(case, dtype, arch)


def with_scale(kernel: str, factor: float, case: Case, dtype: torch.dtype, arch: int) -> None:
    """Check a case where one kernel gets its scale times a factor."""
    machine = layers.machine_for(arch, layers.FEW)

    def intercept(launch: Launch) -> None:
        if launch.program.name == kernel:
            (name,) = {"scale", "scaling"} & launch.arguments.keys()
            launch = launch.but(arguments=launch.arguments | {name: factor * launch.arguments[name]})
        machine.execute(launch)

    with mock.patch.object(machine, "intercept", intercept):
        layers.check(case, dtype, arch)
