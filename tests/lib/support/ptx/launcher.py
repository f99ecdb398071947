"""Launches of Triton kernels on CPU tensors: compiled to PTX for a card, and executed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.cache import triton_key
from triton.runtime.jit import JITFunction, create_function_from_signature

from smolora.launch import Card
from support.ptx.block import Block
from support.ptx.faults import Faults
from support.ptx.memory import GlobalMemory, Segment
from support.ptx.program import Program

CACHE = Path(__file__).parents[4] / "build/ptx"
# shared memory that one block may use, in bytes (CUDA programming guide, compute capabilities)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
GRID = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Launch:
    """What a kernel was launched with."""

    program: Program
    grid: tuple[int, int, int]
    arguments: dict[str, Any]  # by name, tuples as they were given, without what is compiled in

    def but(self, **changes: Any) -> Launch:
        return replace(self, **changes)

    def values(self) -> list[tuple[str, Any]]:
        """The arguments one by one, those of a tuple under its name."""
        flat = []
        for name, value in self.arguments.items():
            flat += [(name, each) for each in (value if isinstance(value, tuple) else (value,)) if each is not None]
        return flat

    def tensors(self) -> list[Tensor]:
        return [value for _, value in self.values() if isinstance(value, Tensor)]


class Machine:
    """A card in the CPU's place: it compiles for an architecture and runs what is launched.

    Args:
        arch: 80 or 90.
        processors: how many the launchers see; more of them give more splits and smaller chunks.
    """

    def __init__(self, arch: int, processors: int = 4) -> None:
        self.arch = arch
        self.card = Card((arch // 10, arch % 10), processors)
        self.target = GPUTarget("cuda", arch, 32)
        self.backend = make_backend(self.target)
        self.order = "forward"  # of a launch's programs: "forward", "reverse" or "shuffled"
        self.faults = Faults()
        self.intercept: Callable[[Launch], None] | None = None  # is called in place of `execute`
        self._binders: dict[JITFunction, Callable] = {}
        self._programs: dict[str, Program] = {}

    def launch(self, kernel: JITFunction, *arguments: Any, grid: tuple[int, ...], **keywords: Any) -> None:
        """Stand in for `JITFunction.run`: specialise and compile as Triton does, then execute."""
        if kernel not in self._binders:
            self._binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        keywords.pop("warmup")
        bound, specialization, options = self._binders[kernel](*arguments, **keywords)
        options, signature, constants, attributes = kernel._pack_args(
            self.backend, keywords, bound, specialization, options
        )
        source = ASTSource(kernel, signature, constants, attributes)
        passed = {name: bound[name] for name, kind in signature.items() if kind != "constexpr"}
        passed = {name: _without_compiled_in(value, signature[name]) for name, value in passed.items()}
        launch = Launch(self.compile(source, options), (*grid, 1, 1)[:3], passed)
        (self.intercept or self.execute)(launch)

    def compile(self, source: ASTSource, options: Any) -> Program:
        """The program, from `build/ptx` where it has been compiled before."""
        key = "-".join([triton_key(), source.hash(), self.backend.hash(), options.hash()])
        key = hashlib.sha256(key.encode()).hexdigest()[:24]
        if key not in self._programs:
            path = CACHE / f"{source.name}-{self.arch}-{key}.json"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_suffix(f".{os.getpid()}")
                part.write_text(json.dumps(self._compile(source, options)))
                part.rename(path)
            made = json.loads(path.read_text())
            self._programs[key] = Program(made["ptx"], made["shared"])
        return self._programs[key]

    def _compile(self, source: ASTSource, options: Any) -> dict[str, Any]:
        """Run Triton's stages up to PTX; `triton.compile` would go on to the machine code."""
        context = ir.context()
        ir.load_dialects(context)
        self.backend.load_dialects(context)
        functions = self.backend.get_codegen_implementation(options)
        module = source.make_ir(self.target, options, functions, self.backend.get_module_map(), context)
        stages: dict[str, Callable] = {}
        self.backend.add_stages(stages, options, source.language)
        metadata = {"target": self.target, **options.__dict__}
        for stage in ("ttir", "ttgir", "llir", "ptx"):
            module = stages[stage](module, metadata)
        assert not metadata["global_scratch_size"] and not metadata["profile_scratch_size"]
        return {"ptx": module, "shared": metadata["shared"]}

    def execute(self, launch: Launch, ends: bool = False) -> None:
        """Run every program of a launch one after another, or only the first and the last."""
        program, grid = launch.program, launch.grid
        if not all(0 < size <= most for size, most in zip(grid, GRID, strict=True)):
            self.faults.add("a grid that a card refuses", f"{program.name}: {grid}")
        if program.shared > SHARED_MEMORY[self.arch]:
            self.faults.add("more shared memory than a block may have", f"{program.name}: {program.shared} bytes")
        segments = {}
        for name, tensor in ((n, v) for n, v in launch.values() if isinstance(v, Tensor)):
            storage = tensor.untyped_storage()
            if storage.nbytes():
                segments.setdefault(storage.data_ptr(), Segment(storage, tensor.dtype, name))
        memory = GlobalMemory(list(segments.values()), self.faults)
        words = [_word(value) for _, value in launch.values()]
        words += [np.uint64(0)] * (len(program.parameters) - len(words))  # the scratch that nothing needs
        parameters = dict(zip(program.parameters, words, strict=True))
        positions = list(itertools.product(*map(range, grid)))
        if ends and len(positions) > 2:
            positions = [positions[0], positions[-1]]
        if self.order == "reverse":
            positions.reverse()
        elif self.order == "shuffled":
            random.Random(len(positions)).shuffle(positions)
        with np.errstate(all="ignore"):
            for number, position in enumerate(positions):
                Block(program, number, position, grid, parameters, memory, self.faults).run()


def _without_compiled_in(value: Any, kind: Any) -> Any:
    """A tuple's elements that are no constants."""
    if not isinstance(kind, tuple):
        return value
    return tuple(each for each, its in zip(value, kind, strict=True) if its != "constexpr")


def _word(value: Any) -> np.unsignedinteger:
    """An argument as a parameter's bits."""
    if isinstance(value, Tensor):
        return np.uint64(value.data_ptr())
    if isinstance(value, float):
        return np.float32(value).view(np.uint32)
    return np.int32(value).view(np.uint32) if -(2**31) <= value < 2**31 else np.int64(value).view(np.uint64)


@contextmanager
def installed(machine: Machine) -> Iterator[Machine]:
    """Send every launch to the machine; backend "triton" then takes CPU tensors of every dtype."""
    from smolora import backends
    from smolora.kernels import fuse_expand, grad_input, grad_output, products, route_shrink

    with ExitStack() as stack:
        put = lambda owner, name, value: stack.enter_context(mock.patch.object(owner, name, value))  # noqa: E731
        put(JITFunction, "run", lambda kernel, *arguments, **keywords: machine.launch(kernel, *arguments, **keywords))
        for module in (fuse_expand, grad_input, grad_output, products, route_shrink):
            put(module, "card_of", lambda device: machine.card)
        for name in ("_unsupported_reason", "_unavailable_reason"):
            put(backends, name, lambda *_: None)
        yield machine
