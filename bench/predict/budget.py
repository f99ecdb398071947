"""A budget for the inner loops of the passes over x and g: their instructions and barriers in machine code.

`python bench/throughput.py --budget check` says which loop has gained. `--budget write` renews budget.json, after a
look at why.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import kernel_report
from predict.flow import basic_blocks, natural_loops
from predict.opcodes import classify
from predict.sass import Function, disassemble

FILE = Path(__file__).with_name("budget.json")
GAIN = 1.05  # of instructions, that passes unnoticed
SETTINGS = {"dropout": kernel_report.PLAIN, "no dropout": kernel_report.PLAIN.but(threshold=0)}
COMMAND = "python bench/throughput.py --budget write"


@dataclass(frozen=True)
class Loop:
    """The largest loop of a kernel: instructions and barriers of an iteration."""

    instructions: int
    barriers: int


def largest_loop(function: Function) -> Loop:
    """Count the largest loop of a kernel, without what pads it."""
    loops = natural_loops(basic_blocks(function))
    kinds = [classify(i) for i in max((loop.instructions for loop in loops), key=len, default=[])]
    return Loop(sum(kind != "nothing" for kind in kinds), kinds.count("barrier"))


def count(architectures: Iterable[int]) -> dict[str, Loop]:
    """Compile the main kernels of the paper's setting and count their loops."""
    found = {}
    for arch in architectures:
        for name, setting in SETTINGS.items():
            for launch in kernel_report.launches_for(arch, [setting]):
                if launch.kernel.name in kernel_report.DOTS:
                    cubin = kernel_report.compile_launch(arch, launch).asm["cubin"]
                    (function,) = disassemble(cubin).values()
                    found[f"sm_{arch}, {name}: {launch.kernel.name}"] = largest_loop(function)
    return found


def complaints(found: dict[str, Loop], budget: dict[str, Loop]) -> list[str]:
    """Say which loops have gained more than GAIN of instructions, or a barrier, or have no budget."""
    out = []
    for name, loop in found.items():
        if name not in budget:
            out.append(f"{name} has no budget")
            continue
        allowed = budget[name]
        if loop.instructions > GAIN * allowed.instructions:
            out.append(f"{name}: {loop.instructions} instructions an iteration, budget {allowed.instructions}")
        if loop.barriers > allowed.barriers:
            out.append(f"{name}: {loop.barriers} barriers an iteration, budget {allowed.barriers}")
    return out


def read() -> dict[str, Loop]:
    return {name: Loop(**loop) for name, loop in json.loads(FILE.read_text()).items()}


def write(found: dict[str, Loop]) -> None:
    FILE.write_text(json.dumps({name: asdict(loop) for name, loop in found.items()}, indent=1) + "\n")
