"""Machine code as nvdisasm prints it: instructions with their control bits, labels and source lines."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

NOT_SET = 7  # a scoreboard field that names none

_SECTION = re.compile(r"\s*\.section\s+\.text\.([^,\s]+)")
_LABEL = re.compile(r"(\.L_[\w.]+):")
_LINE = re.compile(r'\s*//## File "([^"]+)", line (\d+)(.*)')
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);\s*/\* 0x([0-9a-f]{16}) \*/")
_UPPER_HALF = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/")
_GUARD = re.compile(r"@(!?)(U?P(?:\d+|T))\s+")
_TARGET = re.compile(r"`\((\.L_[\w.]+)\)")


@dataclass(frozen=True)
class Instruction:
    """One instruction and its control bits (105 to 125 of its 128).

    stall: cycles until the warp's next instruction may issue; write, read: the scoreboard released when the result is
    written or the operands are read, or NOT_SET; wait: scoreboards waited for, as a mask.
    """

    address: int
    guard: str  # predicate, "" if there is none; "!PT" never holds
    opcode: str  # with modifiers: LDG.E.128
    operands: str
    stall: int
    yields: bool
    write: int
    read: int
    wait: int
    target: str | None = None  # label that a branch goes to
    file: str = ""  # of the source line
    line: int = 0

    @property
    def mnemonic(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def never(self) -> bool:
        """Whether its guard never holds."""
        return self.guard == "!PT"

    @property
    def width(self) -> int:
        """Bytes of one thread of a load or store."""
        for bits in (128, 64):
            if re.search(rf"\.{bits}\b", self.opcode):
                return bits // 8
        if re.search(r"\.[US]16\b", self.opcode):
            return 2
        return 1 if re.search(r"\.[US]8\b", self.opcode) else 4


@dataclass
class Function:
    """The code of one kernel."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # addresses


def parse(text: str) -> dict[str, Function]:
    """Read the output of `nvdisasm -c -g -hex`; return the kernels by name.

    Raises:
        ValueError: an instruction is not followed by the upper half of its encoding.
    """
    functions: dict[str, Function] = {}
    current: Function | None = None
    waiting: list[str] = []  # labels of the next instruction
    file, line = "", 0
    lines = iter(text.splitlines())
    for row in lines:
        if section := _SECTION.match(row):
            current = functions.setdefault(section[1], Function(section[1]))
            waiting, file, line = [], "", 0
        elif current is None:
            continue
        elif source := _LINE.match(row):
            if "inlined at" not in source[3]:
                file, line = source[1], int(source[2])
        elif label := _LABEL.match(row):
            waiting.append(label[1])
        elif found := _INSTRUCTION.match(row):
            upper = _UPPER_HALF.match(next(lines, ""))
            if upper is None:
                raise ValueError(f"{current.name}: no second half of the instruction at 0x{found[1]}")
            instruction = decode(int(found[1], 16), found[2].strip(), int(upper[1], 16), file, line)
            current.instructions.append(instruction)
            current.labels.update(dict.fromkeys(waiting, instruction.address))
            waiting = []
    return functions


def decode(address: int, text: str, upper: int, file: str = "", line: int = 0) -> Instruction:
    """Read one instruction from its text and the upper 64 bits of its encoding."""
    guard = _GUARD.match(text)
    body = text[guard.end() :] if guard else text
    opcode, _, operands = body.partition(" ")
    target = _TARGET.search(operands)
    control = upper >> 41
    return Instruction(
        address=address,
        guard=f"{guard[1]}{guard[2]}" if guard else "",
        opcode=opcode,
        operands=operands.strip(),
        stall=control & 15,
        yields=not control >> 4 & 1,
        write=control >> 5 & 7,
        read=control >> 8 & 7,
        wait=control >> 11 & 63,
        target=target[1] if target else None,
        file=file,
        line=line,
    )


def tool(name: str) -> str:
    """Return the path of a tool of the CUDA toolkit that comes with Triton."""
    spec = find_spec("triton")
    return str(Path(spec.origin).parent / "backends/nvidia/bin" / name)


def run_on(cubin: bytes, command: Iterable[str]) -> str:
    """Return what a tool prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes) -> dict[str, Function]:
    """Return the kernels in a cubin by name."""
    return parse(run_on(cubin, [tool("nvdisasm"), "-c", "-g", "-hex"]))


def registers(cubin: bytes) -> dict[str, int]:
    """Return the registers of a thread of each kernel in a cubin."""
    text = run_on(cubin, [tool("cuobjdump"), "--dump-resource-usage"])
    return {name: int(count) for name, count in re.findall(r"Function (\S+?):\s*\n\s*REG:(\d+)", text)}
