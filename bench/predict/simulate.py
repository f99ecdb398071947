"""One multiprocessor, simulated: the warps of its resident blocks issue their instructions in order.

An instruction issues when the stall count before it has run out, the scoreboards it waits for are clear, and its pipe
and the sub-partition's issue slot are free. The data path of shared memory and L1, L2 and device memory are servers
with a rate and a latency. When a block ends, the next one of the multiprocessor's share takes its place.

Left out, all of which would make it slower: bank conflicts, L2 misses of what should hit, the turns of DRAM between
reads and writes, power limits, and the time to hand out blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from predict.machines import Machine
from predict.opcodes import PIPES, classify, cost
from predict.sass import NOT_SET, Instruction

# kinds of instruction that the simulation treats apart
PLAIN, WGMMA, LOAD, ASYNC_COPY, STORE, COPY_GROUP, WAIT_COPIES, WAIT_WGMMA, BARRIER = range(9)
_KINDS = {
    "wgmma": WGMMA,
    "load": LOAD,
    "atomic": LOAD,
    "async_copy": ASYNC_COPY,
    "store": STORE,
    "copy_group": COPY_GROUP,
    "barrier": BARRIER,
}
_GLOBAL = (LOAD, ASYNC_COPY, STORE)
_QUEUE = 24.0  # cycles of the data path that may wait in its queue before issue stops
_BACKLOG = 1500.0  # cycles of device memory that may be outstanding
_SHARED_SKEW = 37  # cycles between the starts of a multiprocessor's blocks
_FP32, _IMAD, _TENSOR = PIPES.index("fp32"), PIPES.index("imad"), PIPES.index("tensor")


@dataclass(frozen=True)
class Access:
    """Where a global memory instruction of one warp goes."""

    l2_bytes: float = 0.0
    memory_bytes: float = 0.0
    first_level: bool = False  # served by L1

    @property
    def from_memory(self) -> bool:
        """Whether most of it comes from device memory."""
        return 2 * self.memory_bytes > self.l2_bytes


@dataclass(frozen=True)
class Step:
    """An instruction with all that the simulation needs of it."""

    kind: int
    pipe: int  # -1: none
    cycles: float
    shared: float
    latency: float
    waits: tuple[int, ...]
    write: int
    read: int
    stall: float
    access: Access
    depth: int = 0  # groups that may be left, of a wait


def step(instruction: Instruction, machine: Machine, access: Access) -> Step:
    """Prepare an instruction for the simulation."""
    name = classify(instruction)
    kind = _KINDS.get(name, PLAIN)
    depth = 0
    stall = float(max(1, instruction.stall))
    if name == "wait_copies" and instruction.opcode.startswith("DEPBAR.LE"):
        kind, depth = WAIT_COPIES, int(instruction.operands.split(",")[1].strip(), 16)
    elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        kind, depth = WAIT_WGMMA, int(instruction.operands.split(",")[1].strip(), 16)
    elif name == "fence":
        stall = max(stall, machine["fence_latency"])
    elif kind in (LOAD, ASYNC_COPY, STORE) and instruction.never:
        kind = PLAIN
    if name == "wgmma" and "gsb0" in instruction.operands:
        depth = 1  # it ends a group
    price = cost(instruction, machine)
    latency = machine["barrier_latency"] if kind == BARRIER else price.latency
    if kind in (LOAD, ASYNC_COPY):
        where = "l1" if access.first_level else "memory" if access.from_memory else "l2"
        latency = machine[f"{where}_latency"]
    return Step(
        kind=kind,
        pipe=PIPES.index(price.pipe) if price.pipe else -1,
        cycles=price.cycles,
        shared=price.shared,
        latency=latency,
        waits=tuple(b for b in range(6) if instruction.wait >> b & 1),
        write=instruction.write if instruction.write != NOT_SET else -1,
        read=instruction.read if instruction.read != NOT_SET else -1,
        stall=stall,
        access=access,
        depth=depth,
    )


class _Warp:
    __slots__ = ("at", "block", "copies", "free", "groups", "part", "pending", "ready", "wgmma", "wgmma_groups")

    def __init__(self, block: int, part: int, ready: float) -> None:
        self.block = block
        self.part = part
        self.ready = ready  # when the stall count has run out
        self.at = 0
        self.free = [0.0] * 6  # when each scoreboard is clear
        self.pending = 0.0  # when the copies of the open group are done
        self.groups: list[float] = []
        self.wgmma = 0.0
        self.wgmma_groups: list[float] = []


@dataclass(frozen=True)
class Simulated:
    """What the simulation of one multiprocessor gave: cycles until all is written, and instructions issued."""

    cycles: float
    issued: int


def simulate(
    steps: Sequence[Step],
    machine: Machine,
    warps: int,
    resident: int,
    blocks: int,
    alone: float = 1.0,
) -> Simulated:
    """Run `blocks` blocks of `warps` warps, `resident` at a time, each warp all of `steps`.

    Args:
        alone: factor of the memory rates while the last block is by itself because few multiprocessors have one left.
    """
    # what the loop reads often, as tuples in local names
    program = [
        (s.kind, s.pipe, s.cycles, s.shared, s.latency, s.write, s.read, s.stall, s.access, s.depth) for s in steps
    ]
    length = len(program)
    memory_cycle, l2_cycle = 1 / machine.memory_rate, 1 / machine.l2_rate
    two_halves = machine.arch >= 86  # fp32 has a pipe of its own beside the one that it shares with IMAD
    pipes = [[0.0] * len(PIPES) for _ in range(4)]
    slots = [0.0] * 4
    shared = l2 = l2_written = memory = memory_read = 0.0  # when each server is free
    events: list[tuple[float, int, _Warp]] = []
    order = 0
    left = {}  # warps of a block that have not ended
    arrived: dict[int, list[_Warp]] = {}
    started = issued = 0
    ended = 0.0

    def start(block: int, now: float) -> None:
        nonlocal order
        left[block], arrived[block] = warps, []
        for index in range(warps):
            order += 1
            # sub-partitions take warps in turn
            heappush(events, (now, order, _Warp(block, (block * warps + index) % 4, now)))

    while started < min(resident, blocks):
        start(started, float(started * _SHARED_SKEW))
        started += 1
    while events:
        now, _, warp = heappop(events)
        kind, pipe, cycles, data, latency, write, read, stall, access, depth = program[warp.at]
        part = warp.part
        mine = pipes[part]
        # ---- when it issues; waiting for the issue slot or for a queue is first come, first served
        at = slots[part] if slots[part] > now else now
        if pipe >= 0:
            if pipe == _FP32:
                busy = min(mine[_FP32], mine[_IMAD]) if two_halves else mine[_IMAD]
            elif pipe == _TENSOR and kind == WGMMA:
                busy = mine[_TENSOR] - 2 * cycles  # it has a queue
            else:
                busy = mine[pipe]
            if busy > at:  # others may issue before
                order += 1
                heappush(events, (busy, order, warp))
                continue
        slots[part] = at + 1.0
        issued += 1
        if data and kind != WGMMA and shared - at > _QUEUE:
            at = shared - _QUEUE
        if kind in _GLOBAL:
            queue = max(memory, l2_written) if kind == STORE else max(memory_read, l2) if access.from_memory else l2
            if queue - _BACKLOG > at:
                at = queue - _BACKLOG
        done = at
        if pipe >= 0:
            if pipe == _FP32:
                if two_halves:
                    half = _FP32 if mine[_FP32] <= mine[_IMAD] else _IMAD
                    mine[half] = max(mine[half], at) + 2.0 * cycles
                else:
                    mine[_IMAD] = at + cycles
            elif pipe == _TENSOR:
                mine[_TENSOR] = max(mine[_TENSOR], at) + cycles
                done = mine[_TENSOR] + latency
            else:
                mine[pipe] = at + cycles
                done = at + latency
        elif latency:
            done = at + latency
        if data:
            shared = max(shared, at) + data
            if kind != WGMMA:
                done = shared + latency
        if kind in _GLOBAL:
            if not access.first_level:
                scale = 1.0
                if alone != 1.0 and started == blocks and len(left) == 1:
                    scale = 1.0 / alone
                device = access.memory_bytes * memory_cycle * scale
                if device:
                    memory = max(memory, at) + device
                if kind == STORE:
                    l2_written = max(l2_written, at) + access.l2_bytes * l2_cycle * scale
                else:
                    l2 = max(l2, at) + access.l2_bytes * l2_cycle * scale
                    done = max(done, l2 + latency)
                    if device:  # ahead of writes, which L2 can hold back
                        memory_read = max(memory_read, at) + device
                        if access.from_memory:
                            done = max(done, memory_read + latency)
            if kind == ASYNC_COPY and done > warp.pending:
                warp.pending = done
        elif kind == WGMMA:
            done = max(done, shared + latency)
            warp.wgmma = max(warp.wgmma, done)
            if depth:
                warp.wgmma_groups.append(warp.wgmma)
        elif kind == COPY_GROUP:
            warp.groups.append(max(warp.pending, at))
            warp.pending = 0.0
        if write >= 0 and kind != COPY_GROUP:
            warp.free[write] = max(warp.free[write], done, at + 4.0)
        if read >= 0:
            warp.free[read] = max(warp.free[read], at + 8.0, shared if data else 0.0)
        warp.at += 1
        if warp.at == length:
            block = warp.block
            left[block] -= 1
            if not left[block]:
                del left[block], arrived[block]
                if started < blocks:
                    start(started, at + 1.0)
                    started += 1
            ended = max(ended, at)
            continue
        warp.ready = at + stall
        if kind == BARRIER:
            waiting = arrived[warp.block]
            waiting.append(warp)
            if len(waiting) < left[warp.block]:
                continue
            arrived[warp.block] = []
            released = waiting
            for other in released:
                other.ready = max(other.ready, at + latency)
        else:
            released = [warp]
        # ---- when each warp's next instruction may be tried
        for other in released:
            following = steps[other.at]
            ready = other.ready
            free = other.free
            for board in following.waits:
                if free[board] > ready:
                    ready = free[board]
            next_kind = following.kind
            if next_kind == WAIT_COPIES:
                groups = other.groups
                if len(groups) > following.depth:
                    cut = len(groups) - following.depth
                    ready = max(ready, *groups[:cut])
                    other.groups = groups[cut:]
            elif next_kind == WAIT_WGMMA:
                groups = other.wgmma_groups
                if len(groups) > following.depth:
                    cut = len(groups) - following.depth
                    ready = max(ready, *groups[:cut])
                    other.wgmma_groups = groups[cut:]
            order += 1
            heappush(events, (ready, order, other))
    return Simulated(max(ended, memory, l2, l2_written), issued)
