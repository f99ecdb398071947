"""Computed routers against direct solutions in float64, and layers with an importance vector for each expert."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import smolora
from smolora.methods.routers import UNIT, ExpertRouters, RouterFeatures, moments, ridge_regression

TEXT, IMAGE = 7, 9


def config(**options) -> smolora.SMoLoRAConfig:
    defaults = dict(r=4, lora_alpha=8, lora_dropout=0.0, num_vu_experts=1, num_if_experts=1, instruction_dim=TEXT)
    defaults |= dict(experts="grow", vu_router_kind="ridge", if_router_kind="ridge", router_features="vision")
    made = smolora.SMoLoRAConfig(**{**defaults, **options})
    made.router_sizes = {"vision": [IMAGE], "vision+instruction": [IMAGE + TEXT]}.get(made.router_features)
    return made


def samples(task: int, n: int = 20) -> RouterFeatures:
    """Features of a task's samples, around a centre of their own."""
    draw = torch.Generator().manual_seed(task)
    image, text = torch.randn(1, IMAGE, generator=draw), torch.randn(1, TEXT, generator=draw)
    image = image + 0.2 * torch.randn(n, IMAGE, generator=draw)
    text = text + 0.1 * torch.randn(n, TEXT, generator=draw)
    return RouterFeatures(image=image, text=text)


def fitted(order=(0, 1, 2), **options) -> ExpertRouters:
    routers = ExpertRouters(config(**options))
    for task in order:
        routers.add(task, routers.moments(samples(task)))
        experts = routers.assign(task)
        for branch, expert in zip(("vu", "if"), experts, strict=True):
            if expert is not None:
                count = max(routers.config.num_experts(branch), expert + 1)
                setattr(routers.config, f"num_{branch}_experts", count)
    return routers


def unit(features: Tensor) -> Tensor:
    return features.double() / features.double().norm(dim=1, keepdim=True)


def test_ridge_is_the_direct_solution():
    """(H^T H + γ I)^-1 H^T Y in float64, over all samples at once; rounding features to 2^-20 is all that differs."""
    routers = fitted(router_ridge=0.01)
    H = torch.cat([unit(samples(task).image) for task in range(3)])
    H = torch.cat([H, torch.ones(len(H), 1, dtype=torch.float64)], 1)
    Y = torch.eye(3, dtype=torch.float64).repeat_interleave(20, 0)
    C = H.mT @ H
    W = torch.linalg.solve(C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=torch.float64), H.mT @ Y)
    scores = routers.task_scores(samples(1))["vu"][:, 0]
    torch.testing.assert_close(scores, H[20:40] @ W, rtol=0, atol=1e-5)
    assert (scores.argmax(1) == 1).all()


def test_prototypes_are_cosines_to_the_means():
    routers = fitted(vu_router_kind="prototype")
    means = torch.stack([unit(samples(task).image).mean(0) for task in range(3)])
    expected = unit(samples(2).image) @ unit(means).mT
    torch.testing.assert_close(routers.task_scores(samples(2))["vu"][:, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["ridge", "prototype"])
def test_no_order_changes_a_bit(kind: str):
    """Of tasks, of samples, and of how they are cut into batches and processes."""
    options = dict(vu_router_kind=kind, if_router_kind=kind, if_share=None)
    one, other = fitted(**options), ExpertRouters(config(**options))
    for task in (2, 0, 1):
        every, order = samples(task), torch.randperm(20, generator=torch.Generator().manual_seed(5))
        for part in order.split(7):
            own = RouterFeatures(image=every.image[part], text=every.text[part])
            other.add(task, other.moments(own))
    for name, buffer in one.named_buffers():
        if not name.endswith("experts"):
            assert torch.equal(buffer, other.get_buffer(name)), name
    other.vu_experts, other.if_experts = one.vu_experts, one.if_experts
    other.config.num_vu_experts, other.config.num_if_experts = 3, 3
    for name, found in one.choose(samples(1)).items():
        assert torch.equal(found, other.choose(samples(1))[name]), name


def test_sums_are_exact():
    """Products of the rounded features, summed up as integers of any size."""
    features = samples(0, 5).image
    rounded = [[round(v * 2**20) for v in [*row, 1.0]] for row in unit(features).tolist()]
    outer = [[sum(row[i] * row[j] for row in rounded) for j in range(IMAGE + 1)] for i in range(IMAGE + 1)]
    assert moments(features, outer=True).outer.tolist() == outer
    assert moments(features, outer=True).total.tolist() == [sum(column) for column in zip(*rounded, strict=True)]


def test_experts_of_tasks():
    """VU and IF decide apart; a limit makes tasks share what looks most like them."""
    routers = fitted()
    assert routers.vu_experts.tolist() == routers.if_experts.tolist() == [0, 1, 2]
    alike = samples(0)._replace(image=samples(5).image)  # the instruction of task 0, other pictures
    routers.add(3, routers.moments(alike))
    assert routers.assign(3) == (3, 0)
    assert routers.assign(3) == (3, 0)  # again
    full = fitted(max_experts=2, if_share=None)
    assert full.vu_experts[:2].tolist() == [0, 1]
    nearest = int(full.similarity("vu")[2, :2].argmax())
    assert int(full.vu_experts[2]) == nearest
    fixed = fitted(experts="fixed", num_vu_experts=2)
    assert int(fixed.vu_experts[2]) == int(fixed.similarity("vu")[2, :2].argmax())
    assert fitted(vu_share=-1.0).vu_experts.tolist() == [0, 0, 0]


def test_shared_experts_count_for_all_of_their_tasks():
    """A ridge router's score of an expert is the regression of the expert itself."""
    routers = fitted(vu_share=-1.0)
    scores = routers.task_scores(samples(1))["vu"]
    torch.testing.assert_close(routers.expert_scores("vu", scores)[..., 0], scores.sum(-1))
    cosines = fitted(vu_share=-1.0, vu_router_kind="prototype")
    scores = cosines.task_scores(samples(1))["vu"]
    assert torch.equal(cosines.expert_scores("vu", scores)[..., 0], scores.amax(-1))


@pytest.mark.parametrize("unseen_below", [-9.0, 9.0], ids=["near", "far"])
def test_mixing_more_experts_than_there_are(unseen_below: float):
    """The other slots are empty: an expert is not counted twice."""
    options = dict(unseen="mix", top_k=3, unseen_below=unseen_below)
    found = fitted(order=(0,), **options).choose(samples(0, 2))
    assert (
        found["routes"].tolist() == [[[[0, -1, -1]] * 2]] * 2 and found["gates"].tolist() == [[[[1.0, 0, 0]] * 2]] * 2
    )
    layer = expert_layer(num_vu_experts=1, **options)
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    routes, gates = (
        torch.tensor([[[[0, -1, -1], [1, 0, -1]]]] * 2).int(),
        torch.tensor([[[[1.0, 0, 0], [0.3, 0.7, 0]]]] * 2),
    )
    y = layer(x, routes=routes, gates=gates.double())
    two = (torch.tensor([[0, 0]] * 2), torch.tensor([[1, 0]] * 2)), (torch.tensor([[1.0, 0]] * 2), gates[:, 0, 1, :2])
    expected = expert_layer(num_vu_experts=1, top_k=2)(x, routes=two[0], gates=two[1])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("random", ["vu", "if"])
def test_mixing_beside_a_random_router_of_fewer_experts(random: str):
    options = dict(num_vu_experts=1 + (random == "if"), num_if_experts=1 + (random == "vu"), experts="fixed")
    layer = expert_layer(**options, **{f"{random}_router_kind": "random"}, unseen="mix", top_k=3)
    x, e = torch.randn(2, 5, 10, dtype=torch.float64), torch.randn(2, TEXT, dtype=torch.float64)
    computed = [1, -1, -1]
    pair = [computed, [-1, -1, -1]] if random == "if" else [[-1, -1, -1], computed]
    routes = torch.tensor([[pair]] * 2).int()
    y = layer(x, e, routes=routes, gates=(routes >= 0).double())
    chosen = (torch.ones(2).long(), torch.zeros(2).long())
    plain = expert_layer(**options)
    plain.load_state_dict(layer.state_dict(), strict=False)  # it has no router
    expected = plain(x, routes=chosen if random == "if" else chosen[::-1])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


def test_a_ridge_router_weighs_all_tasks_the_same():
    """The least squares of samples weighted by 1 / n of their task, for tasks that differ in their means alone."""
    draw = torch.Generator().manual_seed(0)
    spread = torch.randn(10, 6, generator=draw, dtype=torch.float64)
    spread -= spread.mean(0)
    means = torch.randn(3, 6, generator=draw, dtype=torch.float64)
    H = [
        torch.cat([mean + spread, torch.ones(10, 1)], 1).repeat(n, 1) for mean, n in zip(means, (1, 7, 50), strict=True)
    ]
    totals = torch.stack([(h.sum(0) * UNIT).round().long() for h in [*H, torch.zeros(0, 7, dtype=torch.float64)]])
    outer = (sum(h.mT @ h for h in H) * UNIT**2).round().long()
    C = sum(h.mT @ h / len(h) for h in H) / 3
    ridge = 0.01 * C.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    W = torch.linalg.solve(C + ridge, torch.stack([h.mean(0) for h in H], 1) / 3)
    torch.testing.assert_close(ridge_regression(totals, outer, 0.01)[:3], W.mT, rtol=0, atol=1e-5)
    assert not ridge_regression(totals, outer, 0.01)[3].any()  # it has no sample


def test_a_task_of_few_samples_is_found():
    """Beside others with a hundred times as many, and without taking their samples."""
    routers = ExpertRouters(config())
    for task, count in enumerate((500, 500, 5)):
        routers.add(task, routers.moments(samples(task, count)))
        routers.config.num_vu_experts, routers.config.num_if_experts = routers.assign(task)[0] + 1, task + 1
    for task in range(3):
        assert (routers.choose(samples(task, 40))["routes"] == task).all()


def test_which_experts_train():
    routers = fitted(order=(0, 1), vu_share=-1.0, if_share=None)
    assert routers.trained_experts(1, "vu").tolist() == [False]  # task 0 has it, too
    assert routers.trained_experts(1, "if").tolist() == [False, True]
    routers.config.shared_experts = "train"
    assert routers.trained_experts(1, "vu").tolist() == [True]


def test_unseen_samples():
    """Near samples use one expert; far ones mix the nearest by a softmax over their scores, or use none."""
    near, far = samples(1, 4), RouterFeatures(image=-samples(1, 4).image, text=samples(1, 4).text)
    options = dict(vu_router_kind="prototype", if_router_kind="prototype", unseen_below=0.9, top_k=2)
    assert fitted(unseen="nearest", **options).choose(far)["gates"].tolist() == [[[[1.0], [1.0]]]] * 4
    mixed = fitted(unseen="mix", **options)
    found = mixed.choose(near)
    assert found["gates"].tolist() == [[[[1.0, 0.0], [1.0, 0.0]]]] * 4 and (found["task"] == 1).all()
    found = mixed.choose(far)
    ranked, order = mixed.task_scores(far)["vu"].sort(dim=-1, descending=True)
    assert torch.equal(found["routes"][:, :, 0], order[..., :2].int())
    torch.testing.assert_close(found["gates"][:, :, 0], torch.softmax(ranked[..., :2] / 0.1, -1))
    torch.testing.assert_close(found["margins"][:, :, 0], ranked[..., 0] - ranked[..., 1])
    assert found["gates"][:, :, 1].tolist() == [[[1.0, 0.0]]] * 4  # the instruction is known
    assert fitted(unseen="none", **options).choose(far)["gates"][:, 0, 0].tolist() == [[0.0]] * 4


def test_routers_refuse():
    routers = fitted()
    with pytest.raises(ValueError, match=r"image features must be given: the VU router reads them, got None"):
        routers.choose(RouterFeatures(text=samples(0).text))
    with pytest.raises(ValueError, match=r"must have sizes \[9\], got \[5\]"):
        routers.choose(samples(0)._replace(image=torch.ones(20, 5)))
    with pytest.raises(ValueError, match="image features must be finite, got NaN"):
        routers.moments(samples(0)._replace(image=torch.full((20, IMAGE), math.nan)))
    with pytest.raises(ValueError, match=r"task_ids must be of tasks that .* \[0, 1, 2\], got \[0, 3\]"):
        routers.of_tasks(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="task must be an integer of at least 0, got -1"):
        routers.add(-1, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vu_router_kind": "kmeans"}, "vu_router_kind must be one of"),
        ({"router_ridge": 0}, "router_ridge must be a positive finite number, got 0"),
        ({"if_share": 2}, "if_share must be a cosine, -1 to 1, or None, got 2"),
        ({"vu_router_kind": "random", "if_router_kind": "random"}, "experts must be 'fixed' where"),
        ({"max_experts": 0}, "max_experts must be a positive integer, got 0"),
        ({"unseen_below": math.nan}, "unseen_below must be a finite number"),
    ],
)
def test_configurations_refuse(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        config(**options)


# ---- layers


def expert_layer(dtype=torch.float64, **options) -> nn.Module:
    torch.manual_seed(0)
    options = dict(experts="fixed", num_vu_experts=3, num_if_experts=2, importance="expert") | options
    layer = smolora.FusedSMoLoRA(nn.Linear(10, 12, dtype=dtype), config(**options))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=dtype) * 0.5)
    return layer


def dense(layer: nn.Module, x: Tensor, v: Tensor, i: Tensor) -> Tensor:
    """Eq. 7 to 9, with the importance vectors of the chosen experts."""
    s, y = layer.config.scaling, []
    for row, (a, b) in enumerate(zip(v.tolist(), i.tolist(), strict=True)):
        vu = s * x[row] @ layer.vu_A[a].mT @ layer.vu_B[a].mT
        if_ = s * x[row] @ layer.if_A[b].mT @ layer.if_B[b].mT
        alpha = torch.sigmoid(vu @ layer.vu_importance[a] - if_ @ layer.if_importance[b])[:, None]
        y.append(layer.base_layer(x[row]) + alpha * vu + (1 - alpha) * if_)
    return torch.stack(y)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_importance_of_experts(backend: str, request):
    """Forward and every gradient, against autograd through k-sized outputs; experts that nobody uses get exactly 0."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    layer = expert_layer(dtype)
    x = torch.randn(4, 5, 10, dtype=dtype, requires_grad=True)
    v, i = torch.tensor([0, 2, 2, 0]), torch.tensor([1, 1, 1, 1])
    g = torch.randn(4, 5, 12, dtype=dtype)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert {"vu_importance", "if_importance"} < set(names)
    tensors = [x, *(layer.get_parameter(name) for name in names)]
    expected = torch.autograd.grad((dense(layer, x, v, i) * g).sum(), tensors, allow_unused=True)
    with smolora.use_backend(backend):
        y = layer(x, routes=(v, i))
        found = torch.autograd.grad((y * g).sum(), tensors)
    tolerance = dict(rtol=0, atol=1e-12) if backend == "torch" else dict(rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(y, dense(layer, x, v, i), **tolerance)
    for name, ours, theirs in zip(["x", *names], found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        if name.startswith("vu"):
            assert (ours[1] == 0).all() and ours[0].abs().max() > 1e-3, name


def test_one_token_follows_every_change_of_the_weights():
    """Whatever changes B or an importance vector, and by whichever way, the next token is scored by the new values."""
    layer = expert_layer()
    v, i = torch.tensor([0, 2, 2, 1]), torch.tensor([1, 0, 0, 1])
    x = torch.randn(4, 1, 10, dtype=torch.float64)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    other = {
        name: torch.randn_like(value) * 0.4 for name, value in layer.state_dict().items() if value.is_floating_point()
    }

    def step() -> None:
        layer.train()(x, routes=(v, i)).square().sum().backward()
        optimizer.step()
        layer.eval()

    def edit() -> None:
        layer.vu_importance.data[2] += 1  # which no version counter sees
        layer.if_B.data.mul_(2)

    def replace() -> None:
        layer.if_importance = nn.Parameter(-layer.if_importance.detach())

    seen = []
    for change in (layer.eval, step, lambda: layer.load_state_dict({**layer.state_dict(), **other}), edit, replace):
        change()
        with torch.no_grad():
            y = layer(x, routes=(v, i))
            torch.testing.assert_close(y, dense(layer, x, v, i), rtol=0, atol=1e-11)
        assert not any((y - before).abs().max() < 1e-3 for before in seen)
        seen.append(y)


def test_experts_that_are_not_used_or_frozen_keep_their_bits():
    """Under weight decay and momentum; a frozen expert works on, and x gets its gradient through it."""
    layer = expert_layer(shared_experts="freeze")
    layer.freeze_experts("if", torch.tensor([False, True]))
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        x = torch.randn(2, 5, 10, dtype=torch.float64, requires_grad=True)
        layer(x, routes=(torch.tensor([2, 2]), torch.tensor([1, 1]))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name in ("A", "B", "importance"):
        moved = (layer.get_parameter(f"vu_{name}") != before[f"vu_{name}"]).flatten(1).any(1)
        assert moved.tolist() == [False, False, True], name
        assert torch.equal(layer.get_parameter(f"if_{name}"), before[f"if_{name}"]), name
    assert layer.trained_slices()["vu_A"] == 3 and layer.trained_slices()["if_B"] == 1


def test_a_layer_grows():
    """What it computed before stays as it was, and new experts start like first ones: B = 0."""
    layer = expert_layer()
    x, routes = torch.randn(2, 5, 10, dtype=torch.float64), (torch.tensor([2, 0]), torch.tensor([1, 0]))
    before = layer(x, routes=routes)
    layer.config.num_vu_experts, layer.config.num_if_experts = 5, 3
    layer.grow()
    assert layer.vu_A.shape == (5, 4, 10) and layer.if_importance.shape == (3, 12)
    assert torch.equal(layer(x, routes=routes), before)
    new = layer(x, routes=(torch.tensor([4, 3]), torch.tensor([2, 2])))
    assert torch.equal(new, layer.base_layer(x)) and layer.vu_A[3:].abs().max() > 0


@pytest.mark.parametrize("grown", [False, True])
def test_how_experts_start(grown: bool):
    """A as in PEFT's LoRA where the router is computed, as SMoLoRA's where it is random; B = 0."""
    torch.manual_seed(0)
    options = dict(experts="grow", num_vu_experts=2, num_if_experts=2, if_router_kind="random", r=16)
    layer = smolora.FusedSMoLoRA(nn.Linear(100, 12), config(**options))
    if grown:
        layer.config.num_vu_experts = 4
        layer.grow()
    assert 0.095 < layer.vu_A.abs().max() <= 0.1 and abs(layer.vu_A.std().item() - 0.1 / 3**0.5) < 2e-3
    assert abs(layer.if_A.std().item() - 0.01) < 1e-3
    assert not layer.vu_B.any() and not layer.if_B.any()


def test_a_random_router_beside_a_computed_one():
    """The random VU router chooses as it does by itself; the computed branch has the experts and gates it was given."""
    options = dict(num_vu_experts=3, num_if_experts=2, experts="fixed", vu_router_kind="random")
    layer = expert_layer(**options)
    x = torch.randn(4, 5, 10, dtype=torch.float64)
    routes = torch.full((4, 1, 2, 1), -1, dtype=torch.int32)
    routes[:, 0, 1, 0] = torch.tensor([1, 0, 1, 1])
    gates = (routes >= 0).double()
    y = layer(x, routes=routes, gates=gates)
    v = (x.mean(1) @ layer.vu_router.mT).argmax(1)
    assert v.unique().numel() > 1
    torch.testing.assert_close(y, dense(layer, x, v, routes[:, 0, 1, 0]), rtol=0, atol=1e-12)
    assert layer.last_routing().routes[1].tolist() == [1, 0, 1, 1]


def test_a_layer_alone_needs_routes():
    with pytest.raises(ValueError, match="routes must be given to a layer whose routers are computed"):
        expert_layer()(torch.randn(1, 2, 10, dtype=torch.float64), torch.randn(1, TEXT, dtype=torch.float64))
