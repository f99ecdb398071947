"""Routes: what they are, given back, packed, and that they depend on the sample alone."""

import pytest
import torch
from torch import Tensor, nn

import smolora
from smolora import FusedSMoLoRA
from support.cases import plain
from support.marks import interpreter
from support.oracle import PARAMETERS, ROUNDING, Case, agree, build, error, run


@pytest.mark.parametrize("top_k", [1, 3])
def test_last_routing(top_k: int):
    """Routes, logits and gates of the last forward; alpha where it was asked for; all plain data without a graph."""
    case = plain.but(M=3, N=5, top_k=top_k, B=4)
    layer, batch = build(case, torch.float32)
    with pytest.raises(RuntimeError, match="needs a forward first"):
        layer.last_routing()
    run(layer, batch, "torch")
    routing = layer.last_routing()
    assert isinstance(routing, smolora.Routing) and routing.alpha is None  # keeping it costs memory
    embedding = batch.keywords["instruction"].double()
    truth = batch.x.double().mean(1) @ layer.vu_router.double().mT, embedding @ layer.if_router.double().mT
    for branch, experts in ((0, 3), (1, 5)):
        logits, routes, gates = routing.logits[branch], routing.routes[branch], routing.gates[branch]
        assert tuple(logits.shape) == (4, experts) and error(logits, truth[branch]) < 1e-5
        assert routes.dtype == torch.int32 and tuple(routes.shape) == ((4,) if top_k == 1 else (4, 3))
        values, chosen = logits.topk(top_k)
        assert torch.equal(routes.view(4, -1).long(), chosen)
        assert tuple(gates.shape) == (4, top_k) and error(gates, torch.softmax(values, -1)) < 1e-6
        assert not any(t.requires_grad for t in (logits, routes, gates))
    layer.keep_alpha = True
    run(layer, batch, "torch")
    alpha = layer.last_routing().alpha
    assert tuple(alpha.shape) == (28,) and not alpha.requires_grad and ((alpha >= 0) & (alpha <= 1)).all()
    assert alpha.unique().numel() > 4  # it is token by token
    layer.keep_alpha = False
    run(layer, batch, "torch")
    assert layer.last_routing().alpha is None


def test_alpha_is_the_papers():
    """Eq. 8 from k-sized vectors, as the reference has it."""
    layer, batch = build(plain.but(top_k=2), torch.float64)
    layer.keep_alpha = True
    run(layer, batch, "torch")
    base = layer.base_layer
    _, truth = smolora.reference.smolora_forward(
        batch.x,
        base.weight,
        base.bias,
        *(getattr(layer, name) for name in PARAMETERS),
        batch.keywords["instruction"],
        scaling=layer.config.scaling,
        top_k=2,
        return_routing=True,
    )
    routing = layer.last_routing()
    assert error(routing.alpha, truth.alpha) < 1e-12
    for branch in (0, 1):
        assert torch.equal(routing.routes[branch].long(), truth.routes[branch])
        assert error(routing.gates[branch], truth.gates[branch]) < 1e-12
        assert error(routing.logits[branch], truth.logits[branch]) < 1e-12


@pytest.mark.parametrize(("fusion", "branch", "alpha"), [("vu", 0, 1.0), ("if", 1, 0.0)])
def test_last_routing_of_one_branch(fusion: str, branch: int, alpha: float):
    """A branch that is not in use has None, at its place; the other has all the share."""
    layer, batch = build(plain.but(fusion=fusion), torch.float32)
    layer.keep_alpha = True
    run(layer, batch, "torch")
    routing = layer.last_routing()
    for pair in (routing.routes, routing.logits, routing.gates):
        assert pair[branch] is not None and pair[1 - branch] is None
    assert (routing.alpha == alpha).all()
    if fusion == "vu":
        layer(batch.x)  # it needs no instruction


FED_BACK = [
    (plain, "torch"),
    (plain.but(mask=True, dropout=0.2, lengths=(5, 0, 9)), "torch"),
    (plain.but(fusion="vu"), "torch"),
    (plain.but(fusion="if", shared=True), "torch"),
    (plain.but(top_k=2, M=3, N=5), "torch"),  # the gates have to be given too
    pytest.param(plain.but(top_k=2, M=3, N=5, mask=True, dropout=0.2), "triton", marks=interpreter),
]


@pytest.mark.parametrize(("case", "backend"), FED_BACK, ids=str)
def test_routes_fed_back(case: Case, backend: str):
    """The routes of a forward, given to the next one, reproduce it bit for bit: that is how decoding keeps the
    prompt's routes, and how a recomputed forward keeps its own.

    Triton's interpreter multiplies by NumPy, where on some CPUs a column's last bits depend on how many there are; and
    without routers there are fewer.
    """
    layer, batch = build(case, torch.float32)
    expected = run(layer, batch, backend)
    routing = layer.last_routing()
    del batch.keywords["instruction"]
    batch.keywords.update(routes=routing.routes)
    if case.top_k > 1:
        batch.keywords.update(gates=routing.gates)
    again = run(layer, batch, backend)
    assert layer.last_routing().logits == (None, None)
    for mine, theirs in zip(layer.last_routing().routes, routing.routes, strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)
    for name in expected:
        if not (
            case.top_k > 1 and (name in ("dvu_router", "dif_router") or name == "dx")
        ):  # given routes teach no router
            off = error(again[name], expected[name])
            assert off <= (1e-6 if backend == "triton" else 0), (name, off)


def test_one_instruction_for_all():
    """(e,) is (B, e) with equal rows, bit for bit."""
    layer, batch = build(plain.but(shared=True, router_grad="straight_through"), torch.float32)
    shared = run(layer, batch, "torch")
    embedding = batch.keywords["instruction"]
    batch.keywords["instruction"] = embedding[None].expand(3, -1)
    expanded = run(layer, batch, "torch")
    batch.keywords["instruction"] = embedding[None].repeat(3, 1)
    repeated = run(layer, batch, "torch")
    for name in shared:
        assert torch.equal(shared[name], expanded[name]) and torch.equal(shared[name], repeated[name]), name


def test_gradient_of_the_instruction():
    """Where the routers learn, so can what makes the embedding, for one shared embedding as for one a sample."""
    layer, batch = build(plain.but(top_k=2, shared=True), torch.float64)
    embedding = batch.keywords["instruction"]
    rows = embedding.repeat(3, 1).requires_grad_()
    one = embedding.clone().requires_grad_()
    for instruction in (rows, one):
        layer(batch.x, instruction=instruction).backward(batch.cotangent)
    assert rows.grad.any() and error(one.grad, rows.grad.sum(0)) < 1e-12


PACKED = [
    plain,
    plain.but(mask=True),
    plain.but(top_k=2, M=3, mask=True),  # the routers' gradients through the mean
    plain.but(fusion="if"),
]


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_equals_padded(case: Case):
    """The same instances, packed (in both shapes) and padded on the right under a route_mask."""
    lengths = (5, 1, 17, 8)
    layer, packed = build(case.but(lengths=lengths), torch.float32)
    S = max(lengths)
    place = torch.cat([b * S + torch.arange(length) for b, length in enumerate(lengths)])
    x = torch.full((4 * S, case.d), 1e2)  # what is in the padding does not matter
    x[place] = packed.x
    mask = torch.zeros(4 * S, dtype=torch.bool)
    mask[place] = packed.keywords.get("route_mask", torch.ones(sum(lengths), dtype=torch.bool))
    cotangent = torch.zeros(4 * S, case.k)
    cotangent[place] = packed.cotangent
    padded = type(packed)(
        x.view(4, S, -1),
        cotangent.view(4, S, -1),
        {"instruction": packed.keywords["instruction"], "route_mask": mask.view(4, S)},
    )
    expected, got = run(layer, padded, "torch"), run(layer, packed, "torch")
    for name in ("y", "dx"):
        expected[name] = expected[name].flatten(0, 1)[place]
    agree(got, expected, ROUNDING[torch.float32])
    packed.x, packed.cotangent = packed.x[None], packed.cotangent[None]
    if "route_mask" in packed.keywords:
        packed.keywords["route_mask"] = packed.keywords["route_mask"][None]
    batched = run(layer, packed, "torch")
    assert batched["y"].shape[0] == 1
    for name in got:
        assert torch.equal(batched[name].view(got[name].shape), got[name]), name


# how 240 samples come to the layer: name, (order of the samples, batch size, how they are laid out, what pads them)
ARRANGEMENTS = {
    "one by one": (False, 1, "right", 0.0),  # what all others are compared with
    "batch": (False, 16, "right", 0.0),
    "one batch": (False, 240, "right", 0.0),
    "shuffled": (True, 16, "right", 0.0),  # other neighbours, other positions
    "left": (True, 16, "left", 0.0),
    "large padding": (True, 16, "right", 1e4),  # what the padding holds does not matter
    "large left padding": (False, 7, "left", -1e4),
    "NaN padding": (False, 16, "right", float("nan")),  # as attention over fully masked rows leaves it
    "NaN left padding": (False, 16, "left", float("nan")),
    "packed": (False, 16, "packed", 0.0),
    "packed, shuffled": (True, 48, "packed", 0.0),
}


def routed(layer: FusedSMoLoRA, samples: list[Tensor], embeddings: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The VU and IF logits of every sample, as an arrangement has them, in the samples' own order."""
    shuffled, size, layout, filler = ARRANGEMENTS[name]
    count = len(samples)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(4)) if shuffled else torch.arange(count)
    logits: list[list[Tensor]] = [[], []]
    for chosen in order.split(size):
        mine = [samples[i] for i in chosen.tolist()]
        instruction = embeddings[chosen]
        if layout == "packed":
            cu = torch.tensor([0, *torch.tensor([len(x) for x in mine]).cumsum(0).tolist()], dtype=torch.int32)
            layer(torch.cat(mine), instruction=instruction, cu_seqlens=cu)
        else:
            S = max(map(len, mine))
            x = torch.full((len(mine), S, mine[0].shape[1]), filler)
            mask = torch.zeros(x.shape[:2], dtype=torch.bool)
            for row, sample in enumerate(mine):
                places = slice(0, len(sample)) if layout == "right" else slice(S - len(sample), S)
                x[row, places], mask[row, places] = sample, True
            layer(x, instruction=instruction, route_mask=mask)
        for branch, z in enumerate(layer.last_routing().logits):
            logits[branch].append(z)
    back = torch.argsort(order)
    return tuple(torch.cat(parts)[back] for parts in logits)


@pytest.fixture(scope="module")
def samples() -> tuple[FusedSMoLoRA, list[Tensor], Tensor, tuple[Tensor, Tensor]]:
    """A layer, 240 samples of 1 to 40 tokens, their embeddings, and their logits one by one."""
    layer, _ = build(plain.but(d=64, k=8, M=5, N=3), torch.float32)
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 41, (240,), generator=random).tolist()
    rows = [torch.randn(length, 64, generator=random) for length in lengths]
    embeddings = torch.randn(240, 24, generator=random)
    layer.requires_grad_(False)
    return layer, rows, embeddings, routed(layer, rows, embeddings, "one by one")


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_routes_depend_on_the_sample_alone(name: str, samples):
    """Neither batch, nor padding, nor a sample's position changes its route, ties within rounding apart."""
    layer, rows, embeddings, alone = samples
    for branch, (mine, theirs) in enumerate(zip(alone, routed(layer, rows, embeddings, name), strict=True)):
        top = mine.topk(2).values
        clear = top[:, 0] - top[:, 1] >= 1e-5
        assert clear.sum() >= 230 and len(mine.argmax(-1).unique()) == mine.shape[1], branch  # a test worth its name
        assert torch.equal(mine.argmax(-1)[clear], theirs.argmax(-1)[clear]), branch
        assert error(theirs, mine) < 1e-5, branch


@pytest.mark.parametrize("filler", [1e4, float("nan")])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreter)])
def test_padding_changes_no_result(filler: float, backend: str):
    """Whatever stands in the padding on either side, the tokens between come out as they do alone."""
    layer, batch = build(plain, torch.float32)
    layer.requires_grad_(False)
    padded = nn.functional.pad(batch.x, (0, 0, 3, 2), value=filler)
    mask = nn.functional.pad(torch.ones(batch.x.shape[:2], dtype=torch.bool), (3, 2))
    with smolora.use_backend(backend):
        expected = layer(batch.x, **batch.keywords)
        routes = layer.last_routing().routes
        got = layer(padded, **batch.keywords, route_mask=mask)
    for mine, theirs in zip(routes, layer.last_routing().routes, strict=True):
        assert torch.equal(mine, theirs)
    assert error(got[:, 3:-2], expected) < 1e-6


BROKEN = [(float("inf"), "torch"), (float("nan"), "torch"), pytest.param(float("nan"), "triton", marks=interpreter)]


@pytest.mark.parametrize(("value", "backend"), BROKEN)
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_broken_sample_breaks_no_other(value: float, packed: bool, backend: str):
    """An overflow in one sample stays in that sample's route and output."""
    layer, batch = build(plain.but(lengths=(7, 7, 7)) if packed else plain, torch.float32)
    layer.requires_grad_(False)
    with smolora.use_backend(backend):
        expected = layer(batch.x, **batch.keywords).view(3, 7, -1)
        routes = layer.last_routing().routes
        x = batch.x.clone()
        x.view(3, 7, -1)[1, 2, 3] = value
        got = layer(x, **batch.keywords).view(3, 7, -1)
    for mine, theirs in zip(routes, layer.last_routing().routes, strict=True):
        assert torch.equal(mine[::2], theirs[::2])
    assert torch.equal(got[::2], expected[::2])
