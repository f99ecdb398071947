"""The passes in CUDA C++ (`csrc/`), with the names, arguments and results of `rank_space`, and `decode`.

Tensors are contiguous CUDA tensors; x, g and the base in float32, float16 or bfloat16, parameters in any floating
dtype. The compiled module takes addresses and sizes alone. In tests `extension` is the emulation of the same sources on
the CPU, and the tensors are CPU tensors.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .common import FIXED_LEAD, branches, empty_if, new_rank_space, new_routing, wanted
from .kernels import tiles

try:
    extension: ModuleType | None = importlib.import_module("._C", __package__)
    _missing = ""
except ModuleNotFoundError:  # which `from . import _C` would not raise
    extension = None
    _missing = (
        "this installation has no CUDA C++ kernels: pip install -e . builds them where there are nvcc and a card of "
        "compute capability 8.0 or newer, with FORCE_CUDA=1 where there is nvcc"
    )
except ImportError as error:  # built for another Python, or not at all well
    extension = None
    _missing = f"its compiled kernels do not load: {error}"

BUILD_LOG = Path(__file__).with_name("_C.log")  # which setup.py leaves where it could not build the extension

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
OTHER_DTYPE = 4
REBUILD = "see to that and run pip install -e . again, with FORCE_CUDA=1 to see the compiler at work"
COLUMNS = (32, 80, 128)  # of rank space that a block of the shrink may have; in float32 the last would spill
MAX_DECODE_INSTANCES = 64
MAX_DECODE_EXPERTS = 256
MAX_MIX_NUMBERS = 2048  # of a token in rank space, b K r, that a warp holds in mix's gradient


# ------------------------------------------------------------------------------------------------------- what it needs


def driver_needed(runtime: int) -> str:
    """The oldest driver for kernels that were built with a CUDA version, given as 1000 major + 10 minor."""
    return {12: "525", 13: "580"}.get(runtime // 1000, f"for CUDA {runtime // 1000}")


def runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether a card can run what was built for `architectures`, as in "80 90a 120+PTX"."""
    for name in architectures.split():
        number = name.removesuffix("+PTX")
        major, minor = divmod(int(number.removesuffix("a")), 10)
        if number.endswith("a"):
            fits = capability == (major, minor)
        else:
            fits = capability[0] == major and capability[1] >= minor
        if fits or (name.endswith("+PTX") and capability >= (major, minor)):
            return True
    return False


def build_failure() -> str | None:
    """Why the extension could not be built, such as a compiler's first error; None if it was, or was not to be."""
    if extension is not None or not BUILD_LOG.exists():
        return None
    return BUILD_LOG.read_text(encoding="utf-8").partition("\n")[0]


def obstacle() -> str | None:
    """Why the kernels cannot run on this machine at all; None if they can."""
    failure = build_failure()
    if failure is not None:
        return f"the CUDA C++ kernels could not be built: {failure} (more in {BUILD_LOG}); {REBUILD}"
    return _missing if extension is None else _obstacle(extension)


@cache
def _obstacle(built: Any) -> str | None:
    if built.emulated:
        return None
    needed = driver_needed(built.runtime_version)
    version = built.driver_version()
    if version == 0:
        return f"there is no NVIDIA driver; these kernels need {needed} or newer"
    if version // 1000 < built.runtime_version // 1000:
        supports = f"{version // 1000}.{version % 1000 // 10}"
        return f"the NVIDIA driver is for CUDA {supports}; these kernels need {needed} or newer"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    cards = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if not any(runs_on(card, built.architectures) for card in cards):
        names = ", ".join(f"{major}.{minor}" for major, minor in sorted(cards))
        if max(cards) < (8, 0):
            return f"the kernels need compute capability 8.0 or newer, and the cards have {names}"
        return (
            f"the kernels were built for {built.architectures}, not for compute capability {names}; "
            f"TORCH_CUDA_ARCH_LIST='{names}' pip install -e . builds them for it"
        )
    return None


def info() -> dict[str, Any]:
    """What `backend_info` adds for this backend."""
    facts: dict[str, Any] = {"version": None, "auto": "never: no measurement has shown yet where it beats Triton"}
    if extension is not None and not extension.emulated:
        runtime = extension.runtime_version
        facts["version"] = f"{runtime // 1000}.{runtime % 1000 // 10}"
        facts["driver"] = f"{driver_needed(runtime)} or newer"
        facts["architectures"] = extension.architectures
    failure = build_failure()
    if failure is not None:
        facts |= {"build_error": failure, "build_log": str(BUILD_LOG)}
    return facts


# ----------------------------------------------------------------------------------------------------------- launching


def _run(name: str, like: Tensor, *parts: dict[str, Any]) -> None:
    """Run a pass of the extension on the current stream of a tensor's device, with the fields of its params struct.

    A tensor becomes its address and dtype; None leaves a field as it is. Only decode takes several structs.
    """
    common: dict[str, Any] = {"device": like.device.index or 0}
    if like.device.type == "cuda":
        common["stream"] = torch.cuda.current_stream(like.device).cuda_stream, OTHER_DTYPE
    if extension.emulated:
        extension.forget()
    calls = []
    for fields in parts:
        values = dict(common)
        for field, value in fields.items():
            if isinstance(value, Tensor):
                values[field] = value.data_ptr(), DTYPES.get(value.dtype, OTHER_DTYPE)
                if extension.emulated:
                    extension.allow(value.data_ptr(), value.numel() * value.element_size())
            elif value is not None:
                values[field] = value
        calls.append(values)
    getattr(extension, name)(*calls)


def _layout(
    dtype: torch.dtype, T: int, n: int, top_k: int, r: int, M: int, N: int, fusion: str, scaling: float = 1.0,
    cu_seqlens: Tensor | None = None, seed: Tensor | None = None, threshold: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The fields that every pass has."""
    use_vu, use_if = branches(fusion)
    return dict(
        dtype=DTYPES[dtype], T=T, n=n, K=top_k, r=r, M=M, N=N, use_vu=use_vu, use_if=use_if,
        adaptive=fusion == "adaptive", fixed_lead=FIXED_LEAD.get(fusion, 0.0), scaling=scaling, cu=cu_seqlens,
        seed=seed if threshold else None, threshold=threshold,
    )  # fmt: skip


def rank_columns(r: int) -> int:
    """Columns that an expert takes in rank space: its rank, rounded up to a multiple of 16."""
    return -(-r // 16) * 16


def shrink_columns(total: int, dtype: torch.dtype) -> int:
    """The columns of rank space that a block of the shrink has, of `total`: all of them if it can."""
    choices = COLUMNS[:-1] if dtype == torch.float32 else COLUMNS
    return next((columns for columns in choices if total <= columns), choices[-1])


def one_read(columns: int, dtype: torch.dtype) -> bool:
    """Whether one read of g gives p and the parts of dB: where they and the weights fit into a block."""
    return columns <= (32 if dtype == torch.float32 else 64)


def _refuse_large(numbers: int) -> None:
    """Refuse more numbers of a token in rank space, b K r, than the kernels have room for.

    Raises:
        ValueError: there are more.
    """
    if numbers > MAX_MIX_NUMBERS:
        raise ValueError(
            f"backend 'cuda' takes up to {MAX_MIX_NUMBERS} numbers of a token in rank space (branches * top_k * r), "
            f"got {numbers}; 'triton' takes any"
        )


def _packed(weight: Tensor, shape: tuple[int, ...], dtype: torch.dtype, exchanged: bool = False) -> Tensor | None:
    """Room for a weight in the compute dtype, padded; None where it already lies as the kernels want it."""
    as_it_is = weight.dtype == dtype and tuple(weight.shape) == shape and weight.data_ptr() % 16 == 0
    return None if as_it_is and not exchanged else torch.empty(shape, dtype=dtype, device=weight.device)


def _up_to_8(size: int) -> int:
    return -(-size // 8) * 8


# ---------------------------------------------------------------------------------------------------------- the passes


def route_shrink(
    x: Tensor,
    instances: int,
    cu_seqlens: Tensor | None,
    route_mask: Tensor | None,
    instruction: Tensor | None,
    given_routes: Tensor | None,
    given_gates: Tensor | None,
    vu_A: Tensor,
    if_A: Tensor,
    vu_B: Tensor,
    if_B: Tensor,
    vu_router: Tensor,
    if_router: Tensor,
    vu_importance: Tensor,
    if_importance: Tensor,
    seed: Tensor | None,
    threshold: int,
    top_k: int,
    scaling: float,
    fusion: str,
    need_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(h, w, routes, gates, logits, mean); arguments and results as in `smolora.rank_space.route_shrink`."""
    (T, d), n = x.shape, instances
    (M, r, _), N, k = vu_A.shape, if_A.shape[0], vu_B.shape[1]
    use_vu, use_if = branches(fusion)
    RP, adaptive, route = rank_columns(r), fusion == "adaptive", given_routes is None
    _refuse_large((use_vu + use_if) * top_k * r)
    float32 = dict(dtype=torch.float32, device=x.device)
    h, w = new_rank_space(x, M + N, r, top_k, fusion)
    routes, gates, logits = new_routing(x, n, M + N, top_k, fusion, given_routes, given_gates)
    logits.zero_()  # those of a branch that is not in use
    route_vu = route and use_vu
    one_pass = route_vu and M * RP <= tiles.MAX_ONE_PASS_COLUMNS
    total = (use_vu * (M if one_pass else top_k) + use_if * top_k) * RP
    columns = shrink_columns(total, x.dtype)
    card = tiles.card_of(x.device)
    tile, width = extension.TILE, 4 * extension.ROW // x.element_size()
    slack = 1 if route_mask is None else 2
    number = tiles.tile_count(T, n, tile, cu_seqlens is not None, slack if one_pass else 1)
    sums_number = tiles.tile_count(T, n, tile, cu_seqlens is not None, slack)
    splits = tiles.splits(number * tiles.cdiv(total, columns), d, width, card.processors)
    slices = tiles.cdiv(d, extension.ROUTE_INPUTS)
    mean = torch.empty((n, d) if route_vu else (0, 0), **float32)
    _run("route_shrink", x, dict(
        **_layout(x.dtype, T, n, top_k, r, M, N, fusion, scaling, cu_seqlens, seed, threshold),
        d=d, k=k, e=if_router.shape[1], route=route, one_pass=one_pass, columns=columns, splits=splits,
        sum_splits=tiles.splits(sums_number, d, width, card.processors), x=x, mask=route_mask if route_vu else None,
        instruction=instruction, vu_A=vu_A, if_A=if_A, vu_B=vu_B, if_B=if_B, vu_router=vu_router, if_router=if_router,
        vu_importance=vu_importance, if_importance=if_importance,
        vu_packed=_packed(vu_A, (M, RP, _up_to_8(d)), x.dtype) if use_vu else None,
        if_packed=_packed(if_A, (N, RP, _up_to_8(d)), x.dtype) if use_if else None,
        routes=routes, gates=gates, logits=logits,
        routed=torch.empty((n, 2), dtype=torch.int64, device=x.device),
        arrived=torch.empty(n, dtype=torch.int32, device=x.device),
        sums=torch.empty((sums_number, d), **float32) if route_vu else None, mean=mean,
        z_part=torch.empty((n, slices, M), **float32) if route_vu else None,
        w_part=torch.empty((tiles.cdiv(k, extension.PREPARE_OUTPUTS), M + N, r), **float32) if adaptive else None,
        part=torch.empty((splits, T, total), **float32), h=h, w=w,
    ))  # fmt: skip
    return h, w, routes, gates, logits, mean if need_mean and route_vu else torch.empty((0, 0), **float32)


def fuse_expand(
    h: Tensor,
    w: Tensor,
    routes: Tensor,
    gates: Tensor,
    vu_B: Tensor,
    if_B: Tensor,
    instances: int,
    cu_seqlens: Tensor | None,
    scaling: float,
    fusion: str,
    dtype: torch.dtype,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, lead); arguments and results as in `smolora.rank_space.fuse_expand`."""
    T, n = h.shape[0], instances
    (M, k, r), N, top_k = vu_B.shape, if_B.shape[0], routes.shape[2]
    use_vu, use_if = branches(fusion)
    RP = rank_columns(r)
    y = torch.empty((T, k), dtype=dtype, device=h.device)
    lead = h.new_empty(T)
    number = tiles.tile_count(T, n, extension.TILE, cu_seqlens is not None)
    _run("fuse_expand", h, dict(
        **_layout(dtype, T, n, top_k, r, M, N, fusion, scaling, cu_seqlens), k=k,
        splits=tiles.splits(number, k, 256, tiles.card_of(h.device).processors), h=h, w=w, routes=routes, gates=gates,
        vu_B=vu_B, if_B=if_B, bias=bias, vu_packed=_packed(vu_B, (M, k, RP), dtype) if use_vu else None,
        if_packed=_packed(if_B, (N, k, RP), dtype) if use_if else None,
        u=torch.empty((T, (use_vu + use_if) * top_k * RP), dtype=dtype, device=h.device), lead=lead, y=y,
    ))  # fmt: skip
    if weight is not None:
        y.addmm_(x, weight.t())
    return y, lead


def grad_output(
    g: Tensor,
    h: Tensor,
    w: Tensor,
    routes: Tensor,
    gates: Tensor,
    lead: Tensor,
    vu_B: Tensor,
    if_B: Tensor,
    vu_importance: Tensor,
    if_importance: Tensor,
    instances: int,
    cu_seqlens: Tensor | None,
    scaling: float,
    fusion: str,
    need_dh: bool,
    need_vu_B: bool,
    need_if_B: bool,
    need_importance: bool,
    need_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dh, dvu_B, dif_B, dvu_importance, dif_importance, dgates), as in `smolora.rank_space.grad_output`."""
    (T, k), n = g.shape, instances
    (M, _, r), N, top_k = vu_B.shape, if_B.shape[0], routes.shape[2]
    need = wanted(fusion, need_dh, need_vu_B, need_if_B, need_importance, need_gates)
    use_vu, use_if = branches(fusion)
    need_B, packed, b, RP = need.vu_B or need.if_B, cu_seqlens is not None, use_vu + use_if, rank_columns(r)
    total, card = b * top_k * RP, tiles.card_of(g.device)
    once, columns = one_read(total, g.dtype), shrink_columns(total, g.dtype)
    block = extension.OUTER_TILES * extension.ROW // g.element_size()
    k_blocks = tiles.cdiv(k, block)
    chunk = tiles.chunk_tokens(T, n, k_blocks, extension.CHUNK, card.processors)
    chunks = tiles.tile_count(T, n, chunk, packed)
    number = tiles.tile_count(T, n, extension.TILE, packed) * tiles.cdiv(total, columns)
    parts = k_blocks if once else tiles.splits(number, k, block, card.processors)
    mix_tiles = tiles.tile_count(T, n, extension.MIX_TILE, packed)
    float32, int32 = dict(dtype=torch.float32, device=g.device), dict(dtype=torch.int32, device=g.device)
    dh, dgates = empty_if(need.p, h), empty_if(need_gates, gates)
    dvu_B, dif_B = empty_if(need.vu_B, vu_B), empty_if(need.if_B, if_B)
    dvu_importance, dif_importance = (empty_if(need.importance, I) for I in (vu_importance, if_importance))

    def room(B: Tensor, used: bool) -> Tensor | None:
        shape = (k, RP) if once else (RP, _up_to_8(k))
        return _packed(B, (B.shape[0], *shape), g.dtype, exchanged=not once) if need.p and used else None

    _run("grad_output", g, dict(
        **_layout(g.dtype, T, n, top_k, r, M, N, fusion, scaling, cu_seqlens), k=k, need_p=need.p, need_c=need.c,
        need_gates=need_gates, need_vu_B=need.vu_B, need_if_B=need.if_B, need_importance=need.importance,
        one_read=once, columns=columns, parts=parts, chunk=chunk, chunks=chunks, g=g, h=h, w=w, routes=routes,
        gates=gates, lead=lead, vu_B=vu_B, if_B=if_B, vu_importance=vu_importance, if_importance=if_importance,
        vu_packed=room(vu_B, use_vu), if_packed=room(if_B, use_if),
        u=torch.empty((T, total), dtype=g.dtype, device=g.device) if need_B else None,
        p_part=torch.empty((parts, T, total), **float32) if need.p else None,
        B_part=torch.empty((chunks, total // 16, k, 16), **float32) if need_B else None,
        chunk_owner=torch.empty(chunks, **int32),
        c_part=torch.empty((mix_tiles, b, top_k, r), **float32) if need.c else None,
        q_part=torch.empty((mix_tiles, b, top_k, r), **float32) if need_gates else None,
        tile_owner=torch.empty(mix_tiles, **int32),
        c=torch.empty((M + N, r), **float32) if need.c else None, dh=dh, dvu_B=dvu_B, dif_B=dif_B,
        dvu_importance=dvu_importance, dif_importance=dif_importance, dgates=dgates,
    ))  # fmt: skip
    return dh if need_dh else dh.new_empty(0), dvu_B, dif_B, dvu_importance, dif_importance, dgates


def grad_input(
    x: Tensor | None,
    dh: Tensor,
    routes: Tensor,
    vu_A: Tensor,
    if_A: Tensor,
    instances: int,
    cu_seqlens: Tensor | None,
    route_mask: Tensor | None,
    dmean: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    fusion: str,
    dtype: torch.dtype,
    need_dx: bool,
    need_vu_A: bool,
    need_if_A: bool,
    g: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dvu_A, dif_A); arguments and results as in `smolora.rank_space.grad_input`."""
    T, n, top_k = dh.shape[0], instances, routes.shape[2]
    (M, r, d), N = vu_A.shape, if_A.shape[0]
    use_vu, use_if = branches(fusion)
    need_vu_A, need_if_A = need_vu_A and use_vu, need_if_A and use_if
    need_A, packed, RP = need_vu_A or need_if_A, cu_seqlens is not None, rank_columns(r)
    total, card = (use_vu + use_if) * top_k * RP, tiles.card_of(dh.device)
    block = extension.OUTER_TILES * extension.ROW // dtype.itemsize
    chunk = tiles.chunk_tokens(T, n, tiles.cdiv(d, block), extension.CHUNK, card.processors)
    chunks = tiles.tile_count(T, n, chunk, packed)
    number = tiles.tile_count(T, n, extension.TILE, packed)
    dx = dh.new_empty((T, d) if need_dx else 0, dtype=dtype)
    dvu_A, dif_A = empty_if(need_vu_A, vu_A), empty_if(need_if_A, if_A)
    _run("grad_input", dh, dict(
        **_layout(dtype, T, n, top_k, r, M, N, fusion, cu_seqlens=cu_seqlens, seed=seed, threshold=threshold), d=d,
        need_dx=need_dx, need_vu_A=need_vu_A, need_if_A=need_if_A,
        splits=tiles.splits(number, d, 256, card.processors), chunk=chunk, chunks=chunks, x=x, dh=dh, routes=routes,
        mask=route_mask, dmean=dmean, vu_A=vu_A, if_A=if_A,
        vu_packed=dh.new_empty((M, d, RP), dtype=dtype) if need_dx and use_vu else None,
        if_packed=dh.new_empty((N, d, RP), dtype=dtype) if need_dx and use_if else None,
        u=dh.new_empty((T, total), dtype=dtype), A_part=dh.new_empty((chunks, total, d)) if need_A else None,
        chunk_owner=dh.new_empty(chunks, dtype=torch.int32), dx=dx, dvu_A=dvu_A, dif_A=dif_A,
    ))  # fmt: skip
    if need_dx and weight is not None:
        dx.addmm_(g, weight)
    return dx, dvu_A, dif_A


# -------------------------------------------------------------------------------------------------------- one token


def decodes(
    x: Tensor, instances: int, cu_seqlens: Tensor | None, threshold: int, top_k: int, fusion: str, vu_A: Tensor,
    if_A: Tensor,
) -> bool:  # fmt: skip
    """Whether `decode` takes a forward: one token an instance, no dropout, and no gradient asked for."""
    one_token = x.shape[0] == instances and cu_seqlens is None and 0 < instances <= MAX_DECODE_INSTANCES
    slots, experts, r = sum(branches(fusion)) * top_k, vu_A.shape[0] + if_A.shape[0], vu_A.shape[1]
    if not one_token or threshold or torch.is_grad_enabled():
        return False
    routes = max(instances * slots, experts * top_k)
    return (
        experts <= MAX_DECODE_EXPERTS
        and routes <= extension.DECODE_ROUTES
        and experts * r <= extension.DECODE_WEIGHTS
        and slots * rank_columns(r) + tiles.MAX_DECODE_OUTPUTS <= extension.DECODE_MIXED
    )


def decode(
    x: Tensor,
    instances: int,
    route_mask: Tensor | None,
    instruction: Tensor | None,
    given_routes: Sequence[Tensor],
    given_gates: Sequence[Tensor],
    vu_A: Sequence[Tensor],
    vu_B: Sequence[Tensor],
    if_A: Sequence[Tensor],
    if_B: Sequence[Tensor],
    vu_router: Sequence[Tensor],
    if_router: Sequence[Tensor],
    vu_importance: Sequence[Tensor],
    if_importance: Sequence[Tensor],
    weight: Sequence[Tensor | None],
    bias: Sequence[Tensor | None],
    top_k: int,
    scaling: float,
    fusion: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """A forward of one token an instance through projections of x, in one launch after their bases' products.

    Arguments as in `route_shrink` and `fuse_expand`, with a list wherever projections differ; `given_routes` and
    `given_gates` have one for each of them, or none. What B is multiplied with stays in float32 here.

    Returns:
        y, routes, gates, logits and lead of each projection.
    """
    n, d = x.shape
    route = not given_routes
    results, calls = [], []
    for i in range(len(vu_A)):
        (M, r, _), N, k = vu_A[i].shape, if_A[i].shape[0], vu_B[i].shape[1]
        y = x.new_empty((n, k)) if weight[i] is None else torch.nn.functional.linear(x, weight[i], bias[i])
        routes, gates, logits = new_routing(x, n, M + N if route else 0, top_k, fusion)
        lead = logits.new_empty(n)
        slices, outputs = tiles.cdiv(d, extension.DECODE_INPUTS), tiles.decode_outputs(k)
        results.append((y, routes, gates, logits, lead))
        calls.append(dict(
            **_layout(x.dtype, n, n, top_k, r, M, N, fusion, scaling), d=d, k=k, e=if_router[i].shape[1], route=route,
            add=weight[i] is not None, outputs=outputs, x=x, mask=route_mask, instruction=instruction, vu_A=vu_A[i],
            if_A=if_A[i], vu_B=vu_B[i], if_B=if_B[i], vu_router=vu_router[i], if_router=if_router[i],
            vu_importance=vu_importance[i], if_importance=if_importance[i],
            given_routes=None if route else given_routes[i].contiguous(),
            given_gates=None if route else given_gates[i].float().contiguous(), routes=routes, gates=gates,
            logits=logits, lead=lead, y=y, h_part=lead.new_empty((slices, n, (M + N) * r)),
            z_part=lead.new_empty((slices, n, M)), z_if=lead.new_empty((n, N)),
            w_part=lead.new_empty((tiles.cdiv(k, outputs), (M + N) * r)),
        ))  # fmt: skip
    _run("decode", x, *calls)
    return tuple(map(list, zip(*results, strict=True)))
