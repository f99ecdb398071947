"""Bad input: one clear error that names argument, value and expectation, before anything runs."""

import numpy as np
import pytest
import torch
from torch import nn

import smolora
from smolora import FusedSMoLoRA, SMoLoRAConfig
from smolora.engine import cpu_passes
from support.marks import interpreter

BACKENDS = ["torch", pytest.param("triton", marks=interpreter)]

NAN, INF = float("nan"), float("inf")


def linear_layer(**arguments) -> FusedSMoLoRA:
    """d = 6, k = 10, e = 8, two VU and three IF experts."""
    defaults = dict(r=4, num_vu_experts=2, num_if_experts=3, instruction_dim=8, lora_dropout=0.05)
    return FusedSMoLoRA(nn.Linear(6, 10), SMoLoRAConfig(**{**defaults, **arguments}))


def x(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.ones(*(shape or (3, 4, 6)), dtype=dtype, device=device)


def emb(*shape: int, **bad: float) -> torch.Tensor:
    """An embedding a sample, with a bad value in row 1 where one is given."""
    values = torch.ones(*(shape or (3, 8)))
    for value in bad.values():
        values.view(-1, 8)[-2 if values.dim() == 2 else 0, 3] = value
    return values


def mask(*empty: int) -> torch.Tensor:
    """(3, 4), without a token for the instances named."""
    keep = torch.ones(3, 4, dtype=torch.bool)
    keep[list(empty)] = False
    return keep


def cu(*bounds: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(bounds, dtype=dtype)


def experts(*chosen: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(chosen, dtype=dtype)


ok = experts(0, 1, 1)

# (what is wrong, x, keywords, exception, words of the message); the layer is `linear_layer()`
CALLS = [
    # x
    ("last dimension", x(3, 4, 7), dict(instruction=emb()), ValueError, ["x must", "6", "last dimension", "(3, 4, 7)"]),
    ("transposed", x(3, 6, 4), dict(instruction=emb()), ValueError, ["x must", "6", "(3, 6, 4)"]),
    ("no dimension", torch.tensor(1.0), dict(instruction=emb()), ValueError, ["x must", "6", "()"]),
    ("two dimensions", x(3, 6), dict(instruction=emb()), ValueError, ["x must", "cu_seqlens", "(3, 6)"]),
    ("four dimensions", x(1, 3, 4, 6), dict(instruction=emb()), ValueError, ["x must", "(B, S, 6)", "(1, 3, 4, 6)"]),
    ("integers", x(dtype=torch.int64), dict(instruction=emb()), TypeError, ["x must", "floating", "torch.int64"]),
    ("booleans", x(dtype=torch.bool), dict(instruction=emb()), TypeError, ["x must", "floating", "torch.bool"]),
    ("complex", x(dtype=torch.complex64), dict(instruction=emb()), TypeError, ["x must", "floating", "complex64"]),
    ("no tensor", np.ones((3, 4, 6)), dict(instruction=emb()), TypeError, ["x must", "tensor", "ndarray"]),
    # devices
    ("x elsewhere", x(device="meta"), dict(instruction=emb()), ValueError, ["device", "meta", "cpu"]),
    (
        "instruction elsewhere",
        x(),
        dict(instruction=emb().to("meta")),
        ValueError,
        ["instruction must", "device", "cpu", "meta"],
    ),
    (
        "mask elsewhere",
        x(),
        dict(instruction=emb(), route_mask=mask().to("meta")),
        ValueError,
        ["route_mask must", "device", "cpu", "meta"],
    ),
    (
        "boundaries elsewhere",
        x(12, 6),
        dict(instruction=emb(), cu_seqlens=cu(0, 4, 8, 12).to("meta")),
        ValueError,
        ["cu_seqlens must", "device", "cpu", "meta"],
    ),
    ("routes elsewhere", x(), dict(routes=(ok, ok.to("meta"))), ValueError, ["routes[1] must", "cpu", "meta"]),
    (
        "layer elsewhere",
        x(device="meta"),
        dict(instruction=emb().to("meta")),
        ValueError,
        ["parameters must", "device", "meta", "cpu"],
    ),
    # instruction
    ("missing", x(), {}, ValueError, ["instruction must", "(8,)", "(3, 8)", "None"]),
    ("a row too many", x(), dict(instruction=emb(4, 8)), ValueError, ["instruction must", "(3, 8)", "(4, 8)", "batch"]),
    ("one row of a batch", x(), dict(instruction=emb(1, 8)), ValueError, ["instruction must", "(3, 8)", "(1, 8)"]),
    ("embedding size", x(), dict(instruction=torch.ones(3, 9)), ValueError, ["instruction must", "(3, 8)", "(3, 9)"]),
    ("one of wrong size", x(), dict(instruction=torch.ones(3)), ValueError, ["instruction must", "(8,)", "(3,)"]),
    ("a row a token", x(), dict(instruction=emb(3, 4, 8)), ValueError, ["instruction must", "(3, 8)", "(3, 4, 8)"]),
    (
        "row a packed instance",
        x(12, 6),
        dict(instruction=emb(), cu_seqlens=cu(0, 6, 12)),
        ValueError,
        ["instruction must", "(2, 8)", "(3, 8)"],
    ),
    ("integer instruction", x(), dict(instruction=emb().long()), TypeError, ["instruction must", "float", "int64"]),
    ("text", x(), dict(instruction="Name the digit."), TypeError, ["instruction must", "tensor", "str"]),
    ("rows in a list", x(), dict(instruction=[[1.0] * 8] * 3), TypeError, ["instruction must", "tensor", "list"]),
    ("NaN", x(), dict(instruction=emb(nan=NAN)), ValueError, ["instruction must", "finite", "NaN", "[1]"]),
    ("infinity", x(), dict(instruction=emb(inf=-INF)), ValueError, ["instruction must", "finite", "infinity", "[1]"]),
    ("NaN in one for all", x(), dict(instruction=emb(8, nan=NAN)), ValueError, ["instruction must", "finite"]),
    (
        "NaN, packed",
        x(12, 6),
        dict(instruction=emb(nan=NAN), cu_seqlens=cu(0, 4, 8, 12)),
        ValueError,
        ["instruction must", "finite", "[1]"],
    ),
    # route_mask
    (
        "empty mask",
        x(),
        dict(instruction=emb(), route_mask=mask(1, 2)),
        ValueError,
        ["route_mask must", "every instance", "[1, 2]"],
    ),
    (
        "empty mask, packed",
        x(12, 6),
        dict(instruction=emb(), cu_seqlens=cu(0, 4, 8, 12), route_mask=mask(1).view(-1)),
        ValueError,
        ["route_mask must", "every instance", "[1]"],
    ),
    (
        "mask of integers",
        x(),
        dict(instruction=emb(), route_mask=mask().long()),
        ValueError,
        ["route_mask must", "bool", "(3, 4)", "torch.int64"],
    ),  # as an attention mask is
    (
        "mask of floats",
        x(),
        dict(instruction=emb(), route_mask=mask().float()),
        ValueError,
        ["route_mask must", "bool", "torch.float32"],
    ),
    (
        "mask too short",
        x(),
        dict(instruction=emb(), route_mask=mask()[:, :3]),
        ValueError,
        ["route_mask must", "(3, 4)", "(3, 3)"],
    ),
    (
        "mask of x's shape",
        x(),
        dict(instruction=emb(), route_mask=x().bool()),
        ValueError,
        ["route_mask must", "(3, 4)", "(3, 4, 6)"],
    ),
    (
        "mask unpacked",
        x(12, 6),
        dict(instruction=emb(), cu_seqlens=cu(0, 4, 8, 12), route_mask=mask()),
        ValueError,
        ["route_mask must", "(12,)", "(3, 4)"],
    ),
    (
        "mask in a list",
        x(),
        dict(instruction=emb(), route_mask=mask().tolist()),
        TypeError,
        ["route_mask must", "tensor", "list"],
    ),
    # cu_seqlens
    (
        "boundaries int64",
        x(12, 6),
        dict(instruction=emb(), cu_seqlens=cu(0, 4, 8, 12, dtype=torch.int64)),
        ValueError,
        ["cu_seqlens must", "int32", "int64"],
    ),
    (
        "boundaries 2-D",
        x(12, 6),
        dict(instruction=emb(), cu_seqlens=cu(0, 4, 8, 12)[None]),
        ValueError,
        ["cu_seqlens must", "(n + 1,)", "(1, 4)"],
    ),
    (
        "no boundary",
        x(12, 6),
        dict(instruction=emb(), cu_seqlens=cu()),
        ValueError,
        ["cu_seqlens must", "(n + 1,)", "(0,)"],
    ),
    (
        "boundaries in a list",
        x(12, 6),
        dict(instruction=emb(), cu_seqlens=[0, 4, 8, 12]),
        TypeError,
        ["cu_seqlens must", "tensor", "list"],
    ),
    (
        "start",
        x(12, 6),
        dict(instruction=emb(), cu_seqlens=cu(1, 4, 8, 12)),
        ValueError,
        ["cu_seqlens must", "from 0", "12", "[1, 4, 8, 12]"],
    ),
    (
        "end short",
        x(12, 6),
        dict(instruction=emb(), cu_seqlens=cu(0, 4, 8, 11)),
        ValueError,
        ["cu_seqlens must", "12", "[0, 4, 8, 11]"],
    ),
    (
        "end beyond",
        x(12, 6),
        dict(instruction=emb(), cu_seqlens=cu(0, 4, 8, 13)),
        ValueError,
        ["cu_seqlens must", "12", "[0, 4, 8, 13]"],
    ),
    (
        "falling",
        x(12, 6),
        dict(instruction=emb(), cu_seqlens=cu(0, 8, 4, 12)),
        ValueError,
        ["cu_seqlens must", "rise", "[0, 8, 4, 12]"],
    ),
    (
        "falling, with a mask",
        x(12, 6),
        dict(instruction=emb(), cu_seqlens=cu(0, 20, 4, 12), route_mask=mask().view(-1)),
        ValueError,
        ["cu_seqlens must", "rise", "[0, 20, 4, 12]"],
    ),  # found before the mask is read by them
    (
        "tokens without an instance",
        x(12, 6),
        dict(instruction=emb(0, 8), cu_seqlens=cu(0)),
        ValueError,
        ["cu_seqlens must", "12", "[0]"],
    ),
    (
        "packed and batched",
        x(),
        dict(instruction=emb(), cu_seqlens=cu(0, 4, 8, 12)),
        ValueError,
        ["x must", "cu_seqlens", "(3, 4, 6)"],
    ),
    # routes and gates
    ("route too large", x(), dict(routes=(experts(0, 2, 1), ok)), ValueError, ["routes", "VU", "0 to 1", "2"]),
    ("route too large, IF", x(), dict(routes=(ok, experts(0, 2, 3))), ValueError, ["routes", "IF", "0 to 2", "3"]),
    ("route negative", x(), dict(routes=(ok, experts(0, -1, 1))), ValueError, ["routes", "IF", "0 to 2", "-1"]),
    (
        "route beyond int32",
        x(),
        dict(routes=(experts(0, 2**32, 1, dtype=torch.int64), ok)),
        ValueError,
        ["routes", "VU", "0 to 1"],
    ),  # it must not become a valid one on its way to int32
    ("a route short", x(), dict(routes=(ok, ok[:2])), ValueError, ["routes[1] must", "(3,)", "(2,)"]),
    (
        "two of top-1",
        x(),
        dict(routes=(torch.stack([ok, ok], 1), ok)),
        ValueError,
        ["routes[0] must", "(3,)", "(3, 2)"],
    ),
    ("routes as floats", x(), dict(routes=(ok.float(), ok)), ValueError, ["routes[0] must", "int32", "float32"]),
    ("routes as bools", x(), dict(routes=(ok, ok.bool())), ValueError, ["routes[1] must", "int32", "bool"]),
    ("one branch's routes", x(), dict(routes=(ok, None)), ValueError, ["routes[1] must", "(3,)", "None"]),
    ("no pair", x(), dict(routes=ok), ValueError, ["routes must", "pair", "Tensor"]),
    ("three of a pair", x(), dict(routes=(ok, ok, ok)), ValueError, ["routes must", "pair"]),
    ("gates alone", x(), dict(instruction=emb(), gates=(torch.ones(3, 1),) * 2), ValueError, ["gates must", "routes"]),
    (
        "gates' shape",
        x(),
        dict(routes=(ok, ok), gates=(torch.ones(3, 2),) * 2),
        ValueError,
        ["gates[0] must", "(3, 1)", "(3, 2)"],
    ),
    ("no pair of gates", x(), dict(routes=(ok, ok), gates=torch.ones(3, 1)), ValueError, ["gates must", "pair"]),
    ("integer gates", x(), dict(routes=(ok, ok), gates=(ok, ok)), ValueError, ["gates[0] must", "float", "int32"]),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "keywords", "exception", "words"), [row[1:] for row in CALLS], ids=[r[0] for r in CALLS]
)
def test_refused_calls(tokens, keywords: dict, exception: type, words: list[str], backend: str, monkeypatch):
    """The table above. Nothing ran: no pass was called, and the layer knows of no forward."""
    ran = lambda *_: pytest.fail("a pass ran on bad input")  # noqa: E731
    monkeypatch.setattr(cpu_passes, "route_shrink", ran)
    if backend == "triton":
        from smolora.kernels import passes

        monkeypatch.setattr(passes, "route_shrink", ran)
    layer = linear_layer()
    with smolora.use_backend(backend), pytest.raises(exception) as raised:
        layer(tokens, **keywords)
    message = str(raised.value)
    assert all(word in message for word in words), message
    with pytest.raises(RuntimeError, match="needs a forward first"):
        layer.last_routing()


# (layer, x, keywords, words): what other configurations demand
CONFIGURED = {
    "top_k routes": (dict(top_k=2), dict(routes=(ok, ok)), ["routes[0] must", "(3, 2)", "(3,)"]),
    "IF alone needs it": (dict(fusion="if"), {}, ["instruction must", "None"]),
    "mean needs it": (dict(fusion="mean"), {}, ["instruction must", "None"]),
    "IF routes of IF": (dict(fusion="if"), dict(routes=(ok, None)), ["routes[1] must", "None"]),
    "IF route too large": (dict(fusion="if"), dict(routes=(None, experts(0, 3, 0))), ["routes", "IF", "0 to 2", "3"]),
    "VU mask": (dict(fusion="vu"), dict(route_mask=mask(0)), ["route_mask must", "every instance", "[0]"]),
}


@pytest.mark.parametrize("name", CONFIGURED)
def test_refused_by_configuration(name: str):
    """What is missing or wrong depends on what the fusion uses and on how many experts are chosen."""
    arguments, keywords, words = CONFIGURED[name]
    with pytest.raises(ValueError) as raised:
        linear_layer(**arguments)(x(), **keywords)
    assert all(word in str(raised.value) for word in words), str(raised.value)


# looks bad, and is not: name: (configuration, x, keywords)
ACCEPTED = {
    "no instruction for VU alone": (dict(fusion="vu"), x(), {}),
    "no instruction with routes": ({}, x(), dict(routes=(ok, ok))),
    "routes of the branch in use": (dict(fusion="if"), x(), dict(routes=(None, ok))),
    "int64 routes": ({}, x(), dict(routes=(ok.long(), ok.long()))),
    "routes with an axis": ({}, x(), dict(routes=(ok[:, None], ok[:, None]))),
    "float64 instruction": ({}, x(), dict(instruction=emb().double())),  # as numpy makes them
    "half-precision instruction": ({}, x(), dict(instruction=emb().half())),
    "an empty packed instance": ({}, x(12, 6), dict(instruction=emb(), cu_seqlens=cu(0, 4, 4, 12))),
    "an empty instance's mask": (
        {},
        x(12, 6),
        dict(instruction=emb(), cu_seqlens=cu(0, 4, 4, 12), route_mask=torch.ones(12, dtype=torch.bool)),
    ),
    "nothing at all": ({}, x(0, 6), dict(instruction=emb(0, 8), cu_seqlens=cu(0))),
    "no token": ({}, x(3, 0, 6), dict(instruction=emb(), route_mask=torch.ones(3, 0, dtype=torch.bool))),
    "no instance": ({}, x(0, 4, 6), dict(instruction=emb(0, 8))),
    "strided x": ({}, x(3, 6, 4).mT, dict(instruction=emb())),
    "strided instruction": ({}, x(), dict(instruction=emb(8, 3).mT)),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_calls(name: str):
    """The checks refuse nothing that makes sense."""
    arguments, tokens, keywords = ACCEPTED[name]
    y = linear_layer(**arguments)(tokens, **keywords)
    assert tuple(y.shape) == (*tokens.shape[:-1], 10) and y.isfinite().all()


NOT_LINEAR = [
    nn.Conv1d(6, 10, 1),  # has a weight all the same
    nn.Embedding(6, 10),
    nn.Bilinear(6, 6, 10),
    nn.Sequential(nn.Linear(6, 10)),
    nn.Identity(),
    torch.ones(10, 6),  # a weight is no layer
    None,
]


@pytest.mark.parametrize("base", NOT_LINEAR, ids=lambda base: type(base).__name__)
def test_base_must_be_linear(base):
    with pytest.raises(TypeError, match=rf"linear must be a linear layer.*got {type(base).__name__}"):
        FusedSMoLoRA(base, SMoLoRAConfig())


@pytest.mark.parametrize("config", [None, {"r": 16}, 16, SMoLoRAConfig], ids=str)
def test_config_must_be_one(config):
    """Also not the class itself, nor what a YAML file gives."""
    with pytest.raises(TypeError, match=rf"config must be a SMoLoRAConfig, got {type(config).__name__}"):
        FusedSMoLoRA(nn.Linear(6, 10), config)


def test_a_refused_call_changes_nothing():
    """After an error the layer goes on as if it had not been called: same routes, same output."""
    layer = linear_layer(lora_dropout=0)
    expected = layer(x(), instruction=emb())
    routes = layer.last_routing().routes
    for _, tokens, keywords, exception, _ in CALLS:
        with pytest.raises(exception):
            layer(tokens, **keywords)
    assert all(torch.equal(a, b) for a, b in zip(routes, layer.last_routing().routes, strict=True))
    assert torch.equal(layer(x(), instruction=emb()), expected)
