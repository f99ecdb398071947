"""The checks of mixtures can fail: wrong passes of every common kind are caught by them, in torch and in Triton."""

import inspect
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from smolora.engine import torch_passes
from smolora.engine.ops import BACKENDS
from support.marks import interpreter
from support.mixtures import MixCase, check_call, plain

softmax = plain.but(mix="softmax", K=0)
shared = plain.but(shared=True, K=3)
by_task = plain.but(routed=True, reads_x=False, tasks=3, gate="all", gate_grad="all", n=6)

pytestmark = pytest.mark.usefixtures("without_compiled_code")


def given(name: str, **changes: Callable) -> tuple[str, Callable]:
    """A pass that gets other arguments than it is called with."""

    def wrong(right: Callable) -> Callable:
        def run(*arguments):
            bound = inspect.signature(right).bind(*arguments)
            for argument, change in changes.items():
                bound.arguments[argument] = change(bound.arguments[argument])
            return right(**bound.arguments)

        return run

    return name, wrong


def returning(name: str, index: int, change: Callable) -> tuple[str, Callable]:
    """A pass that returns something else at one place."""

    def wrong(right: Callable) -> Callable:
        def run(*arguments):
            results = list(right(*arguments))
            results[index] = change(results[index])
            return tuple(results)

        return run

    return name, wrong


MUTANTS = {
    "scale off by 1%": (plain, given("fuse_expand", scaling=lambda s: s * 1.01)),
    "slot weights ignored": (plain, given("fuse_expand", slot_weights=lambda q: q * 0 + 0.5)),
    "slots exchanged": (plain, given("fuse_expand", ids=lambda ids: ids.flip(2).contiguous())),
    "frozen experts' B train": (plain.but(frozen=True), given("grad_output", trained=lambda trained: [])),
    "frozen experts' A train": (plain.but(frozen=True), given("grad_input", trained=lambda trained: [])),
    "dslot_weights zero": (plain, returning("grad_output", 3, lambda q: q * 0)),
    "dh of one slot": (shared, returning("grad_output", 0, lambda dh: dh / 3)),
    "given scores shifted": (
        plain.but(weights="token"),
        given("grad_output", scores=lambda c: c.roll(1, 1).contiguous()),
    ),
    "gate over the chosen": (by_task, given("route_shrink", gate=lambda gate: "chosen")),
    "another task's router": (by_task, given("route_shrink", router_rows=lambda rows: (rows + 1) % 3)),
    "token router scaled": (softmax, given("route_shrink", token_router=lambda r: r * 1.01)),
    "token router's dropout": (
        softmax.but(threshold=64),
        returning("route_shrink", 6, lambda z: z * 0.75),
    ),
    "token router learns nothing": (softmax, given("grad_input", dtoken_logits=torch.zeros_like)),
    "dR zero": (softmax, returning("grad_input", 2, lambda dr: dr * 0)),
    "dscores without the normaliser": (softmax, returning("grad_output", 4, lambda dz: dz + 0.01)),
}


def rejected(case: MixCase, backend: str, module: ModuleType, name: str, wrong: Callable, monkeypatch) -> None:
    check_call(case, torch.float32, backend)
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    with pytest.raises(AssertionError, match="error"):
        check_call(case, torch.float32, backend)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_rejected(mutant: str, monkeypatch: pytest.MonkeyPatch):
    case, (name, wrong) = MUTANTS[mutant]
    rejected(case, "torch", torch_passes, name, wrong, monkeypatch)


@interpreter
@pytest.mark.parametrize("mutant", ["slots exchanged", "dh of one slot", "token router learns nothing"])
def test_mutants_of_the_kernels_are_rejected(mutant: str, monkeypatch: pytest.MonkeyPatch):
    case, (name, wrong) = MUTANTS[mutant]
    rejected(case, "triton", BACKENDS["triton"](), name, wrong, monkeypatch)


@interpreter
def test_a_wrong_mix_of_the_kernels_is_rejected(monkeypatch: pytest.MonkeyPatch):
    """The softmax's gradient without its normaliser, and its shares as they are for given scores."""
    from smolora.kernels.mixes import MIXES

    right = MIXES["softmax"]
    for name in ("scores_backward", "share"):
        monkeypatch.setitem(MIXES, "softmax", right._replace(**{name: getattr(MIXES["weighted"], name)}))
        with pytest.raises(AssertionError, match="error"):
            check_call(softmax, torch.float32, "triton")
