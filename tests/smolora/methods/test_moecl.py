"""MoE-CL's block against the released code, against its equations in float64, and in every backend."""

import copy
import json
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import smolora
from smolora.methods.moecl import PROJECTIONS, FusedMoECL, MoECLConfig
from smolora.reference import moecl_forward
from support.marks import interpreter
from support.oracle import agree, complaints, drawn_seed
from support.project import GOLDEN

RELEASED = {"w1": "gate", "w3": "up", "w2": "down"}


class Block(nn.Module):
    """A feed-forward block as Llama's."""

    def __init__(self, d: int, m: int, dtype: torch.dtype = torch.float32, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(d, m, bias=bias, dtype=dtype) for _ in range(2))
        self.down_proj = nn.Linear(m, d, bias=bias, dtype=dtype)
        self.act_fn = F.silu

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@dataclass(frozen=True)
class Case:
    """A block and a batch. `lengths` packs sequences of these lengths; else there are B of S tokens."""

    B: int = 3
    S: int = 9
    d: int = 40
    m: int = 56
    tasks: int = 4
    dropout: float = 0.0
    double_softmax: bool = True
    mask: bool = False
    lengths: tuple[int, ...] | None = None
    one_task: bool = False

    def but(self, **changes) -> "Case":
        return replace(self, **changes)

    def __str__(self) -> str:
        default = Case()
        changed = {f: v for f, v in vars(self).items() if v != getattr(default, f)}
        return "-".join(f"{name}={value}" for name, value in changed.items()) or "plain"


CASES = [
    Case(),
    Case(dropout=0.25, mask=True),
    Case(one_task=True, double_softmax=False),
    Case(lengths=(4, 9, 1), dropout=0.1, mask=True, double_softmax=False),
    Case(tasks=1, lengths=(5, 0, 20)),  # a sequence without tokens
]


def build(case: Case, dtype: torch.dtype) -> tuple[FusedMoECL, Tensor, Tensor, dict]:
    """A block with random nonzero parameters (rounded to `dtype`), x, a cotangent, and the call's arguments."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    options = {"num_tasks": case.tasks, "double_softmax": case.double_softmax, "lora_dropout": case.dropout}
    layer = FusedMoECL(Block(case.d, case.m, dtype), MoECLConfig(r=8, lora_alpha=16, **options))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            scale = 1.0 if name in ("router", "discriminator") else parameter.shape[-1] ** -0.5
            parameter.copy_((draw(*parameter.shape) * scale).to(dtype))
    lengths = (case.S,) * case.B if case.lengths is None else case.lengths
    shape = (case.B, case.S) if case.lengths is None else (sum(lengths),)
    x, cotangent = draw(*shape, case.d).to(dtype), draw(*shape, case.d).to(dtype)
    call: dict = {"task": torch.randint(case.tasks, (len(lengths),), generator=random)}
    if case.one_task:
        call["task"] = 2
    if case.lengths is not None:
        call["cu_seqlens"] = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    if case.mask:
        call["route_mask"] = torch.rand(shape, generator=random) < 0.6
        call["route_mask"].view(-1)[[0, sum(lengths[:2]), sum(lengths) - 1]] = True
        call["route_mask"].view(-1)[lengths[0] :][:1] = True
    return layer, x, cotangent, call


def own(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters, without the block's."""
    return dict(layer.named_parameters(recurse=False))


def gradients(y: Tensor, loss: Tensor, x: Tensor, named: dict[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
    """y, the loss, and the gradients of <y, cotangent> + loss."""
    total = (y.to(cotangent.dtype) * cotangent).sum() + loss
    found = torch.autograd.grad(total, [x, *named.values()])
    return {"y": y.detach(), "loss": loss.detach(), **dict(zip(["dx", *(f"d{n}" for n in named)], found, strict=True))}


def run(case: Case, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    layer, x, cotangent, call = build(case, dtype)
    x.requires_grad_()
    torch.manual_seed(1)
    with smolora.use_backend(backend):
        y = layer(x, **call)
        return gradients(y, layer.discriminator_loss(), x, own(layer), cotangent)


def reference(case: Case, dtype: torch.dtype, computed: torch.dtype) -> dict[str, Tensor]:
    """The same from the equations: the gradient of the loss is reversed but for the discriminator's own."""
    layer, x, cotangent, call = build(case, dtype)
    x = x.to(computed).requires_grad_()
    named = {name: p.detach().to(computed).requires_grad_() for name, p in own(layer).items()}
    block = tuple(layer.base_layer.get_parameter(f"{name}_proj.weight").detach() for name in PROJECTIONS)
    if isinstance(call["task"], int):
        call["task"] = torch.full((case.B,), call["task"])
    if case.dropout:
        call |= {"dropout": case.dropout, "seed": drawn_seed(1)}
    y, loss = moecl_forward(x, block, *named.values(), **call, scaling=2.0, double_softmax=case.double_softmax)
    found = gradients(y, -loss, x, named, cotangent.to(computed))
    found["loss"] = loss.detach()
    found["ddiscriminator"] = -found["ddiscriminator"]
    return found


def check(case: Case, dtype: torch.dtype, backend: str) -> None:
    got, truth = run(case, dtype, backend), reference(case, dtype, torch.float64)
    if dtype == torch.float64:
        agree(got, truth, 1e-12)
        return
    found = complaints(got, truth, reference(case, dtype, dtype), dtype)
    assert not found, "; ".join(found)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_against_float64(case: Case, dtype: torch.dtype):
    check(case, dtype, "torch")


@interpreter
@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
def test_triton(case: Case):
    check(case.but(d=24, m=40), torch.float32, "triton")


@pytest.mark.parametrize("name", ["moecl_ffn_fp32", "moecl_ffn_fp32_w003"])
def test_released(name: str):
    """The block of the released code: y, the loss, and all gradients, of the sum and of the loss alone."""
    with safe_open(GOLDEN / f"methods/{name}.safetensors", "pt") as file:
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        facts = {key: json.loads(v) for key, v in file.metadata().items() if v[:1] in "0123456789"}
    config = MoECLConfig(
        r=facts["r"],
        lora_alpha=facts["lora_alpha"],
        lora_dropout=0.0,
        num_tasks=facts["num_experts"] - 1,
        discriminator_weight=facts["aux_weight"],
    )
    layer = FusedMoECL(Block(facts["dim"], facts["intermediate"]), config)
    places = {"moes_.gate_.weight": layer.router, "moes_.task_classifier_.weight": layer.discriminator}
    with torch.no_grad():
        for released, ours in RELEASED.items():
            base = layer.base_layer.get_submodule(f"{ours}_proj")
            base.weight.copy_(golden[f"param.mlp_.{released}_.base_layer_.weight"])
            for letter in "AB":
                for e in range(facts["num_experts"]):
                    key = f"mlp_.{released}_.loras_.expert{e}.lora_{letter.lower()}_.weight"
                    layer.get_parameter(f"{ours}_{letter}")[e].copy_(golden[f"param.{key}"])
        for key, parameter in places.items():
            parameter.copy_(golden[f"param.{key}"])
    x = golden["x"].clone().requires_grad_()
    y = layer(x, facts["task_id"] - 1, route_mask=golden["attention_mask"].bool())
    loss = layer.discriminator_loss()
    agree({"y": y.detach(), "loss": loss.detach().view(1)}, {"y": golden["y"], "loss": golden["aux_loss"]}, 1e-5)
    main = (y * golden["dy"]).sum()
    for prefix, dx, objective in (
        ("grad_aux.", "dx_aux", loss),
        ("grad.", "dx", main + config.discriminator_weight * loss),
    ):
        layer.zero_grad()
        x.grad = None
        objective.backward(retain_graph=True)
        sign = -1 if prefix == "grad_aux." else 1  # there nothing is reversed
        got, expected = {"dx": sign * x.grad}, {"dx": golden[dx]}
        for key in (key for key in golden if key.startswith(prefix)):
            inner = key.removeprefix(prefix)
            if inner in places:
                got[key] = places[inner].grad
            else:
                _, released, _, expert, letter, _ = inner.split(".")
                name = f"{RELEASED[released[:2]]}_{letter[5].upper()}"
                got[key] = sign * layer.get_parameter(name).grad[int(expert.removeprefix("expert"))]
            expected[key] = golden[key]
        assert len(got) >= 8
        agree(got, expected, 1e-5)


def test_starts_as_the_block():
    """B is zero: a new adapter changes nothing. Its parameters count two experts, and w = 0 freezes C."""
    block = Block(16, 24, bias=True)
    layer = FusedMoECL(block, MoECLConfig(r=4, num_tasks=3, discriminator_weight=0.0))
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(layer(x, 1), block(x))
    assert not any(p.requires_grad for p in block.parameters())
    assert layer.num_trained() == 2 * 4 * (2 * (16 + 24) + (24 + 16)) + 2 * 16
    with pytest.raises(RuntimeError, match=r"discriminator_loss\(\) needs a forward in training mode"):
        layer.discriminator_loss()


def test_other_tasks_keep_their_bits():
    """Under AdamW with weight decay and momentum of their own training."""
    layer, x, _, _ = build(Case(), torch.float32)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.1)
    for task, steps in ((0, 3), (2, 4)):
        before = copy.deepcopy(layer.state_dict())
        for _ in range(steps):
            optimizer.zero_grad()
            (layer(x, task).square().mean() + layer.discriminator_loss()).backward()
            optimizer.step()
        for name in layer.sliced:
            same = [torch.equal(a, b) for a, b in zip(before[name], layer.get_parameter(name), strict=True)]
            assert same == [e not in (0, task + 1) for e in range(5)], name
        assert not torch.equal(before["router"], layer.router)
        assert not torch.equal(before["discriminator"], layer.discriminator)


def test_the_discriminator_learns_and_the_shared_expert_hides():
    """With one optimiser on the loss: alone, C gets it down; upstream of C, steps raise it."""
    layer, x, _, call = build(Case(double_softmax=False), torch.float64)

    def loss_after(names: list[str]) -> float:
        trained = copy.deepcopy(layer)
        optimizer = torch.optim.SGD([trained.get_parameter(name) for name in names], lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            trained(x, **call)
            loss = trained.discriminator_loss()
            loss.backward()
            optimizer.step()
        trained(x, **call)
        return trained.discriminator_loss().item()

    layer(x, **call)
    start = layer.discriminator_loss().item()
    assert loss_after(["discriminator"]) < start - 1e-6
    assert loss_after(["down_A", "down_B", "gate_B", "up_B"]) > start + 1e-6


def test_state_dict_round_trip():
    layer, x, _, call = build(Case(), torch.float32)
    other = FusedMoECL(Block(40, 56), layer.config)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x, **call), other(x, **call))


def test_mixed_tasks_equal_one_by_one():
    layer, x, _, call = build(Case(), torch.float64)
    layer.eval()
    together = layer(x, **call)
    alone = torch.cat([layer(x[i : i + 1], int(call["task"][i])) for i in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert len(set(call["task"].tolist())) > 1


def test_checkpointed():
    """Recomputed in the backward, with the same masks; what is recomputed is not kept."""
    layer, x, cotangent, call = build(Case(dropout=0.25), torch.float32)
    results = []
    for again in (False, True):
        torch.manual_seed(1)
        rows = x.clone().requires_grad_()
        y = checkpoint(layer, rows, use_reentrant=False, **call) if again else layer(rows, **call)
        results.append(gradients(y, layer.discriminator_loss(), rows, own(layer), cotangent))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert layer._discrimination is None


def test_the_output_leads_to_every_parameter():
    """As DistributedDataParallel finds those that a forward has used; its gradient through y alone is zero, though."""
    layer, x, cotangent, call = build(Case(), torch.float32)
    y = layer(x, **call)
    todo, seen = [y.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [child for child, _ in node.next_functions]
    found = {id(node.variable) for node in seen if hasattr(node, "variable")}
    assert {id(parameter) for parameter in own(layer).values()} <= found
    y.backward(cotangent)
    assert layer.discriminator.grad is None and layer.router.grad.any()


def test_compile_fullgraph():
    layer, x, cotangent, call = build(Case(), torch.float32)
    x.requires_grad_()
    expected = gradients(layer(x, **call), layer.discriminator_loss(), x, own(layer), cotangent)
    torch._dynamo.reset()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, **call)
    agree(gradients(y, layer.discriminator_loss(), x, own(layer), cotangent), expected, 1e-5)


def test_autocast():
    """Gates and discriminator are computed in float32 there, everything else in bfloat16."""
    layer, x, _, call = build(Case(), torch.float32)
    expected, expected_loss = layer(x, **call), layer.discriminator_loss()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, **call)
    assert y.dtype == torch.bfloat16
    agree({"y": y, "loss": layer.discriminator_loss()}, {"y": expected, "loss": expected_loss}, 1e-2)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"task": 4}, ValueError, "task must name a task of the adapter, 0 to 3, got 4"),
        ({"task": torch.tensor([0, 1])}, ValueError, r"task must be a tensor of shape \(3,\), got shape \(2,\)"),
        ({"route_mask": torch.ones(3, 9)}, ValueError, "route_mask must be bool of shape"),
        ({"x": torch.ones(3, 9, 8)}, ValueError, "x must have 40 inputs"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)
def test_bad_input(changes: dict, kind: type, message: str):
    layer, x, _, call = build(Case(), torch.float32)
    with pytest.raises(kind, match=message):
        layer(**{"x": x, **call, **changes})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tasks": 0}, "num_tasks must be a positive integer, got 0"),
        ({"discriminator_weight": -1}, "discriminator_weight must be a number of at least 0, got -1"),
        ({"double_softmax": 1}, "double_softmax must be True or False, got 1"),
    ],
)
def test_bad_configuration(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MoECLConfig(**options)


def test_bad_block():
    with pytest.raises(TypeError, match="a feed-forward block must have linear layers gate_proj and up_proj"):
        FusedMoECL(nn.Linear(4, 4), MoECLConfig())
    block = Block(8, 12)
    block.down_proj = nn.Linear(8, 12)
    with pytest.raises(TypeError, match=r"got Block with .*'down': \(8, 12\)"):
        FusedMoECL(block, MoECLConfig())
    with pytest.raises(TypeError, match="config must be a MoECLConfig, got LiLoRAConfig"):
        FusedMoECL(Block(8, 12), smolora.LiLoRAConfig())
