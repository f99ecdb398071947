"""Every mixture's layer against its reference in float64, and what is promised of all of them."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import smolora
from smolora.engine import compiled
from support.layers import (
    BRANCH,
    LAYERS,
    LILORA,
    MOELORA,
    ROUTED,
    LayerCase,
    build_layer,
    check_layer,
    own_parameters,
    run_layer,
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FREEZE = {"branchlora": "freeze_branches", "routedlora": "freeze_experts"}
METHODS = [MOELORA, ROUTED.but(call="weights"), BRANCH, LILORA]


def freeze(layer: nn.Module, frozen: list[bool]) -> None:
    getattr(layer, FREEZE[layer.config.method])(torch.tensor(frozen))


@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(case: LayerCase, dtype: torch.dtype):
    check_layer(case, dtype, "torch")


@pytest.mark.parametrize("case", METHODS, ids=str)
@pytest.mark.parametrize("S", [0, 1, 65])
def test_token_counts(case: LayerCase, S: int):
    check_layer(case.but(S=S, dropout=0.1), torch.float32, "torch")


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_starts_as_the_base(case: LayerCase):
    """B is zero, A is not: a new adapter changes nothing, and its B gets a gradient at once."""
    _, batch = build_layer(case, torch.float32)
    mixture = smolora.MIXTURES[case.method]
    new = mixture.layer(nn.Linear(case.d, case.k), build_layer(case, torch.float32)[0].config)
    torch.testing.assert_close(new(batch.x, **batch.call), new.base_layer(batch.x))
    new(batch.x, **batch.call).backward(batch.cotangent)
    up = new.task_B if case.method == "lilora" else new.B
    assert up.grad.any() and not new.A.grad.any() and new.A.any()
    assert not any(p.requires_grad for p in new.base_layer.parameters())


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_state_dict_round_trip(case: LayerCase):
    layer, batch = build_layer(case, torch.float32)
    if case.method in FREEZE:
        freeze(layer, [True, False, True, False, False])
    other, _ = build_layer(case.but(seed=5), torch.float32)
    other.load_state_dict(layer.state_dict())
    expected, got = run_layer(layer, batch, "torch"), run_layer(other, batch, "torch")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert copy.deepcopy(layer).state_dict().keys() == layer.state_dict().keys()


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_compile_fullgraph(case: LayerCase):
    layer, batch = build_layer(case, torch.float32)
    expected = run_layer(layer.eval(), batch, "torch")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = batch.x.detach().requires_grad_()
    y = compiled(x, **batch.call)
    y.backward(batch.cotangent)
    assert torch.equal(y.detach(), expected["y"])
    assert torch.equal(x.grad, expected["dx"])
    for name, parameter in own_parameters(layer).items():
        torch.testing.assert_close(parameter.grad, expected[f"d{name}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_checkpointing(case: LayerCase):
    """A recomputed forward draws the same dropout seed and gives the same gradients."""
    layer, batch = build_layer(case.but(dropout=0.2), torch.float32)
    expected = run_layer(layer, batch, "torch")
    x = batch.x.detach().requires_grad_()
    torch.manual_seed(1)
    y = checkpoint(lambda x: layer(x, **batch.call), x, use_reentrant=False)
    y.backward(batch.cotangent)
    assert torch.equal(x.grad, expected["dx"])


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_batch_equals_one_by_one(case: LayerCase):
    layer, batch = build_layer(case, torch.float64)
    together = layer(batch.x, **batch.call)
    for i in range(case.B):
        own = {name: v[i : i + 1] if isinstance(v, torch.Tensor) else v for name, v in batch.call.items()}
        torch.testing.assert_close(layer(batch.x[i : i + 1], **own), together[i : i + 1])


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_memory_kept_for_backward(case: LayerCase):
    """Nothing k-sized: x, h, and a number a slot or expert for each token."""
    case = case.but(k=640, d=64, E=4)
    layer, _ = build_layer(case, torch.float32)

    def kept(S: int) -> int:
        _, batch = build_layer(case.but(S=S), torch.float32)
        sizes = {}
        ignored = {p.data_ptr() for p in layer.parameters()}

        def pack(t: torch.Tensor) -> torch.Tensor:
            if t.data_ptr() not in ignored:
                sizes[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(batch.x.requires_grad_(), **batch.call)
        return sum(sizes.values())

    columns = {"moelora": 4 * 8 + 4, "routedlora": 3 * 8, "branchlora": 8, "lilora": 8}[case.method]
    assert kept(40) - kept(8) <= 4 * 3 * 32 * (64 + columns) + 3 * 32  # and a mask of bytes


# --------------------------------------------------------------------------------------------------- slices that stay

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", [BRANCH, LILORA, ROUTED], ids=str)
def test_what_is_not_in_use_stays(case: LayerCase, optimizer: str):
    """First everything is in use and gathers momentum; then one task, or one expert, is: the rest keeps its bits."""
    layer, batch = build_layer(case.but(B=6, seed=2), torch.float32)
    opt = OPTIMIZERS[optimizer]([p for p in layer.parameters() if p.requires_grad])
    alone = {"experts": torch.full((6, 1), 2)} if case.method == "routedlora" else {"task": 2}
    every = (
        [{"experts": torch.arange(6)[:, None] % 5}] if case.method == "routedlora" else [{"task": t} for t in (0, 1, 2)]
    )

    def step(calls: list[dict]) -> None:
        opt.zero_grad()
        for call in calls:
            layer(batch.x, **call).square().mean().backward()
        opt.step()

    for _ in range(2):
        step(every)
    if case.method == "branchlora":
        layer.freeze_branches(torch.tensor([True, True, True, True, False]))
    before = {name: p.detach().clone() for name, p in own_parameters(layer).items()}
    for _ in range(3):
        step([alone])
    moved = {}
    for name, parameter in own_parameters(layer).items():
        if name in layer.sliced:
            changed = (parameter != before[name]).reshape(len(parameter), -1).any(1)
            moved[name] = changed.nonzero().flatten().tolist()
    expected = {"lilora": {"task_A": [2], "task_B": [2], "task_logit": [2]}, "routedlora": {"A": [2], "B": [2]}}
    if case.method == "branchlora":  # the one branch that is not frozen moves where it was chosen
        expected["branchlora"] = {"router": [2], "B": [4] if 4 in layer.last_routing().ids else []}
    assert moved == expected[case.method]


def test_frozen_branches_stay_through_saving(tmp_path):
    layer, batch = build_layer(BRANCH.but(B=6, options=(("top_k", 5),)), torch.float32)
    layer.freeze_branches(torch.tensor([False, True, False, False, True]))
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other, _ = build_layer(BRANCH.but(seed=9, options=(("top_k", 5),)), torch.float32)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert other.frozen_branches.tolist() == [False, True, False, False, True]
    opt = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    before = other.B.detach().clone()
    for _ in range(3):
        opt.zero_grad()
        other(batch.x, task=0).square().mean().backward()
        assert not other.B.grad[other.frozen_branches].any() and other.B.grad[0].any()
        opt.step()
    changed = (before != other.B).flatten(1).any(1)
    assert changed.tolist() == [True, False, True, True, False]
    other.freeze_branches(torch.tensor([True, False, False, False, False]))  # the others stay frozen
    assert other.frozen_branches.tolist() == [True, True, False, False, True]


def test_frozen_experts_stay_through_saving(tmp_path):
    """Under AdamW with momentum and weight decay, while x and the weights get the gradients that they had."""
    case = ROUTED.but(B=5, call="weights", dropout=0.1)
    layer, batch = build_layer(case, torch.float32)
    batch.call["experts"] = (torch.arange(5)[:, None] + torch.arange(3)) % 5
    free = run_layer(layer, batch, "torch")
    freeze(layer, [False, True, False, False, True])
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other, _ = build_layer(case.but(seed=9), torch.float32)
    opt = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)

    def step() -> dict[str, torch.Tensor]:
        got = run_layer(other, batch, "torch")
        for name, parameter in own_parameters(other).items():
            parameter.grad = got[f"d{name}"]
        opt.step()
        return got

    step()  # momentum for every expert
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    before = {name: p.detach().clone() for name, p in own_parameters(other).items()}
    got = step()
    assert all(torch.equal(got[name], free[name]) for name in ("y", "dx", "dweights"))
    trains = [True, False, True, True, False]
    for name in ("dA", "dB"):
        assert torch.equal(got[name][trains], free[name][trains])
        assert free[name][1].any() and not got[name][other.frozen_experts].any()
    step()
    for name, parameter in own_parameters(other).items():
        assert (before[name] != parameter).flatten(1).any(1).tolist() == [True, False, True, True, False]
    other.freeze_experts(torch.tensor([True, False, False, False, False]))  # the others stay frozen
    assert other.frozen_experts.tolist() == [True, True, False, False, True]


def test_state_without_a_mask_of_frozen_experts():
    """Adapters saved before experts could be frozen load: none is frozen."""
    layer, _ = build_layer(ROUTED, torch.float32)
    freeze(layer, [True, False, False, False, False])
    state = layer.state_dict()
    del state["frozen_experts"]
    layer.load_state_dict(state)
    assert not layer.frozen_experts.any()
    del state["A"]
    with pytest.raises(RuntimeError, match='Missing key\\(s\\) in state_dict: "A"'):
        layer.load_state_dict(state)


def test_counts_are_by_slice():
    layer, _ = build_layer(BRANCH, torch.float32)
    d, k, r = BRANCH.d, BRANCH.k, BRANCH.r
    assert layer.num_trained() == r * d + 5 * k * r + 5 * d
    layer.freeze_branches(torch.tensor([True, False, True, False, False]))
    assert layer.num_trained() == r * d + 3 * k * r + 5 * d
    routed, _ = build_layer(ROUTED, torch.float32)
    assert routed.num_trained() == 5 * (r * d + k * r)
    routed.freeze_experts(torch.tensor([True, False, True, False, False]))
    assert routed.num_trained() == 3 * (r * d + k * r)
    lilora, _ = build_layer(LILORA, torch.float32)
    assert lilora.num_trained() == r * d + k * r + 4 * r + k * 4 + 1
    moelora, _ = build_layer(MOELORA, torch.float32)
    assert moelora.num_trained() == 5 * (r * d + k * r + d)


@pytest.mark.parametrize("case", [BRANCH, ROUTED], ids=str)
def test_frozen_experts_cost_no_product(case: LayerCase, monkeypatch: pytest.MonkeyPatch):
    """dB's u^T g and dA's dh^T x have the columns of the slots that train, and are left out where there are none."""
    monkeypatch.setattr(compiled, "module", None)  # whose products nobody sees
    layer, batch = build_layer(case, torch.float32)
    if case is ROUTED:
        batch.call = {"experts": torch.tensor([[0, 1, 2]] * 3)}
    bmm, K = torch.bmm, 3 if case is ROUTED else 2

    def products(slots: int) -> tuple[int, int]:
        shapes = []
        with monkeypatch.context() as patch:
            patch.setattr(torch, "bmm", lambda a, b, **k: shapes.append((a.shape[1], b.shape[2])) or bmm(a, b, **k))
            run_layer(layer, batch, "torch")
        return shapes.count((slots * case.r, case.k)), shapes.count((slots * case.r, case.d))

    dA = int(case is ROUTED)  # BranchLoRA's A is one for all branches
    assert products(K) == (1, dA)
    if case is ROUTED:
        freeze(layer, [True, False, True, False, True])
        assert products(K) == (0, 0) and products(1) == (1, 1)
    freeze(layer, [True] * 5)
    assert products(K) == (0, 0)
    assert products(1)[0] == 0


# ------------------------------------------------------------------------------------------------------------ routing


def test_given_routes_are_those_of_the_router():
    layer, batch = build_layer(BRANCH, torch.float64)
    y = layer(batch.x, **batch.call)
    routing = layer.last_routing()
    assert routing.ids.shape == (3, 2) and routing.weights.shape == (3, 2) and routing.logits.shape == (3, 5)
    assert torch.equal(layer(batch.x, routes=(routing.ids, routing.weights)), y)
    assert torch.equal(layer(batch.x, routes=routing), y)


def test_usage_counts_what_was_chosen():
    layer, batch = build_layer(BRANCH, torch.float32)
    for _ in range(2):
        layer(batch.x, **batch.call)
    counted = torch.bincount(layer.last_routing().ids.flatten().long(), minlength=5)
    assert torch.equal(layer.usage(), 2 * counted)
    layer.reset_usage()
    assert not layer.usage().any()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_usage_counts_a_recomputed_forward_once(use_reentrant: bool):
    layer, batch = build_layer(BRANCH, torch.float32)
    layer(batch.x, **batch.call)
    counted = layer.usage()
    layer.reset_usage()
    x = batch.x.detach().requires_grad_()
    y = checkpoint(lambda x: layer(x, **batch.call), x, use_reentrant=use_reentrant)
    y.backward(batch.cotangent)
    assert counted.any() and torch.equal(layer.usage(), counted)


def test_slots_that_nobody_uses_are_left_out():
    """Known on the CPU: an empty slot of all sequences, and a weight of 0, cost no product and change nothing."""
    layer, batch = build_layer(ROUTED, torch.float64)
    full = layer(batch.x, torch.tensor([[1], [4], [0]]))
    for experts, weights in (
        (torch.tensor([[1, -1, -1], [4, -1, -1], [0, -1, -1]]), None),
        (torch.tensor([[3, 1], [3, 4], [3, 0]]), torch.tensor([[0.0, 1.0]] * 3, dtype=torch.float64)),
    ):
        assert torch.equal(layer(batch.x, experts, weights), full)
        assert layer.last_routing().ids.shape == (3, 1)
    none = layer(batch.x, torch.full((3, 2), -1))
    assert torch.equal(none, layer.base_layer(batch.x))
    assert torch.equal(layer(batch.x, torch.empty((3, 0), dtype=torch.int64)), none)


BAD = [
    (MOELORA, {"x": torch.zeros(3, 4)}, ValueError, "x must have 40 inputs in its last dimension"),
    (
        ROUTED,
        {"experts": torch.tensor([[5], [0], [0]])},
        ValueError,
        r"experts must name an expert, -1 to 4, got \[\[5\]",
    ),
    (ROUTED, {"experts": torch.tensor([[-2], [0], [0]])}, ValueError, "experts must name an expert, -1 to 4"),
    (
        ROUTED,
        {"experts": torch.tensor([[0], [0]])},
        ValueError,
        r"experts must be a tensor of shape \(3, c\), got shape \(2, 1\)",
    ),
    (ROUTED, {"experts": torch.zeros(3, 1)}, ValueError, "experts must be int32 or int64, got torch.float32"),
    (ROUTED, {"weights": torch.zeros(3, 2)}, ValueError, r"weights must be floating point of shape \(3, 3\)"),
    (BRANCH, {"task": None}, ValueError, "task must be given"),
    (BRANCH, {"task": 3}, ValueError, "task must name a task of the adapter, 0 to 2, got 3"),
    (BRANCH, {"task": torch.tensor([0, 1])}, ValueError, r"task must be a tensor of shape \(3,\), got shape \(2,\)"),
    (
        BRANCH,
        {"task": torch.tensor([0, 1, 7])},
        ValueError,
        r"task must name a task of the adapter, 0 to 2, got \[0, 1, 7\]",
    ),
    (BRANCH, {"task": "first"}, TypeError, "task must be an int, or an int tensor"),
    (
        BRANCH,
        {"routes": (torch.zeros(3, 2, dtype=torch.int32), None)},
        ValueError,
        r"routes\[1\] must be floating point",
    ),
    (BRANCH, {"route_mask": torch.ones(3, 9)}, ValueError, "route_mask must be bool of shape"),
    (LILORA, {"task": -1}, ValueError, "task must name a task of the adapter, 0 to 2, got -1"),
]


@pytest.mark.parametrize(("case", "changes", "kind", "message"), BAD, ids=str)
def test_bad_input(case: LayerCase, changes: dict, kind: type, message: str):
    layer, batch = build_layer(case, torch.float32)
    call = {"x": batch.x, **batch.call, **changes}
    with pytest.raises(kind, match=message):
        layer(**call)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("branchlora", {"top_k": 9}, "top_k must be at most num_branches = 8, got 9"),
        ("branchlora", {"router_input": "middle"}, "router_input must be one of 'first', 'mean', 'last', 'image'"),
        ("branchlora", {"freeze_A_after": 0}, "freeze_A_after must be a positive integer, got 0"),
        ("branchlora", {"renormalize": 1}, "renormalize must be True or False, got 1"),
        ("lilora", {"task_r": 0}, "task_r must be a positive integer, got 0"),
        ("routedlora", {"num_experts": True}, "num_experts must be a positive integer, got True"),
        ("moelora", {"r": 129}, "r must be at most 128, got 129"),
        ("moelora", {"lora_dropout": 1e-4}, "lora_dropout=0.0001 rounds to nothing"),
    ],
)
def test_bad_configuration(method: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        smolora.MIXTURES[method].config(**options)


def test_frozen_must_be_a_mask_of_the_branches():
    layer, _ = build_layer(BRANCH, torch.float32)
    with pytest.raises(ValueError, match=r"frozen must be bool of shape \(5,\), got torch.bool of \(4,\)"):
        layer.freeze_branches(torch.ones(4, dtype=torch.bool))


def test_A_is_frozen_after_so_many_tasks():
    config = smolora.BranchLoRAConfig(num_tasks=2, freeze_A_after=1)
    assert not smolora.FusedBranchLoRA(nn.Linear(8, 8), config).A.requires_grad
    config = smolora.BranchLoRAConfig(num_tasks=1, freeze_A_after=1)
    assert smolora.FusedBranchLoRA(nn.Linear(8, 8), config).A.requires_grad
