"""Control flow: basic blocks, dominators and natural loops of a kernel."""

from __future__ import annotations

from dataclasses import dataclass, field

from predict.sass import Function, Instruction

# A warp goes on at the next instruction after these, and does not otherwise.
_LEAVES = ("EXIT", "RET", "BRX", "JMX")
_ENDS = (*_LEAVES, "BRA", "BREAK", "BSYNC", "CALL")


@dataclass(eq=False)
class Block:
    """Instructions that run one after another, and the blocks that may follow."""

    index: int
    instructions: list[Instruction]
    next: list[Block] = field(default_factory=list)

    @property
    def start(self) -> int:
        return self.instructions[0].address


@dataclass(eq=False)
class Loop:
    """A natural loop: its head dominates its blocks, and branches go back to the head from `tails`."""

    head: Block
    tails: list[Block]
    blocks: set[Block]
    parent: Loop | None = None

    @property
    def instructions(self) -> list[Instruction]:
        return [i for block in sorted(self.blocks, key=lambda b: b.index) for i in block.instructions]

    @property
    def source(self) -> tuple[str, int]:
        """File and line of the branch that closes the loop."""
        branch = self.tails[-1].instructions[-1]
        return branch.file, branch.line


def basic_blocks(function: Function) -> list[Block]:
    """Cut a kernel into basic blocks; the first one is the entry."""
    starts = set(function.labels.values())
    blocks: list[Block] = []
    for instruction in function.instructions:
        ended = blocks and blocks[-1].instructions[-1].mnemonic in _ENDS
        if not blocks or ended or instruction.address in starts:
            blocks.append(Block(len(blocks), []))
        blocks[-1].instructions.append(instruction)
    at = {block.start: block for block in blocks}
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        last = block.instructions[-1]
        # `BRA.U UP0, ...` and `BRA P0, ...` have a condition among their operands
        condition = last.guard or (last.mnemonic == "BRA" and not last.operands.startswith("`"))
        if last.mnemonic == "BRA" and last.target:
            block.next.append(at[function.labels[last.target]])
        if following is not None and (condition or last.mnemonic not in (*_LEAVES, "BRA")):
            block.next.append(following)
    return blocks


def dominators(blocks: list[Block]) -> dict[Block, set[Block]]:
    """Return for each reachable block the blocks that every way to it goes through, itself included."""
    before: dict[Block, list[Block]] = {block: [] for block in blocks}
    reachable, stack = {blocks[0]}, [blocks[0]]
    while stack:
        block = stack.pop()
        for following in block.next:
            before[following].append(block)
            if following not in reachable:
                reachable.add(following)
                stack.append(following)
    dominate = {block: {block} if block is blocks[0] else set(reachable) for block in blocks if block in reachable}
    changed = True
    while changed:
        changed = False
        for block, known in dominate.items():
            if block is blocks[0]:
                continue
            new = set.intersection(*(dominate[b] for b in before[block])) | {block}
            if new != known:
                dominate[block], changed = new, True
    return dominate


def natural_loops(blocks: list[Block]) -> list[Loop]:
    """Return the loops in the order of their heads, with the innermost loop around each as its parent.

    The branch to itself that pads the end of a kernel is no loop.
    """
    dominate = dominators(blocks)
    before: dict[Block, list[Block]] = {block: [] for block in dominate}
    for block in dominate:
        for following in block.next:
            before[following].append(block)
    loops: dict[Block, Loop] = {}
    for tail in dominate:
        for head in tail.next:
            if head not in dominate[tail]:
                continue
            loop = loops.setdefault(head, Loop(head, [], {head}))
            loop.tails.append(tail)
            stack = [tail]
            while stack:
                block = stack.pop()
                if block not in loop.blocks:
                    loop.blocks.add(block)
                    stack += before[block]
    found = sorted(loops.values(), key=lambda loop: loop.head.index)
    for loop in found:
        loop.tails.sort(key=lambda block: block.index)
        around = [other for other in found if other is not loop and loop.blocks < other.blocks]
        loop.parent = min(around, key=lambda other: len(other.blocks), default=None)
    return found
