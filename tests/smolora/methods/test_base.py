"""The linear layer that is wrapped: plain, or more than its weight, or trained itself."""

import pytest
import torch
from torch import Tensor, nn

from smolora import FusedSMoLoRA
from support.cases import plain
from support.oracle import ROUNDING, Case, agree, build, error, reference, run


class Doubled(nn.Linear):
    """A linear layer that is more than its weight, as quantised ones and other adapters are."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Scaled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 3 * weight


def hooked(linear: nn.Linear, kind: str, calls: list) -> nn.Linear:
    """Make `linear` more than x W^T + b without changing what it computes, noting its calls."""
    if kind == "forward hook":
        linear.register_forward_hook(lambda *_: calls.append(kind))
    elif kind == "forward hook with keywords":
        linear.register_forward_hook(lambda *_: calls.append(kind), with_kwargs=True)
    elif kind == "pre-hook":
        linear.register_forward_pre_hook(lambda *_: calls.append(kind))
    elif kind == "backward hook":
        linear.register_full_backward_hook(lambda *_: calls.append(kind))
    elif kind == "backward pre-hook":
        linear.register_full_backward_pre_hook(lambda *_: calls.append(kind))
    elif kind == "replaced forward":  # as accelerate does to move weights in and out
        forward = linear.forward
        linear.forward = lambda x: (calls.append(kind), forward(x))[1]
    return linear


KINDS = [
    "forward hook",
    "forward hook with keywords",
    "pre-hook",
    "backward hook",
    "backward pre-hook",
    "replaced forward",
]


@pytest.mark.parametrize("case", [plain, plain.but(dropout=0.2, lengths=(4, 9)), plain.but(bias=False)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_base_is_called_when_it_is_more(kind: str, case: Case):
    """A base with a hook is called, once a forward, and everything comes out as on the path that takes its product
    over."""
    expected = run(*build(case, torch.float64), "torch")
    layer, batch = build(case, torch.float64)
    calls: list[str] = []
    hooked(layer.base_layer, kind, calls)
    got = run(layer, batch, "torch")
    assert calls == [kind]
    agree(got, expected, ROUNDING[torch.float64])


def test_hook_may_change_the_output():
    """What a hook or a subclass makes of the base's output is what the adapter is added to."""
    layer, batch = build(plain, torch.float64)
    expected = run(layer, batch, "torch")["y"] + layer.base_layer(batch.x)
    layer.base_layer.register_forward_hook(lambda module, args, output: 2 * output)
    assert error(run(layer, batch, "torch")["y"], expected) < 1e-12
    assert error(run(layer, batch, "torch")["y"], reference(layer, batch, torch.float64)["y"]) > 0.1


def test_subclass_and_parametrisation():
    """Subclasses are called, and so are parametrised layers, whose class changes when they are registered."""
    plain_layer, batch = build(plain, torch.float64)
    adapter = run(plain_layer, batch, "torch")["y"] - plain_layer.base_layer(batch.x)
    linear = Doubled(40, 56, dtype=torch.float64)
    linear.load_state_dict(plain_layer.base_layer.state_dict())
    layer = FusedSMoLoRA(linear, plain_layer.config)
    layer.load_state_dict(plain_layer.state_dict())
    assert error(run(layer, batch, "torch")["y"], adapter + linear(batch.x)) < 1e-12
    nn.utils.parametrize.register_parametrization(plain_layer.base_layer, "weight", Scaled())
    expected = adapter + plain_layer.base_layer(batch.x)
    assert error(run(plain_layer, batch, "torch")["y"], expected) < 1e-12


@pytest.mark.parametrize("trained", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
@pytest.mark.parametrize("case", [plain, plain.but(dropout=0.2, lengths=(4, 9))], ids=str)
def test_trainable_base(case: Case, trained: tuple[str, ...]):
    """Unfrozen, the base gets its own gradient (as modules_to_save would have it), and nothing else changes."""
    layer, batch = build(case, torch.float64)
    expected = run(layer, batch, "torch")
    for name in trained:
        getattr(layer.base_layer, name).requires_grad_()
    got = run(layer, batch, "torch")
    agree(got, expected, ROUNDING[torch.float64])
    torch.manual_seed(1)
    layer(batch.x, **batch.keywords).backward(batch.cotangent)
    g = batch.cotangent.reshape(-1, case.k)
    truth = {"weight": g.mT @ batch.x.reshape(-1, case.d), "bias": g.sum(0)}
    for name in ("weight", "bias"):
        gradient = getattr(layer.base_layer, name).grad
        assert (gradient is None) == (name not in trained)
        assert gradient is None or error(gradient, truth[name]) < 1e-12
