"""Fisher information and the pull: against golden data, and against their definitions in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from smolora.methods.slices import SlicedParameter
from smolora.train.methods.fisher import add_pull, joined, squared_gradients
from support.project import GOLDEN

HALVES = (slice(0, 1), slice(1, None))  # of a batch, of different sizes


class Golden:
    """A file of outputs of released code."""

    def __init__(self) -> None:
        with safe_open(GOLDEN / "methods/ewc.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.facts = file.metadata()

    def named(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def number(self, name: str) -> float:
        return float(self.facts[name])


class Net(nn.Module):
    """logits = head tanh(base(e) + scale B A e), with a parameter that is in no graph."""

    def __init__(self, golden: Golden) -> None:
        super().__init__()
        made = {name: nn.Parameter(value, requires_grad=False) for name, value in golden.named("param.").items()}
        self.fixed = nn.ParameterDict({name.replace(".", "_"): value for name, value in made.items()})
        self.lora_A = nn.Linear(12, 4, bias=False, dtype=torch.float64)
        self.lora_B = nn.Linear(4, 10, bias=False, dtype=torch.float64)
        self.lora_unused = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.scale = golden.number("scale")

    def forward(self, input_ids, labels):
        embedded = self.fixed["embed_weight"][input_ids]
        base = F.linear(embedded, self.fixed["base_weight"], self.fixed["base_bias"])
        hidden = torch.tanh(base + self.scale * self.lora_B(self.lora_A(embedded)))
        logits = F.linear(hidden, self.fixed["head_weight"])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss)

    def load(self, values: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.get_parameter(name).copy_(value)


@pytest.fixture(scope="module")
def golden():
    return Golden()


def test_fisher_information_is_that_of_released_code(golden):
    """The mean over the first batches of the squared gradient of a batch's mean loss, at the values after each task."""
    net = Net(golden)
    count = int(golden.number("fisher_batches"))
    for task in range(2):
        net.load(golden.named(f"anchor.{task}."))
        inputs = golden.named(f"task{task}.")
        batches = [{name: value[batch] for name, value in inputs.items()} for batch in range(count)]
        found = squared_gradients(net, [[batch] for batch in batches], per_token=True)
        halves = [[{name: value[half] for name, value in batch.items()} for half in HALVES] for batch in batches]
        in_parts = squared_gradients(net, halves, per_token=True)
        for name, value in found.items():
            torch.testing.assert_close(in_parts[name], value)
        assert all(value.dtype == torch.float32 for value in found.values())
        assert not found["lora_unused"].any()
        wanted = golden.named(f"fisher.{task}.")
        for name in ("lora_A.weight", "lora_B.weight"):
            torch.testing.assert_close(found[name].flatten() / count, wanted[name], rtol=2e-5, atol=0)


@pytest.mark.parametrize("task", [1, 2])
def test_the_pull_is_that_of_released_code(golden, task):
    """Two tensors for all tasks give what one pair of tensors a task gives, to float32's rounding."""
    net = Net(golden)
    past = None
    for earlier in range(task):
        anchor = golden.named(f"anchor.{earlier}.")
        flat = golden.named(f"fisher.{earlier}.")
        past = joined(past, {name: flat[name].view_as(anchor[name]) for name in anchor}, anchor)
    assert past is not None
    net.load(golden.named(f"step{task}.param."))
    before = golden.named(f"step{task}.grad_task.")
    for name, gradient in before.items():
        net.get_parameter(name).grad = gradient.clone()
    weight = golden.number("ewc_lambda") / golden.number("gradient_accumulation_steps")
    add_pull(dict(net.named_parameters()), *past, weight)
    assert net.lora_unused.grad is None
    for name, wanted in golden.named(f"step{task}.grad_total.").items():
        pull = wanted - before[name]
        assert pull.abs().max() > 1e-3, "the penalty's gradient is not zero at a drift"
        error = net.get_parameter(name).grad - wanted
        assert error.norm() < 1e-6 * pull.norm()


def test_two_tensors_stand_for_all_tasks():
    """The gradient of the sum over five tasks, by autograd in float64; parts of F are 0, and one parameter is late."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(6, 5, generator=generator, dtype=torch.float64)  # noqa: E731
    tasks, past = [], None
    for number in range(5):
        names = ["a", "b", "late"] if number > 2 else ["a", "b"]
        fisher = {name: draw().square() * (torch.rand(6, 5, generator=generator) > 0.4) for name in names}
        fisher["b"][0] = 0.0
        values = {name: draw() for name in names}
        tasks.append((fisher, values))
        past = joined(past, {name: value.float() for name, value in fisher.items()}, values)
    assert past is not None
    assert torch.equal(past[1]["b"][0], tasks[-1][1]["b"][0].float()), "where F is 0, the newest values"
    theta = {name: draw().requires_grad_() for name in ("a", "b", "late", "new")}
    weight = 3.0
    penalty = sum(
        weight / 2 * (fisher[name] * (theta[name] - values[name]).square()).sum()
        for fisher, values in tasks
        for name in fisher
    )
    names = ("a", "b", "late")
    wanted = dict(zip(names, torch.autograd.grad(penalty, [theta[name] for name in names]), strict=True))
    for value in theta.values():
        value.grad = torch.zeros_like(value)
    add_pull(theta, *past, weight)
    for name in names:
        torch.testing.assert_close(theta[name].grad, wanted[name], rtol=1e-5, atol=1e-4)
        assert wanted[name].abs().max() > 1
    assert not theta["new"].grad.any()


def test_what_a_step_does_not_train_is_not_pulled():
    """A slice whose gradient is exactly zero keeps its bits, and so does a parameter without a gradient."""
    sliced, whole, absent = (kind(torch.ones(3, 2)) for kind in (SlicedParameter, nn.Parameter, nn.Parameter))
    for parameter in (sliced, whole):
        parameter.grad = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    parameters = {"sliced": sliced, "whole": whole, "absent": absent}
    importance = {name: torch.ones(3, 2) for name in parameters}
    anchor = {name: torch.zeros(3, 2) for name in parameters}
    add_pull(parameters, importance, anchor, 2.0)
    assert torch.equal(sliced.grad, torch.tensor([[0.0, 0.0], [2.0, 3.0], [0.0, 0.0]]))
    assert torch.equal(whole.grad, torch.tensor([[2.0, 2.0], [2.0, 3.0], [2.0, 2.0]]))
    assert absent.grad is None
    optimizer = torch.optim.AdamW([sliced, whole], lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(sliced[0], torch.ones(2)) and (sliced[1] < 1).all() and (whole < 1).all()
