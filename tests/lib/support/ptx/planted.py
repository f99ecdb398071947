"""Small kernels with and without a fault, to see what the executor finds; for the worker's process."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from support.ptx.launcher import Machine, installed


@triton.jit
def _turned(a_ptr, b_ptr, BARRIER: tl.constexpr, N: tl.constexpr):
    """Each thread reads what another one wrote."""
    o = tl.arange(0, N)
    tl.store(a_ptr + o, o.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(b_ptr + o, tl.load(a_ptr + N - 1 - o))


@triton.jit
def _shifted(a_ptr, b_ptr, BARRIER: tl.constexpr, N: tl.constexpr):
    """Each thread writes what another one reads."""
    o = tl.arange(0, N)
    value = tl.load(a_ptr + o)
    if BARRIER:
        tl.debug_barrier()
    tl.store(a_ptr + N - 1 - o, value)
    tl.store(b_ptr + o, value)


@triton.jit
def _strided(a_ptr, b_ptr, STEP: tl.constexpr, N: tl.constexpr):
    """Programs write N numbers each, STEP apart."""
    o = tl.program_id(0) * STEP + tl.arange(0, N)
    tl.store(a_ptr + o, o.to(tl.float32))


@triton.jit
def _neighbour(a_ptr, b_ptr, OWN: tl.constexpr, N: tl.constexpr):
    """Programs read what another one writes."""
    i = tl.program_id(0)
    other = (i + 1) % tl.num_programs(0)
    if OWN:
        other = i
    o = tl.arange(0, N)
    tl.store(a_ptr + i * N + o, tl.load(a_ptr + other * N + o) + 1)


@triton.jit
def _outside(a_ptr, b_ptr, MASK: tl.constexpr, N: tl.constexpr):
    """a has 100 numbers."""
    o = tl.arange(0, N)
    inside = (o < 100) | (not MASK)
    tl.store(a_ptr + o, tl.load(a_ptr + o, mask=inside, other=0) + 1, mask=inside)


@triton.jit
def _never_written(a_ptr, b_ptr, WRITTEN: tl.constexpr, N: tl.constexpr):
    """b is fresh memory."""
    o = tl.arange(0, N)
    if WRITTEN:
        tl.store(b_ptr + o, o.to(tl.float32))
        tl.debug_barrier()
    tl.store(a_ptr + o, tl.load(b_ptr + o))


KERNELS = {
    "turned": (_turned, 1),
    "shifted": (_shifted, 1),
    "strided": (_strided, 3),
    "neighbour": (_neighbour, 3),
    "outside": (_outside, 1),
    "never_written": (_never_written, 1),
}


def faults_of(name: str, right: bool, arch: int) -> list[str]:
    """The kinds of faults that the machine finds in a kernel; `right` asks for the form that has none."""
    machine = Machine(arch)
    kernel, programs = KERNELS[name]
    N = 128
    flag = (N if right else N // 2) if name == "strided" else right
    constant = kernel.arg_names[2]
    with installed(machine):
        a = torch.zeros(100 if name == "outside" else 3 * N)
        kernel[(programs,)](a, torch.empty(N), **{constant: flag}, N=N, num_warps=4)
    return sorted(machine.faults.kinds())


@triton.jit
def _integers(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    """Integer arithmetic of every kind that kernels use, one row of `out` each."""
    o = tl.arange(0, N)
    a, b = tl.load(a_ptr + o), tl.load(b_ptr + o)
    tl.store(out_ptr + o, (a // b).to(tl.int64))
    tl.store(out_ptr + N + o, (a % b).to(tl.int64))
    tl.store(out_ptr + 2 * N + o, a.to(tl.int64) * b)
    tl.store(out_ptr + 3 * N + o, ((a >> 3) ^ (b << 5)).to(tl.int64))
    tl.store(out_ptr + 4 * N + o, tl.umulhi(a.to(tl.uint32), b.to(tl.uint32)).to(tl.int64))
    tl.store(out_ptr + 5 * N + o, (a.to(tl.uint32) >> 7).to(tl.int64))
    tl.store(out_ptr + 6 * N + o, tl.maximum(tl.minimum(a, b), -5).to(tl.int64))
    tl.store(out_ptr + 7 * N + o, tl.zeros([N], tl.int64) + tl.sum(a.to(tl.int64), 0))
    tl.store(out_ptr + 8 * N + o, (tl.zeros_like(a) + tl.max(a, 0)).to(tl.int64))


def integers(arch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Operands, and what the compiled kernel makes of them."""
    N = 256
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-(2**31), 2**31, (N,), generator=draw, dtype=torch.int64).int() for _ in range(2))
    b = torch.where(b == 0, 1, b >> (torch.arange(N) % 31).int() | 1)
    out = torch.empty(9, N, dtype=torch.int64)
    machine = Machine(arch)
    with installed(machine):
        _integers[(1,)](a, b, out, N=N, num_warps=4)
    assert not machine.faults, machine.faults
    return a, b, out


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, k, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr):
    """c = a b with a loop over k; with TRANSPOSED, a is stored (k, M)."""
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    acc = tl.zeros([M, N], tl.float32)
    for first in range(0, k, BK):
        o_k = first + tl.arange(0, BK)
        inside = o_k < k
        if TRANSPOSED:
            a = tl.trans(tl.load(a_ptr + o_k[:, None] * M + o_m[None, :], mask=inside[:, None], other=0))
        else:
            a = tl.load(a_ptr + o_m[:, None] * k + o_k[None, :], mask=inside[None, :], other=0)
        b = tl.load(b_ptr + o_k[:, None] * N + o_n[None, :], mask=inside[:, None], other=0)
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + o_m[:, None] * N + o_n[None, :], acc)


def product(arch: int, dtype: torch.dtype, M: int, N: int, k: int, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A product's operands, and the result on tensor cores; with several stages of cp.async."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(M, k, generator=draw).to(dtype), torch.randn(k, N, generator=draw).to(dtype)
    c = torch.empty(M, N)
    machine = Machine(arch)
    with installed(machine):
        stored = a.t().contiguous() if transposed else a
        _product[(1,)](stored, b, c, k, M=M, N=N, BK=32, TRANSPOSED=transposed, num_warps=4, num_stages=3)
    assert not machine.faults, machine.faults
    return a, b, c
