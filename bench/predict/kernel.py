"""The prediction for one launch: bounds of every resource, and the simulated time."""

from __future__ import annotations

import ast
import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton

import kernel_report
from predict import accesses, trips
from predict.machines import Machine
from predict.opcodes import classify, cost
from predict.paths import Items, Repeat, UndeclaredLoop, counted, dispatch_lines, flatten, path
from predict.sass import Function, disassemble, registers
from predict.simulate import Step, simulate, step
from predict.traffic import Traffic
from smolora.kernels import tiles

KERNELS = Path(tiles.__file__).parent
CAP = 16  # iterations of a loop that are simulated; a longer loop is extrapolated from these and half of them
MOST_ALONE = 2.5  # how much faster than its share of the machine one multiprocessor can read


@dataclass(frozen=True)
class Compiled:
    """A launch as it was compiled."""

    function: Function
    registers: int
    shared: int
    tensors: dict[tuple[str, int, bool], set[str]]  # by source line, see accesses.tensors_by_line


@cache
def compiler_cache() -> str:
    """Return a folder for compiled kernels of these sources alone.

    Triton's own cache may hand out a kernel that was compiled from another checkout, or from before lines were added to
    a file: the same code, but with other files and lines in it.
    """
    sources = sorted(KERNELS.glob("*.py"))
    contents = [part for path in sources for part in (str(path).encode(), path.read_bytes())]
    return str(Path(triton.knobs.cache.dir, f"lines-{hashlib.sha256(b'/'.join(contents)).hexdigest()[:16]}"))


@cache
def compile_call(arch: int, launch: kernel_report.Launch) -> Compiled:
    """Compile a launch and read its machine code."""
    folder = compiler_cache()
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        built = kernel_report.compile_launch(arch, launch)
    cubin = built.asm["cubin"]
    ((name, function),) = disassemble(cubin).items()
    lines = accesses.tensors_by_line(built.asm["ttir"])
    return Compiled(function, registers(cubin)[name], built.metadata.shared, lines)


@dataclass(frozen=True)
class Prediction:
    """What the model says of one launch. Times are predictions, in seconds."""

    kernel: str
    tile: str
    grid: tuple[int, ...]
    warps: int
    registers: int
    shared: int  # bytes of a block
    resident: int  # blocks of a multiprocessor at a time
    limited_by: str  # what keeps `resident` from being more
    waves: float
    cycles: dict[str, float]  # of a multiprocessor's average share at perfect overlap, by resource
    simulated: float
    copy: float  # of the bytes of device memory that the launch moves
    memory_bytes: float
    l2_bytes: float
    loop: dict[str, int]  # instructions of the largest loop's iteration, by class
    lines: dict[str, float]  # instructions that a warp runs, by source line
    bound: float
    reads: dict[str, float]  # bytes of device memory, by arguments that share a source line
    writes: dict[str, float]

    @property
    def limiter(self) -> str:
        return max(self.cycles, key=lambda name: self.cycles[name])

    @property
    def of_copy(self) -> float:
        return self.copy / self.simulated

    @property
    def barriers(self) -> int:
        return self.loop.get("barrier", 0)


def kinds_of(call: kernel_report.Call, function: Function) -> list[tuple[int, Items]]:
    """Return the kinds of programs of a launch: how many there are of each, and their path.

    Raises:
        UndeclaredLoop: a loop in machine code has no trip count in `trips.TRIPS`.
    """
    name = call.launch.kernel.name
    arguments = trips.Arguments({**dict(call.launch.constexprs), **call.scalars}, call.grid)
    declared = trips.TRIPS.get(name, {})

    def count(variable: str, statement: ast.For | ast.While | None) -> float:
        if variable in declared:
            return declared[variable](arguments)
        number = trips.of_range(statement, arguments) if isinstance(statement, ast.For) else None
        if number is None:
            raise UndeclaredLoop(f"{name}: declare the trips of its loop over {variable!r} in bench/predict/trips.py")
        return number

    programs = math.prod(call.grid)
    if name not in trips.DISPATCH:
        return [(programs, path(function, count))]
    condition, taken = trips.DISPATCH[name]
    first = int(taken(arguments))
    module = call.launch.kernel.module.rpartition(".")[2]
    file = next(i.file for i in function.instructions if Path(i.file).stem == module)
    body, other = dispatch_lines(file, name, condition)
    return [
        (number, path(function, count, lambda i, absent=absent: i.file == file and i.line in absent))
        for number, absent in ((first, other), (programs - first, body))
        if number > 0
    ]


def simulated_cycles(
    items: Items, machine: Machine, traffic: Traffic, warps: int, resident: int, programs: int
) -> float:
    """Simulate the multiprocessor with the largest share of `programs` blocks."""
    steps: dict[int, Step] = {}

    def run(limit: int) -> tuple[float, int]:
        flat = flatten(items, limit)
        for i in flat:
            if i.address not in steps:
                steps[i.address] = step(i, machine, traffic.access(i))
        return simulate([steps[i.address] for i in flat], machine, warps, resident, blocks, alone).cycles, len(flat)

    share = programs / machine["processors"]
    blocks = math.ceil(share)
    alone = min(MOST_ALONE, 1 / (share - blocks + 1))
    time, length = run(CAP)
    full = round(sum(times for _, times in counted(items)))
    if full <= length:
        return time
    half_time, half_length = run(CAP // 2)
    return time + (time - half_time) * (full - length) / (length - half_length)


def predict(call: kernel_report.Call, machine: Machine, in_l2: frozenset[str] = frozenset()) -> Prediction:
    """Predict a launch; `in_l2` are arguments that an earlier launch left in L2."""
    compiled = compile_call(machine.arch, call.launch)
    warps = dict(call.launch.options)["num_warps"]
    limits = machine.resident_blocks(compiled.registers, warps, compiled.shared)
    resident = min(limits.values())
    if resident < 1:
        raise ValueError(f"{call.launch.kernel.name} [{call.launch.tile()}] fits no multiprocessor: {limits}")
    kinds = kinds_of(call, compiled.function)
    traffic = Traffic(call, compiled.tensors, kinds, warps, in_l2)
    cycles: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    largest: tuple[float, list] = (0.0, [])
    simulated = 0.0
    for number, items in kinds:
        share = number / machine["processors"]
        for instruction, times in counted(items):
            price, access = cost(instruction, machine), traffic.access(instruction)
            work = times * warps * share
            cycles["issue"] += work / 4
            if price.pipe:
                cycles[price.pipe] += work / 4 * price.cycles
            cycles["shared"] += work * price.shared
            way = "L2 written" if classify(instruction) == "store" else "L2 read"
            cycles[way] += work * access.l2_bytes / machine.l2_rate
            cycles["memory"] += work * access.memory_bytes / machine.memory_rate
            lines[f"{Path(instruction.file).name}:{instruction.line}"] += times
        simulated = max(simulated, simulated_cycles(items, machine, traffic, warps, resident, number))
        for item in items:
            if isinstance(item, Repeat):
                largest = max(largest, (len(item.instructions) * item.trips, item.instructions), key=lambda l: l[0])
    if machine.arch < 86:  # fp32 and IMAD share one pipe
        cycles["imad"] += cycles.pop("fp32", 0.0)
    programs = math.prod(call.grid)
    return Prediction(
        kernel=call.launch.kernel.name,
        tile=call.launch.tile(),
        grid=call.grid,
        warps=warps,
        registers=compiled.registers,
        shared=compiled.shared,
        resident=resident,
        limited_by=" and ".join(name for name, value in limits.items() if value == resident),
        waves=programs / (machine["processors"] * resident),
        cycles=dict(cycles.most_common()),
        simulated=machine.seconds(simulated),
        copy=traffic.memory_bytes / machine["memory"],
        memory_bytes=traffic.memory_bytes,
        l2_bytes=traffic.l2_bytes,
        loop=dict(Counter(map(classify, largest[1])).most_common()),
        lines=dict(lines.most_common()),
        bound=machine.seconds(max(cycles.values())),
        reads=traffic.read,
        writes=traffic.written,
    )
