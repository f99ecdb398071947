"""Predictions for one captured decode step: the chain of waits of `decode_kernel`'s slowest block.

A decode step moves little and computes less, so what it takes is latency. The chain follows csrc/decode.cu and
decode.cuh stage by stage, with their constants; `STRUCTURE` says which of its parts are laid out how, and is changed
with the code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from predict.machines import Machine
from smolora.engine.cuda_passes import decode_outputs
from smolora.launch import cdiv

CSRC = Path(__file__).parents[2] / "csrc"
ITEM = 2  # bytes of a weight
FMA = 4  # cycles of a dependent floating-point instruction
OVERHEAD = 100  # cycles of addresses and branches of a stage


@dataclass(frozen=True)
class Model:
    """The sizes of a language model that a decode step depends on."""

    hidden: int
    ffn: int
    layers: int
    vocabulary: int


# as bench/whole_model.py has them
MODELS = {"llava-7b": Model(4096, 11008, 32, 32064), "llava-13b": Model(5120, 13824, 40, 32064)}


@dataclass(frozen=True)
class Structure:
    """How csrc/decode.cu is laid out."""

    forked: bool = False  # the half that reads x and weights alone is a launch beside the base's product
    keeps_B: bool = False  # rows of B that w was made of stay in shared memory for `expand`
    rows_ahead: bool = False  # the next expert's row of B is loaded before the last one is used
    tokens_ahead: bool = False  # the next tokens of an item of A x are loaded before the last ones are reduced


STRUCTURE = Structure(forked=True, rows_ahead=True)


@cache
def constant(file: str, name: str) -> int:
    """Return a constant of csrc/ that is a number."""
    found = re.search(rf"constexpr int {name} = (\d+);", (CSRC / file).read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"csrc/{file} has no `constexpr int {name} = <number>;`")
    return int(found[1])


@dataclass(frozen=True)
class Projection:
    """One adapted linear of a decode step."""

    d: int
    k: int
    blocks: int  # of the grid that it has
    together: int  # that share the launch


def chain(p: Projection, n: int, r: int, experts: int, machine: Machine, structure: Structure) -> dict[str, float]:
    """Return the stages that a projection's slowest block waits for, in seconds, in their order.

    Args:
        n: sequences of one token each, whose experts are known.
        r, experts: rank, and experts of each of the two banks.
    """
    threads = constant("decode.cuh", "kThreads")
    loads, parts = constant("decode.cuh", "kLoads"), constant("decode.cuh", "kParts")
    tokens_at_once = constant("decode.cuh", "kTokens")
    kslice, group = constant("params.h", "kDecodeInputs"), min(constant("decode.cuh", "kGroup"), n)
    warps = threads // 32
    memory, l2, shared = machine["memory_latency"], machine["l2_latency"], machine["shared_latency"]
    shuffle, barrier = machine["shuffle_latency"], machine["barrier_latency"] + OVERHEAD / 4
    used = min(2 * experts, 2 * n)
    outputs = decode_outputs(p.k)
    k_slices, d_slices = cdiv(p.k, outputs), cdiv(p.d, kslice)
    dots = cdiv(used * r, warps) * d_slices
    steps = cdiv(outputs, threads // 4)
    batches = cdiv(used * steps, loads)
    k_item = memory + barrier + batches * memory + used * (3 * shuffle + steps * 16 * FMA) + 2 * barrier + 8 * shared
    users = cdiv(cdiv(n, experts), tokens_at_once)  # turns of an item of A x
    turn = 5 * shuffle + 40 * FMA
    again = max(turn, l2) if structure.tokens_ahead else turn + l2
    d_item = memory + turn + (users - 1) * again
    rounds = max(0, cdiv(k_slices + dots, p.blocks) - 1)
    find = 3 * barrier + OVERHEAD
    before = find + k_item + rounds * d_item
    add_w = cdiv(cdiv(k_slices, warps), parts) * l2 + 2 * barrier + 8 * shared
    sums = cdiv(group * 2 * r, threads) * cdiv(d_slices, parts) * l2
    mix = sums + cdiv(group, warps) * (6 * shuffle + 1.5 * OVERHEAD) + 3 * barrier
    rows = min(experts, n)
    row = group * 4 * (shared + 2 * FMA) / rows  # of one expert, with its users
    if structure.keeps_B:
        slot = rows * row
    elif structure.rows_ahead:
        slot = l2 + (rows - 1) * max(l2, row) + row
    else:
        slot = rows * (l2 + row)
    expand = 2 * slot + OVERHEAD
    cycles = {"add_up_w": add_w, "mix": mix, "expand": expand}
    after = {name: machine.seconds(value) for name, value in cycles.items()}
    if structure.forked:  # the base's product has the memory's rate to itself otherwise
        moved = p.together * used * r * (p.d + p.k) * ITEM
        return {
            "weights beside the base": moved / machine["memory"],
            "find experts": machine.seconds(l2 + find),
            **after,
        }
    return {"before the barrier": machine.seconds(before), "barrier": machine["grid_barrier"], **after}


@dataclass(frozen=True)
class DecodePrediction:
    """One decode step of a whole model. Times are predictions, in seconds."""

    sequences: int
    stages: dict[str, dict[str, float]]  # of the launches of a layer
    adapter: float  # of all layers
    step: float  # without an adapter

    @property
    def of_none(self) -> float:
        """The step's time without an adapter over that with it."""
        return self.step / (self.step + self.adapter)


def base_bytes(model: Model) -> int:
    """Return the bytes of weights that a decode step reads: attention, FFN and the output projection."""
    per_layer = 4 * model.hidden**2 + 3 * model.hidden * model.ffn
    return ITEM * (model.layers * per_layer + model.hidden * model.vocabulary)


def predict_decode(
    model: Model, sequences: int, machine: Machine, r: int = 16, experts: int = 4, structure: Structure = STRUCTURE
) -> DecodePrediction:
    """Predict a step in which gate and up share a launch and down has its own; a launch has two blocks a processor.

    Args:
        experts: of each of the two banks.
    """
    blocks = 2 * int(machine["processors"])
    launches = {
        "gate and up": Projection(model.hidden, model.ffn, blocks // 2, 2),
        "down": Projection(model.ffn, model.hidden, blocks, 1),
    }
    stages = {name: chain(p, sequences, r, experts, machine, structure) for name, p in launches.items()}
    starts = len(launches) * machine["launch"]
    adapter = model.layers * (starts + sum(sum(each.values()) for each in stages.values()))
    return DecodePrediction(sequences, stages, adapter, base_bytes(model) / machine["memory"])
