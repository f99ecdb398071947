"""Predictions for the passes of a layer, and for a layer beside its frozen linear."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernel_report
import roofline
from predict.copy_kernel import copy
from predict.kernel import Prediction, predict
from predict.machines import Machine
from roofline import operand_bytes, partial_bytes
from shapes import SMoLoRACase
from smolora.kernels import passes
from smolora.launch import Card

PASSES = ("route_shrink", "fuse_expand", "grad_output", "grad_input")
THRESHOLD = 256  # steps of dropout's probability


def _storages(tree: Any) -> dict[int, Tensor]:
    """Return the tensors of a tree, one for each storage."""
    return {t.untyped_storage()._cdata: t for t in tree_leaves(tree) if isinstance(t, Tensor)}


class _TorchKernels(TorchDispatchMode):
    """Counts the bytes of operators that run a kernel of torch's: all that make a tensor and no view, `empty` aside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = _storages((args, kwargs))
        made = _storages(result)
        in_place = func._schema.is_mutable
        if "empty" not in func.name() and (in_place or made.keys() - inputs.keys()):
            self.bytes.append(sum(tensor.nbytes for tensor in (inputs | made).values()))
        return result


@dataclass
class PassCalls:
    """What one call of a pass launches."""

    calls: list[kernel_report.Call]
    buffers: list[Tensor]  # that its launches use and that are neither arguments nor results
    torch_bytes: list[int]  # of torch's own kernels


@dataclass(frozen=True)
class PassPrediction:
    """The launches of one pass. Times are predictions, in seconds."""

    name: str
    kernels: tuple[Prediction, ...]
    torch_seconds: tuple[float, ...]
    bytes: float  # operands once, partial results written and read, as bench/passes.py counts them

    @property
    def launches(self) -> int:
        return len(self.kernels) + len(self.torch_seconds)

    @property
    def seconds(self) -> float:
        """The time of its kernels alone."""
        return sum(kernel.simulated for kernel in self.kernels) + sum(self.torch_seconds)

    @property
    def bound(self) -> float:
        """The time if every kernel reached its bound."""
        return sum(kernel.bound for kernel in self.kernels) + sum(self.torch_seconds)

    def share(self, machine: Machine) -> float:
        """Return the time of a copy of its bytes over its own, with the starts of all launches but the first."""
        return self.bytes / machine["memory"] / (self.seconds + (self.launches - 1) * machine["launch"])


def setting(case: SMoLoRACase, dropout: float, parameters: torch.dtype) -> kernel_report.Setting:
    """Return a case of the benchmarks as a setting of bench/kernel_report.py."""
    return kernel_report.Setting(
        r=case.r,
        dtype=getattr(torch, case.dtype),
        parameters=parameters,
        experts=case.vu,
        threshold=round(dropout * THRESHOLD),
        d=case.d,
        k=case.k,
        tokens=case.tokens,
        num_seqs=case.batch,
        bias=case.bias,
    )


def record_passes(s: kernel_report.Setting, machine: Machine) -> dict[str, PassCalls]:
    """Record what every pass of a layer launches on a machine, without a device."""
    found: dict[str, PassCalls] = {}

    def recorded(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            results: list[Any] = []
            with _TorchKernels() as torch_kernels:
                calls = kernel_report.record(lambda: results.append(run(**arguments)))
            used = _storages([list(call.tensors.values()) for call in calls])
            outside = _storages((arguments, results))
            buffers = [tensor for storage, tensor in used.items() if storage not in outside]
            found[name] = PassCalls(calls, buffers, torch_kernels.bytes)
            return results[0]

        return call

    with ExitStack() as stack:
        stack.enter_context(
            kernel_report.on_card(Card((machine.arch // 10, machine.arch % 10), int(machine["processors"])))
        )
        for name in PASSES:
            stack.enter_context(mock.patch.object(passes, name, recorded(name, getattr(passes, name))))
        kernel_report.run_layer(s)
    return found


def predict_pass(name: str, made: PassCalls, case: SMoLoRACase, machine: Machine) -> PassPrediction:
    """Predict the launches of a pass, one after another; what a launch leaves in L2, the next ones find there."""
    kernels: list[Prediction] = []
    moved = 0.0  # bytes of device memory up to here
    written: dict[int, float] = {}  # `moved` before the launch that wrote a storage
    for call in made.calls:
        storages = {argument: tensor.untyped_storage()._cdata for argument, tensor in call.tensors.items()}
        in_l2 = frozenset(
            argument
            for argument, storage in storages.items()
            if storage in written and moved - written[storage] < machine["l2_bytes"] / 2
        )
        prediction = predict(call, machine, in_l2)
        kernels.append(prediction)
        written |= {storages[argument]: moved for arguments in prediction.writes for argument in arguments.split()}
        moved += prediction.memory_bytes
    return PassPrediction(
        name=name,
        kernels=tuple(kernels),
        torch_seconds=tuple(number / machine["memory"] for number in made.torch_bytes),
        bytes=operand_bytes(case, name) + partial_bytes(case, name, made.buffers),
    )


@dataclass(frozen=True)
class LayerPrediction:
    """One layer, forward and backward. Times are predictions, in seconds."""

    case: SMoLoRACase
    dropout: float
    parameters: str
    passes: tuple[PassPrediction, ...]
    linear: float

    def adapter(self, machine: Machine) -> float:
        return sum(p.seconds + p.launches * machine["launch"] for p in self.passes)

    def over_linear(self, machine: Machine) -> float:
        """Return the layer's time over its frozen linear's."""
        return 1 + self.adapter(machine) / self.linear

    def bound_over_linear(self, machine: Machine) -> float:
        """Return the same if every kernel reached its bound."""
        return 1 + sum(p.bound + p.launches * machine["launch"] for p in self.passes) / self.linear


def linear_seconds(case: SMoLoRACase, machine: Machine) -> float:
    """Return the time of the frozen linear, forward and dx."""
    peaks = roofline.MachinePeaks(machine.name, machine["memory"], machine["matrix_rate"])
    return sum(work.seconds(peaks) for work in roofline.base(case).values())


def predict_layer(
    case: SMoLoRACase, machine: Machine, dropout: float, parameters: str = "bfloat16", only: tuple[str, ...] = PASSES
) -> LayerPrediction:
    """Predict a layer's passes, or those of `only`, at a dropout, with parameters of a dtype."""
    made = record_passes(setting(case, dropout, getattr(torch, parameters)), machine)
    predicted = tuple(predict_pass(name, made[name], case, machine) for name in only)
    return LayerPrediction(case, dropout, parameters, predicted, linear_seconds(case, machine))


def predict_copy(machine: Machine) -> Prediction:
    """Predict a plain copy of 268 MB."""
    (call,) = kernel_report.record(lambda: copy(programs=2048, iterations=16, block=4096))
    return predict(call, machine)
