"""Gate and up of a model in one launch: when that happens, and that it changes nothing."""

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import PeftModel, get_peft_model
from transformers.models.llama.modeling_llama import LlamaMLP

import smolora
from smolora.engine import cuda_passes
from smolora.tuner import decode_fusion
from smolora.tuner.context import CONTEXT
from support.tiny_llava import INSTRUCTION_DIM, fill_adapters, tiny_config, tiny_llama

TOGETHER = [2, 1] * 2  # projections of each launch, in two layers: gate with up, and down
APART = [1, 1, 1] * 2


@pytest.fixture
def model(device: str) -> PeftModel:
    model = get_peft_model(tiny_llama(), tiny_config())
    fill_adapters(model)
    return model.to(device).eval()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many projections each launch of decode had."""
    run, counts = cuda_passes.run_pass, []

    def record(name: str, like: torch.Tensor, *parts: dict) -> None:
        if name == "decode":
            counts.append(len(parts))
        run(name, like, *parts)

    monkeypatch.setattr(cuda_passes, "run_pass", record)
    return counts


def step(model: PeftModel, tokens: int = 1) -> torch.Tensor:
    """The logits of one token a sequence, each its own prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 60, (3, tokens), generator=generator).to(model.device)
    instruction = torch.randn(3, INSTRUCTION_DIM, generator=generator).to(model.device)
    with smolora.use_backend("cuda"):
        return model(input_ids=ids, instruction_embeds=instruction).logits


def both(model: PeftModel, launches: list[int], forward: Callable[[PeftModel], torch.Tensor]) -> list[int]:
    """The launches of a forward, whose results must be those of layers that never work together, bit for bit."""
    own = copy.deepcopy(model)
    launches.clear()
    got = forward(model)
    counts = list(launches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_fusion, "SIBLINGS", {})
        launches.clear()
        expected = forward(own)
        assert 2 not in launches
    assert torch.equal(got, expected)
    assert getattr(model.get_base_model(), CONTEXT).thread.prefetched is None
    return counts


def mlps(model: PeftModel) -> list[LlamaMLP]:
    return [layer.mlp for layer in model.get_base_model().model.layers]


def test_one_launch_for_two(model: PeftModel, launches: list[int]):
    """Logits, what layers say they decided, and a copy of the model."""
    with torch.no_grad():
        assert both(model, launches, step) == TOGETHER
        assert both(copy.deepcopy(model), launches, step) == TOGETHER
        step(model)
        report = smolora.routing_report(model)
        step(model, tokens=2)
        step(model)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode_fusion, "SIBLINGS", {})
            step(model)
    expected = smolora.routing_report(model)
    assert len(report) == 6 and report.keys() == expected.keys()
    for key, mine in report.items():
        for a, b in zip(
            torch.utils._pytree.tree_leaves(mine), torch.utils._pytree.tree_leaves(expected[key]), strict=True
        ):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("decode_routing", ["prompt", "token"])
@pytest.mark.parametrize("importance", ["shared", "expert"])
def test_generate(decode_routing: str, importance: str, device: str, launches: list[int]):
    """Each new token, with its prompt's routes or with its own."""
    config = tiny_config(decode_routing=decode_routing, top_k=2, importance=importance)
    model = get_peft_model(tiny_llama(), config)
    fill_adapters(model)
    model.to(device).eval()
    ids = torch.arange(4, 14, device=device).view(2, 5)

    def generate(model: PeftModel) -> torch.Tensor:
        with smolora.use_backend("cuda"):
            return model.generate(
                input_ids=ids,
                instruction_embeds=torch.ones(INSTRUCTION_DIM, device=device),
                max_new_tokens=4,
                min_new_tokens=4,
                do_sample=False,
            )

    assert both(model, launches, generate) == TOGETHER * 3


def test_nothing_is_kept(model: PeftModel):
    """The other's output lives until its call, or until the forward ends without one."""
    context, alive = getattr(model.get_base_model(), CONTEXT), []

    def forward(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x)
        alive.append(weakref.ref(context.thread.prefetched.result[0]))
        up = self.up_proj(x)
        assert context.thread.prefetched is None
        return self.down_proj(self.act_fn(gate) * up)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", forward)
        step(model)
        patch.setattr(LlamaMLP, "forward", lambda self, x: self.gate_proj(x))
        step(model)
        assert context.thread.prefetched is None
        patch.setattr(LlamaMLP, "forward", lambda self, x: (self.gate_proj(x), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            step(model)
        assert context.thread.prefetched is None
    assert len(alive) == 2 and all(y() is None for y in alive)


def up_weight(mlp: LlamaMLP) -> torch.Tensor:
    return mlp.up_proj.base_layer.weight


def experts(mlp: LlamaMLP) -> torch.nn.Module:
    return mlp.up_proj.smolora_experts["default"]


BETWEEN = {  # what may happen between gate's call and up's
    "x written": lambda mlp, x: x.mul_(1.5),
    "base written": lambda mlp, x: up_weight(mlp).mul_(1.5),
    "base replaced": lambda mlp, x: setattr(
        mlp.up_proj.base_layer, "weight", torch.nn.Parameter(up_weight(mlp) * 1.5, requires_grad=False)
    ),
    "adapter written": lambda mlp, x: experts(mlp).vu_B.mul_(1.5),
    "adapter replaced": lambda mlp, x: setattr(experts(mlp), "vu_B", torch.nn.Parameter(experts(mlp).vu_B * 1.5)),
    "adapter disabled": lambda mlp, x: mlp.up_proj.enable_adapters(False),
    "adapter exchanged": lambda mlp, x: mlp.up_proj.set_adapter("other"),
    "adapter added": lambda mlp, x: mlp.up_proj.set_adapter(["default", "other"]),
    "hooked": lambda mlp, x: mlp.up_proj.base_layer.register_forward_hook(lambda module, inputs, y: y * 1.5),
    "another input": lambda mlp, x: x.clone(),
}


@pytest.mark.parametrize("event", BETWEEN)
def test_what_changed_is_computed_anew(
    event: str, model: PeftModel, launches: list[int], monkeypatch: pytest.MonkeyPatch
):
    """After gate has computed up's output: up computes its own, of what is there then."""
    model.add_adapter("other", tiny_config())
    fill_adapters(model, seed=2)
    model.eval()

    def forward(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x)
        changed = BETWEEN[event](self, x)
        up = self.up_proj(changed if event == "another input" else x)
        return self.down_proj(self.act_fn(gate) * up)

    with torch.no_grad():
        untouched = step(model)
        monkeypatch.setattr(LlamaMLP, "forward", forward)
        assert both(model, launches, step)[0] == 2  # or there was nothing to be wrong
        if event != "another input":
            assert not torch.equal(step(model), untouched)


def hook_up(mlp: LlamaMLP) -> None:
    mlp.up_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,))


def hook_experts(mlp: LlamaMLP) -> None:
    experts(mlp).register_forward_hook(lambda module, inputs, y: y * 1.5)


BEFORE = {  # what makes a layer's call more than one launch can stand for
    "pre-hook": hook_up,
    "hook of the adapter": hook_experts,
    "hook of the base": lambda mlp: mlp.up_proj.base_layer.register_forward_hook(lambda module, inputs, y: y * 1.5),
    "offloaded": lambda mlp: add_hook_to_module(mlp.up_proj.base_layer, ModelHook()),
    "adapter offloaded": lambda mlp: add_hook_to_module(experts(mlp), ModelHook()),
    "no plain layer": lambda mlp: setattr(
        mlp.up_proj.base_layer, "__class__", type("Other", (torch.nn.Linear,), {"forward": lambda self, x: x})
    ),
    "disabled": lambda mlp: mlp.up_proj.enable_adapters(False),
    "dropout": lambda mlp: (experts(mlp).train(), setattr(experts(mlp), "_threshold", 1)),
}


@pytest.mark.parametrize("what", BEFORE)
def test_who_computes_alone(what: str, model: PeftModel, launches: list[int]):
    """Its neighbour does not touch such a layer, which runs as if it had none."""
    for mlp in mlps(model):
        BEFORE[what](mlp)

    def forward(model: PeftModel) -> torch.Tensor:
        torch.manual_seed(0)
        return step(model)

    with torch.no_grad():
        assert 2 not in both(model, launches, forward)


def test_other_forwards(model: PeftModel, launches: list[int]):
    """A gradient, inference mode (whose tensors have no versions), two tokens, two adapters or none: each its own."""
    both(model, launches, lambda model: step(model).detach())
    assert launches == []
    with torch.inference_mode():
        assert both(model, launches, step) == APART
    with torch.no_grad():
        assert both(model, launches, lambda model: step(model, tokens=2)) == []
        with model.disable_adapter():
            assert both(model, launches, step) == []
        model.add_adapter("other", tiny_config())
        model.eval()
        model.base_model.set_adapter(["default", "other"])
        assert both(model, launches, step) == [1, 1] * 6
        model.base_model.set_adapter("other")
        assert both(model, launches, step) == TOGETHER
