"""The class of every instruction, and what one warp's costs. An instruction without a class is an error.

Unknown mnemonics must not pass for free: a shuffle that is taken for a shift moves the limiter of a kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from predict.machines import Machine
from predict.sass import Instruction

# class: mnemonics. IMAD and HADD2 have classes by their modifiers, see `classify`.
_MNEMONICS = {
    "wgmma": "HGMMA IGMMA QGMMA BGMMA",
    "mma": "HMMA IMMA BMMA",
    "imad": "IMAD",
    "fp32": "FFMA FFMA32I FADD FADD32I FMUL FMUL32I FSWZADD HFMA2 HADD2 HMUL2",
    "fp64": "DADD DFMA DMUL DSETP DMNMX DMMA",
    "logic": "LOP LOP3 PLOP3 SHF SHL SHR SGXT BMSK",
    "compare": "ISETP FSETP FSET SEL FSEL FMNMX IMNMX VIMNMX VIMNMX3 VIADDMNMX HSETP2 HMNMX2 FCHK",
    "permute": "PRMT",
    "add": "IADD IADD3 VIADD LEA IABS VABSDIFF IDP ISCADD",
    "pack": "F2FP I2FP I2IP",
    "convert": "F2F F2I I2F FRND I2I",
    "xu": "MUFU POPC FLO BREV",
    "move": "MOV MOV32I CS2R P2R R2P",
    "special": "S2R",
    "uniform": "UMOV UIADD3 UISETP ULOP3 ULOP ULEA USEL USHF UIMAD UPRMT UFLO UP2UR UR2UP UPLOP3 UBMSK UBREV UPOPC "
    "UF2FP USGXT R2UR S2UR VOTEU REDUX UCLEA",
    "constant": "LDC ULDC",
    "shuffle": "SHFL",
    "vote": "VOTE MATCH",
    "load": "LDG LD",
    "async_copy": "LDGSTS",
    "store": "STG ST",
    "atomic": "RED ATOM ATOMG ATOMS",
    "load_matrix": "LDSM",
    "store_matrix": "STSM",
    "load_shared": "LDS",
    "store_shared": "STS",
    "local": "LDL STL",
    "barrier": "BAR",
    "copy_group": "LDGDEPBAR",
    "wait_copies": "DEPBAR",
    "warpgroup": "WARPGROUP",
    "fence": "MEMBAR FENCE ERRBAR CGAERRBAR CCTL",
    "branch": "BRA EXIT BSSY BSYNC CALL RET BREAK JMP WARPSYNC ENDCOLLECTIVE YIELD BRX BPT",
    "nothing": "NOP NANOSLEEP BMOV",
}
CLASSES = {mnemonic: name for name, mnemonics in _MNEMONICS.items() for mnemonic in mnemonics.split()}
GLOBAL = ("load", "async_copy", "store", "atomic")
# pipes of a sub-partition; "fp32" has a half of its own and may also use the half that IMAD needs
PIPES = ("alu", "imad", "fp32", "tensor", "xu", "uniform", "fp64")


class UnknownInstruction(ValueError):
    """An instruction that has no class."""


def classify(instruction: Instruction) -> str:
    """Return the class of an instruction.

    Raises:
        UnknownInstruction: it has none; CLASSES must be told.
    """
    mnemonic, opcode = instruction.mnemonic, instruction.opcode
    if mnemonic not in CLASSES:
        raise UnknownInstruction(
            f"{opcode} at 0x{instruction.address:x} has no class: add {mnemonic} to bench/predict/opcodes.py"
        )
    if mnemonic == "IMAD" and re.search(r"\.(HI|WIDE)\b", opcode):
        return "imad_wide"
    if mnemonic == "IMAD" and re.search(r"\.(MOV|U32|SHL|IADD)\b", opcode):
        return "imad_move"
    return CLASSES[mnemonic]


@dataclass(frozen=True)
class Cost:
    """What one warp's instruction takes: cycles of a sub-partition's pipe, and of the shared data path."""

    pipe: str = ""
    cycles: float = 0.0
    shared: float = 0.0
    latency: float = 0.0  # of a result with variable latency, from when pipe or data path have taken it


_ALU = ("logic", "compare", "permute", "add", "pack", "move")
_FIXED_PIPES = {
    **dict.fromkeys(_ALU, ("alu", "alu")),
    "special": ("alu", "alu"),
    "imad": ("imad", "imad"),
    "imad_move": ("imad", "imad"),
    "imad_wide": ("imad", "imad_wide"),
    "fp32": ("fp32", "fp32"),
    "fp64": ("fp64", "fp64"),
    "xu": ("xu", "xu"),
    "convert": ("xu", "xu"),
    "uniform": ("uniform", "uniform"),
}
_LATENCY = {
    "special": "shared_latency",
    "xu": "xu_latency",
    "convert": "xu_latency",
    "uniform": "uniform_latency",
    "shuffle": "shuffle_latency",
    "vote": "uniform_latency",
    "load_shared": "shared_latency",
    "store_shared": "shared_latency",
    "load_matrix": "matrix_latency",
    "store_matrix": "matrix_latency",
    "constant": "constant_latency",
    "fp64": "hmma_latency",
}


@cache
def _wgmma_shape(opcode: str) -> int:
    found = re.search(r"\.64x(\d+)x", opcode)
    if found is None:
        raise UnknownInstruction(f"{opcode}: no shape in it")
    return int(found[1])


def a_in_shared_memory(instruction: Instruction) -> bool:
    """Tell whether a wgmma reads its left operand from shared memory."""
    operands = [operand.strip() for operand in instruction.operands.split(",")]
    return len(operands) > 1 and operands[1].startswith("gdesc")


def cost(instruction: Instruction, machine: Machine) -> Cost:
    """Return what an instruction takes on a machine; nothing, if its guard never holds."""
    kind = classify(instruction)
    if instruction.never:
        return Cost()
    latency = machine[_LATENCY[kind]] if kind in _LATENCY else 0.0
    if kind == "wgmma":
        columns = _wgmma_shape(instruction.opcode)
        # a quarter of the warpgroup's operands goes to each of its four warps' instructions: A of 64 x 16, B of 16 x N
        operands = (machine["wgmma_a_shared"] if a_in_shared_memory(instruction) else 0) + 32 * columns / machine[
            "data_path"
        ]
        return Cost("tensor", columns / machine["wgmma_columns"], operands / 4, machine["wgmma_latency"])
    if kind == "mma":
        half = 1.0 if "16816" in instruction.opcode else 0.5
        return Cost("tensor", machine["hmma"] * half, 0.0, machine["hmma_latency"])
    if kind in _FIXED_PIPES:
        pipe, figure = _FIXED_PIPES[kind]
        return Cost(pipe, machine[figure], 0.0, latency)
    line = 128 / machine["data_path"]  # cycles of 4 bytes a thread
    if kind in ("load_matrix", "store_matrix"):
        matrices = re.search(r"88\.(\d)", instruction.opcode)
        count = int(matrices[1]) if matrices else 1
        return Cost("", 0.0, count * line, latency)
    if kind in ("load_shared", "store_shared", *GLOBAL):
        return Cost("", 0.0, max(1, instruction.width / 4) * line, latency)
    if kind == "shuffle":
        return Cost("", 0.0, line, latency)
    if kind == "local":
        return Cost("", 0.0, max(1, instruction.width / 4) * line, machine["l1_latency"])
    return Cost("", 0.0, 0.0, latency)
