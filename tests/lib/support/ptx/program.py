"""A kernel's PTX, parsed into instructions that a block can run."""

from __future__ import annotations

import re

import numpy as np

from support.ptx import arithmetic, movement, tensor_cores  # noqa: F401  they fill OPCODES
from support.ptx.operands import BITS, OPCODES, TYPES, Builder, Instruction, Run, nothing, size_of

CONTROL = {"bra": "branch", "ret": "exit", "exit": "exit"}


class Program:
    """A kernel: its instructions, the types of its registers, and what a launch must give it."""

    def __init__(self, ptx: str, shared: int) -> None:
        self.shared = shared  # bytes
        ptx = re.sub(r"//[^\n]*", "", ptx)
        head = re.search(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{", ptx, re.DOTALL)
        if head is None:
            raise ValueError("PTX without an entry")
        self.name = head[1]
        self.parameters = re.findall(r"(\w+)\s*(?:,|$)", head[2].strip())
        threads = re.search(r"\.reqntid\s+(\d+)", head[3])
        if threads is None:
            raise ValueError(f"{self.name} does not say how many threads it has")
        self.threads = int(threads[1])
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.slots: dict[str, int] = {}
        self.kinds: list[type] = []
        for statement in _statements(ptx[head.end() :]):
            self._add(statement)
        for instruction in self.code:
            if instruction.control == "branch" and instruction.operands[0] not in self.labels:
                raise ValueError(f"{self.name}: no label {instruction.operands[0]}")

    def _add(self, statement: str) -> None:
        statement = statement.lstrip("{} ")  # of a block with registers of its own, which stands for new ones
        if not statement:
            return
        if statement.endswith(":"):
            self.labels[statement[:-1]] = len(self.code)
            return
        declared = re.fullmatch(r"\.reg \.(\w+) (.+)", statement)
        if declared:
            kind = np.bool_ if declared[1] == "pred" else BITS[size_of(TYPES[declared[1]])]
            many = re.fullmatch(r"(%\w+)<(\d+)>", declared[2])
            for name in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else declared[2].split(", "):
                self.slots[name] = len(self.kinds)
                self.kinds.append(kind)
            return
        where = f"{self.name}:{len(self.code)}: {statement[:80]}"
        guard = None
        guarded = re.fullmatch(r"@(!?)(%p\d+) (.*)", statement)
        if guarded:
            guard, statement = (self.slots[guarded[2]], bool(guarded[1])), guarded[3]
        name, _, rest = statement.partition(" ")
        op, operands = name.split("."), _operands(rest)
        control, run = CONTROL.get(op[0], ""), nothing
        if op[0] in ("bar", "barrier"):
            control = "barrier"
            if "sync" not in op or operands != ["0"]:
                raise NotImplementedError(f"the executor does not know {statement!r} of {where}")
        elif not control:
            run = self.build(op, operands, statement, where)
        self.code.append(Instruction(op, operands, guard, statement, where, run, control))

    def build(self, op: list[str], operands: list[str], text: str, where: str) -> Run:
        """What an instruction does."""
        build = Builder(op, operands, text, where, self.slots, self.kinds)
        if op[0] not in OPCODES:
            raise build.unknown()
        try:
            return OPCODES[op[0]](build)
        except (KeyError, ValueError, IndexError) as error:  # a form that nobody met yet
            raise build.unknown() from error


def _statements(text: str) -> list[str]:
    """The statements of a body whose opening brace is behind, up to its end; labels end in a colon."""
    depth, end = 1, 0
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    body = re.sub(r"^\s*\.(?:loc|file|pragma)\b[^\n]*$", "", text[: end - 1], flags=re.MULTILINE)
    body = re.sub(r"^\s*([$\w]+:)\s*$", r"\1;", body, flags=re.MULTILINE)
    return [" ".join(each.split()) for each in body.split(";") if each.strip()]


def _operands(text: str) -> list[str]:
    """Split at the commas that are outside of braces and brackets."""
    return [each.strip() for each in re.split(r",(?![^{\[]*[}\]])", text) if each.strip()]
