"""Compile every Triton kernel with every tile for every architecture, on any machine, and report what came out.

    python bench/kernel_report.py [--arch 90 ...] [--groups tiles ...] [--json FILE]

The launchers themselves are run on tensors without data while launches are recorded, so what is compiled is what a
training step or a decode step would launch. Registers, stack and shared memory come from the compiler, instruction
counts from the disassembly (SASS). Exits with 1 if a kernel spills, takes more shared memory than a block may have, or
is a half-precision matrix product without tensor cores.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: these are the compiled kernels

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from smolora.kernels import fuse_expand, grad_input, grad_output, passes, products, route_shrink
from smolora.launch import Card
from static_report import print_faults, print_rows

ARCHITECTURES = (80, 90, 100, 120)
# shared memory that one block may use, in bytes (CUDA programming guide, compute capabilities)
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
DOTS = ("shrink_kernel", "fuse_expand_kernel", "grad_output_kernel", "grad_input_kernel")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
BATCH = 8  # kernels that one worker compiles and then disassembles together: most of a disassembly is its start

# what is counted in SASS: mma.sync is HMMA, wgmma is HGMMA, tcgen05.mma is UTCHMMA
COUNTED = {
    "spills": r"\b(?:LDL|STL)\b",
    "tensor_core": r"\b(?:HMMA|HGMMA|UTCHMMA)\b",
    "fma": r"\bFFMA2?\b",
    "wide_loads": r"\b(?:LDG\.E[.\w]*\.128|LDGSTS\.E[.\w]*\.128|UBLKCP|UTMALDG)\b",
}

# tensors that grow with the number of tokens, so that they may have more than 2^31 elements
GROWING = {
    "x_ptr",
    "g_ptr",
    "y_ptr",
    "dx_ptr",
    "h_ptr",
    "dh_ptr",
    "scores_ptr",
    "dscores_ptr",
    "fused_ptr",
    "token_logits_ptr",
    "dlogits_ptr",
    "route_mask_ptr",
    "sums_ptr",
    "part_ptr",
    "part_ptrs",
    "logits_part_ptr",
    "p_part_ptr",
    "p_part_ptrs",
    "masks_ptr",
    "B_part_ptr",
    "A_part_ptr",
    "router_part_ptr",
    "dw_part_ptr",
    "dweights_part_ptr",
}


@dataclass(frozen=True)
class Setting:
    """A layer and how it is used; the kernels' variants follow from it."""

    r: int = 16
    dtype: torch.dtype = torch.bfloat16
    parameters: torch.dtype = torch.float32
    mix: str = "smolora"
    banks: int = 2
    experts: int = 4
    top_k: int = 1  # slots of a bank; 0: every expert has one
    shared: bool = False  # one A for a bank's B
    frozen: bool = False  # some experts' B get no gradient
    tasks: bool = False  # a router a task
    gate: str = "chosen"
    by_token: bool = False  # coefficients (T, K) given
    threshold: int = 13
    masked: bool = False
    packed: bool = False
    learns: bool = False  # routers and gates
    training: bool = True  # else decoding, with given slots
    d: int = 4096
    k: int = 11008
    tokens: int = 8192
    num_seqs: int = 8
    bias: bool = True

    def but(self, **changes: Any) -> Setting:
        return replace(self, **changes)

    def __str__(self) -> str:
        default = Setting(r=0, dtype=self.dtype)
        changed = [f"{name}={value}" for name, value in vars(self).items() if value != getattr(default, name)]
        return " ".join([str(self.dtype)[6:], *changed])


PLAIN = Setting()
DECODE = Setting(threshold=0, training=False, tokens=8)
EXACT = Setting(dtype=torch.float32)
SOFTMAX = PLAIN.but(mix="softmax", banks=1, experts=8, top_k=0)  # as MoELoRA: all experts, a token router
SHARED = PLAIN.but(mix="weighted", banks=1, experts=8, top_k=2, shared=True, gate="all", learns=True)
DENSE = PLAIN.but(mix="weighted", banks=1, experts=1, top_k=0)  # as LoRA
GROUPS: dict[str, list[Setting]] = {
    # the paper's setting, for a short look at an architecture
    "plain": [PLAIN, EXACT],
    # the same of the other mixes
    "mixes": [SOFTMAX, SHARED, DENSE],
    # every tile of half-precision inputs
    "tiles": [
        PLAIN,
        PLAIN.but(r=32),
        PLAIN.but(r=64),
        PLAIN.but(r=128),
        PLAIN.but(experts=2),
        PLAIN.but(experts=8),
        DECODE,
    ],
    # what one layer may ask for, each adding code to a kernel
    "options": [
        PLAIN.but(threshold=0),
        PLAIN.but(masked=True),
        PLAIN.but(packed=True),
        PLAIN.but(masked=True, learns=True),
        PLAIN.but(r=12),
        PLAIN.but(top_k=2, masked=True, packed=True, learns=True),
        PLAIN.but(top_k=4, masked=True, learns=True),
        PLAIN.but(r=64, masked=True, packed=True, learns=True),
        PLAIN.but(r=32, top_k=4),
        PLAIN.but(r=64, top_k=4),
        PLAIN.but(parameters=torch.bfloat16),
        PLAIN.but(mix="weighted"),
        PLAIN.but(mix="weighted", banks=1),
        PLAIN.but(dtype=torch.float16),
    ],
    "mix options": [
        SOFTMAX.but(threshold=0),
        SOFTMAX.but(r=4),
        SOFTMAX.but(r=64),
        SOFTMAX.but(experts=4),
        SOFTMAX.but(shared=True),
        SOFTMAX.but(training=False, threshold=0, tokens=8),
        SHARED.but(tasks=True, frozen=True, masked=True, packed=True),
        SHARED.but(r=64),
        SHARED.but(r=128, top_k=1),
        SHARED.but(threshold=0, shared=False, top_k=3, frozen=True),
        SHARED.but(shared=False, frozen=True),
        DENSE.but(threshold=0),
        DENSE.but(r=64),
        DENSE.but(r=128),
        DENSE.but(experts=8, by_token=True),
        DENSE.but(experts=4, banks=2),
        PLAIN.but(shared=True, top_k=2, learns=True),
        PLAIN.but(shared=True, top_k=2, learns=True, masked=True, packed=True),
    ],
    "float32": [
        EXACT,
        EXACT.but(r=32),
        EXACT.but(r=64),
        EXACT.but(r=128),
        EXACT.but(experts=1),
        EXACT.but(experts=2),
        EXACT.but(top_k=2, masked=True, packed=True, learns=True),
        SOFTMAX.but(dtype=torch.float32),
        SHARED.but(dtype=torch.float32),
        DENSE.but(dtype=torch.float32),
    ],
}


@dataclass(frozen=True)
class Function:
    """A device function that a kernel takes as an argument, by name: it must reach other processes."""

    module: str
    name: str

    def load(self) -> JITFunction:
        return getattr(importlib.import_module(self.module), self.name)


@dataclass(frozen=True)
class Launch:
    """One kernel with the arguments that decide its code."""

    kernel: Function
    signature: tuple[tuple[str, Any], ...]
    constexprs: tuple[tuple[str, Any], ...]
    divisible: tuple[tuple[int, ...], ...]
    options: tuple[tuple[str, int], ...]

    def tile(self) -> str:
        constants = dict(self.constexprs)
        return " ".join(f"{n}={constants[n]}" for n in ("BT", "BD", "BK", "BC", "BR") if n in constants)


@dataclass(frozen=True)
class Call:
    """A launch as it was made: its grid, the numbers it was given, and the tensors by argument, `name_i` in a tuple."""

    launch: Launch
    grid: tuple[int, ...]
    scalars: dict[str, int | float]
    tensors: dict[str, torch.Tensor]


def describe(kernel: JITFunction, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, int]) -> Call:
    """Specialise a kernel for arguments, as a launch does."""
    scalars: dict[str, int | float] = {}
    tensors: dict[str, torch.Tensor] = {}
    constants: dict[str, Any] = {}
    divisible: list[tuple[int, ...]] = []

    def kind(value: Any, specialise: bool, *path: int) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(each, specialise, *path, i) for i, each in enumerate(value))
        name = "_".join([kernel.params[path[0]].name, *map(str, path[1:])])
        if isinstance(value, torch.Tensor):
            divisible.append(path)
            tensors[name] = value
            return TYPES[value.dtype]
        if value is not None:
            scalars[name] = value
        if isinstance(value, float):
            return "fp32"
        if value is None or (specialise and value == 1):
            constants[kernel.params[path[0]].name] = value
            return "constexpr"
        if specialise and value % 16 == 0:
            divisible.append(path)
        return "i32"

    signature = []
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            function = isinstance(value, JITFunction)
            constants[parameter.name] = Function(value.fn.__module__, value.__name__) if function else value
            signature.append((parameter.name, "constexpr"))
        else:
            signature.append((parameter.name, kind(value, not parameter.do_not_specialize, i)))
    name = Function(kernel.fn.__module__, kernel.__name__)
    launch = Launch(name, tuple(signature), tuple(constants.items()), tuple(divisible), tuple(options.items()))
    return Call(launch, grid, scalars, tensors)


def record(run: Callable[[], Any]) -> list[Call]:
    """Record the launches of `run` in place of making them."""
    calls: list[Call] = []

    def launcher(kernel: JITFunction, grid: Any) -> Callable[..., None]:
        def launch(**arguments: Any) -> None:
            options = {"num_warps": 4, "num_stages": 3}
            for name in ("num_warps", "num_stages", "maxnreg"):
                if name in arguments:
                    options[name] = arguments.pop(name)
            calls.append(describe(kernel, grid, arguments, options))

        return launch

    with mock.patch.object(JITFunction, "__getitem__", launcher):
        run()
    return calls


def run_layer(s: Setting) -> None:
    """Call the passes once on tensors that have shapes and no memory: forward, and backward if training."""
    with torch.device("meta"):
        E, b, n = s.experts, s.banks, s.num_seqs
        x, g = torch.empty(s.tokens, s.d, dtype=s.dtype), torch.empty(s.tokens, s.k, dtype=s.dtype)
        cu = torch.empty(n + 1, dtype=torch.int32) if s.packed else None
        mask = torch.empty(s.tokens, dtype=torch.bool) if s.masked else None
        seed = torch.empty(1, dtype=torch.int64)
        parameter = lambda *shape: torch.empty(*shape, dtype=s.parameters)  # noqa: E731
        A = [parameter(1 if s.shared else E, s.r, s.d)] * b
        B = [parameter(E, s.k, s.r)] * b
        importance = [parameter(s.k)] * b if s.mix == "smolora" else []
        trained = [torch.empty(E, dtype=torch.bool)] * b if s.frozen else []
        token_router = parameter(E, s.d) if s.mix == "softmax" else None
        routed, given = s.training and s.top_k > 0, not s.training and s.top_k > 0
        tasks = (3,) if s.tasks else ()
        routers = [parameter(*tasks, E, s.d), parameter(*tasks, E, 384)][:b] if routed else []
        ids = torch.empty(n, b, s.top_k, dtype=torch.int32) if given else None
        weights = torch.empty(n, b, s.top_k) if given else None
        rows = torch.empty(n, dtype=torch.int64) if s.tasks else None
        streams = list(range(b))
        instruction = torch.empty(n, 384)
        h, w, new_ids, new_weights, _, mean, logits, masks = passes.route_shrink(
            x=x,
            num_seqs=n,
            cu_seqlens=cu,
            route_mask=mask,
            instruction=instruction,
            ids=ids,
            A=A,
            B=B,
            importance=importance,
            routers=routers,
            router_reads_x=[True, False][:b],
            router_rows=rows,
            token_router=token_router,
            seed=seed,
            streams=streams,
            threshold=s.threshold,
            top_k=s.top_k if routed else 0,
            gate=s.gate,
            scaling=2.0,
            mix=s.mix,
            need_mean=s.learns,
        )
        if routed:
            ids, weights = new_ids, new_weights
        scores = logits if token_router is not None else torch.empty(s.tokens, s.top_k or E) if s.by_token else None
        given_scores = scores is not None
        _, fused = passes.fuse_expand(
            h=h,
            w=w,
            ids=ids,
            slot_weights=weights,
            scores=scores,
            B=B,
            num_seqs=n,
            cu_seqlens=cu,
            scaling=2.0,
            mix=s.mix,
            dtype=s.dtype,
            x=None,
            base_weight=None,
            base_bias=torch.empty(s.k, dtype=s.dtype) if s.bias else None,
        )
        if s.training:
            dh, *_, dscores = passes.grad_output(
                g=g,
                h=h,
                w=w,
                ids=ids,
                slot_weights=weights,
                scores=fused if s.mix == "smolora" else scores,
                B=B,
                importance=importance,
                trained=trained,
                num_seqs=n,
                cu_seqlens=cu,
                scaling=2.0,
                mix=s.mix,
                need_dh=True,
                need_B=[True] * b,
                need_importance=bool(importance),
                need_slot_weights=s.learns,
                need_scores=given_scores,
            )
            passes.grad_input(
                x=x,
                dh=dh,
                ids=ids,
                A=A,
                trained=[] if s.shared else trained,
                token_router=token_router,
                dtoken_logits=None if token_router is None else dscores,
                num_seqs=n,
                cu_seqlens=cu,
                route_mask=mask,
                dmean=mean if s.learns else None,
                seed=seed,
                streams=streams,
                threshold=s.threshold,
                masks=masks if s.threshold else None,
                dtype=s.dtype,
                need_dx=True,
                need_A=[True] * b,
                need_token_router=token_router is not None,
                g=None,
                base_weight=None,
            )


@contextmanager
def on_card(card: Card) -> Iterator[None]:
    """Let the launchers find this card."""
    with ExitStack() as stack:
        for module in (route_shrink, fuse_expand, grad_output, grad_input, products):
            stack.enter_context(mock.patch.object(module, "card_of", lambda device: card))
        yield


def launches_for(arch: int, settings: Iterable[Setting]) -> dict[Launch, Setting]:
    """Collect every distinct launch on an architecture, with the setting it first came from."""
    found: dict[Launch, Setting] = {}
    with on_card(Card((arch // 10, arch % 10))):
        for s in settings:
            for call in record(lambda s=s: run_layer(s)):
                found.setdefault(call.launch, s)
    return found


@dataclass(frozen=True)
class Row:
    """What one compiled kernel takes and has."""

    arch: int
    kernel: str
    tile: str
    warps: int
    registers: int
    stack: int
    shared: int
    spills: int
    tensor_core: int
    fma: int
    wide_loads: int
    narrow: int
    half: bool
    setting: str

    def __str__(self) -> str:
        return f"[{self.tile}] {self.setting}"

    def faults(self) -> list[str]:
        """Return what is wrong with the compiled kernel."""
        found = []
        if self.spills or self.stack:
            found.append(f"{self.spills} spill instructions, {self.stack} bytes of stack")
        if self.shared > SHARED_MEMORY[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, above the card's {SHARED_MEMORY[self.arch]}")
        if self.narrow:
            found.append(f"{self.narrow} accesses to tensors that grow with the tokens by 32-bit offsets alone")
        if self.kernel in DOTS and self.half and not self.tensor_core:
            found.append("no tensor-core instruction")
        return found


def machine_code(cubin: bytes) -> bytes:
    """Extract the instructions from an ELF file of one kernel: its section .text.<name>."""
    (sections,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + i * size) for i in range(count)]
    names = headers[names][4]
    (code,) = (h for h in headers if cubin[names + h[0] :].startswith(b".text."))
    return cubin[code[4] : code[4] + code[5]]


def count_instructions(arch: int, codes: list[bytes]) -> list[dict[str, int]]:
    """Count each kind of COUNTED in each kernel's code, by one disassembly of all of them end to end."""
    ends = list(accumulate(map(len, codes)))
    counts = [dict.fromkeys(COUNTED, 0) for _ in codes]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [TOOLS / "nvdisasm", "--binary", f"SM{arch}{'a' if arch >= 90 else ''}", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for address, instruction in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass):
        kernel = counts[bisect_right(ends, int(address, 16))]
        for kind, pattern in COUNTED.items():
            kernel[kind] += bool(re.search(pattern, instruction))
    return counts


def count_narrow(ttir: str) -> int:
    """Count loads and stores of GROWING tensors in Triton's IR whose address has no 64-bit offset in it."""
    # whether a 64-bit offset is in it; the tensors of a tuple have its name, with a number
    arguments = re.findall(r"%(\w+): !tt\.ptr", ttir)
    pointers = {f"%{name}": False for name in arguments if re.sub(r"_\d+$", "", name) in GROWING}
    narrow = 0
    for line in ttir.splitlines():
        made = re.match(r"\s*(%[\w#]+) = tt\.(addptr|splat|broadcast|expand_dims|reshape) (%[\w#]+)(.*)", line)
        if made and made[3] in pointers:
            wide = made[2] == "addptr" and "i64" in made[4].split("loc(")[0]
            pointers[made[1]] = pointers[made[3]] or wide
        used = re.search(r"tt\.(?:load|store) (%[\w#]+)", line)
        narrow += bool(used) and pointers.get(used[1]) is False
    return narrow


def compile_launch(arch: int, launch: Launch) -> Any:
    """Compile a launch for an architecture; return Triton's compiled kernel."""
    constants = {name: value.load() if isinstance(value, Function) else value for name, value in launch.constexprs}
    source = ASTSource(
        fn=launch.kernel.load(),
        signature=dict(launch.signature),
        constexprs=constants,
        attrs={path: [["tt.divisibility", 16]] for path in launch.divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))


def compile_batch(arch: int, batch: list[tuple[Launch, Setting]]) -> list[Row]:
    """Compile launches for an architecture and read the cubins back."""
    compiled = [compile_launch(arch, launch) for launch, _ in batch]
    counts = count_instructions(arch, [machine_code(c.asm["cubin"]) for c in compiled])
    rows = []
    for (launch, setting), kernel, count in zip(batch, compiled, counts, strict=True):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
            out = subprocess.run(usage, capture_output=True, text=True, check=True).stdout
        used = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", out)}
        rows.append(
            Row(
                arch=arch,
                kernel=launch.kernel.name,
                tile=launch.tile(),
                warps=dict(launch.options)["num_warps"],
                registers=used["REG"],
                stack=used["STACK"],
                shared=kernel.metadata.shared,
                **count,
                narrow=count_narrow(kernel.asm["ttir"]),
                half=setting.dtype != torch.float32,
                setting=str(setting),
            )
        )
    return rows


def report(architectures: Iterable[int], groups: Iterable[str], workers: int) -> list[Row]:
    """Compile everything in `workers` processes; return all rows."""
    settings = [s for group in groups for s in GROUPS[group]]
    batches = []
    for arch in architectures:
        found = list(launches_for(arch, settings).items())
        batches += [(arch, found[i : i + BATCH]) for i in range(0, len(found), BATCH)]
    bar = tqdm(total=sum(len(b) for _, b in batches), desc="compiling", unit="kernel", disable=not sys.stderr.isatty())
    with ProcessPoolExecutor(workers) as pool, bar:
        futures = [pool.submit(compile_batch, *batch) for batch in batches]
        for future in as_completed(futures):
            bar.update(len(future.result()))
    return [row for future in futures for row in future.result()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_MEMORY, default=ARCHITECTURES)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    rows = report(arguments.arch, arguments.groups, arguments.workers)
    print_rows(rows, without=["half"])
    if arguments.json:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"versions": versions, "rows": [asdict(row) for row in rows]}, indent=1))
    for arch in arguments.arch:
        mine = [row for row in rows if row.arch == arch]
        most, largest = max(mine, key=lambda row: row.registers), max(mine, key=lambda row: row.shared)
        print(
            f"sm_{arch}: {len(mine)} kernels; most registers {most.registers} ({most.kernel}, {most.setting}); "
            f"most shared memory {largest.shared} of {SHARED_MEMORY[arch]} bytes ({largest.kernel}, {largest.setting})"
        )
    return print_faults(rows, f"Triton {triton.__version__}")


if __name__ == "__main__":
    sys.exit(main())
