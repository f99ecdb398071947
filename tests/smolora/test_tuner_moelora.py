"""MoELoRA: equal to its equation, and a PEFT method like any other."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call

from smolora.tuner import MoELoRAConfig
from smolora.tuner.moelora import MoELoRAExperts
from tiny_llava import ADAPTED, batch, tiny_llava


def config(**options) -> MoELoRAConfig:
    return MoELoRAConfig(
        **{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "num_experts": 3, "task_type": "CAUSAL_LM", **options}
    )


def filled(model: nn.Module, seed: int = 1) -> nn.Module:
    """B has values, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moelora_experts" in name and name.endswith(".B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def as_written(experts: MoELoRAExperts, x: torch.Tensor) -> torch.Tensor:
    """Token by token and expert by expert, each with a vector of the output's size."""
    gates = torch.softmax(x @ experts.router.T, -1)
    parts = [gates[..., e, None] * (x @ A.T @ B.T) for e, (A, B) in enumerate(zip(experts.A, experts.B, strict=True))]
    return experts.scaling * sum(parts)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (0, 7)])
def test_equation_and_gradients(shape):
    torch.manual_seed(0)
    experts = MoELoRAExperts(7, 11, config(), dtype=torch.float64)
    with torch.no_grad():
        experts.B.normal_()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    g = torch.randn(*shape[:-1], 11, dtype=torch.float64)
    ours, theirs = experts(x), as_written(experts, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    inputs = (x, *experts.parameters())
    for one, other in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(theirs, inputs, g), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_router_sees_what_dropout_drops():
    torch.manual_seed(0)
    experts = MoELoRAExperts(64, 8, config(lora_dropout=0.5))
    with torch.no_grad():
        experts.B.normal_()
        experts.router.mul_(30)
    x = torch.randn(3, 64)
    mean = torch.stack([experts(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, as_written(experts, x), rtol=0.1, atol=0.15)
    experts.eval()
    torch.testing.assert_close(experts(x), as_written(experts, x))


def test_targets_and_parameters():
    model = get_peft_model(tiny_llava(), config())
    assert sorted(model.targeted_module_names) == sorted(ADAPTED)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".moelora_experts.default." in name for name in trained)
    assert {name.rpartition(".")[2] for name in trained} == {"A", "B", "router"}


def test_a_new_adapter_changes_nothing_and_a_filled_one_does():
    base, inputs = tiny_llava(), batch((5, 9))
    with torch.no_grad():
        expected = base(**inputs).logits
        model = get_peft_model(base, config()).eval()
        assert torch.equal(model(**inputs).logits, expected)
        filled(model)
        assert (model(**inputs).logits - expected).abs().max() > 0.01
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, expected)


def test_every_parameter_gets_a_gradient():
    model = filled(get_peft_model(tiny_llava(), config(lora_dropout=0.1))).train()
    model(**batch((5, 9), answer=2)).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def test_save_and_load(tmp_path):
    model, inputs = filled(get_peft_model(tiny_llava(), config())).eval(), batch((5, 9))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path).eval()
    assert loaded.peft_config["default"].num_experts == 3
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        assert torch.equal(copy.deepcopy(loaded)(**inputs).logits, model(**inputs).logits)
    base = loaded.unload()
    with torch.no_grad():
        assert torch.equal(base(**inputs).logits, tiny_llava()(**inputs).logits)


def test_merging_is_refused():
    model = get_peft_model(tiny_llava(), config())
    with pytest.raises(ValueError, match="depend on the token"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="adapter_names must be left out"):
        model(**batch(), adapter_names=["default", "default"])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("r", 0, "r must be a positive integer, got 0"),
        ("num_experts", 1.5, "num_experts must be a positive integer, got 1.5"),
        ("lora_dropout", 1.0, "lora_dropout must lie in"),
        ("lora_alpha", -1, "lora_alpha must be a positive finite number"),
    ],
)
def test_bad_configurations(option, value, message):
    with pytest.raises(ValueError, match=message):
        config(**{option: value})


def test_other_layers_are_refused():
    with pytest.raises(TypeError, match="must name linear layers"):
        get_peft_model(tiny_llava(), config(target_modules=["embed_tokens"]))


def test_gradcheck():
    torch.manual_seed(0)
    experts = MoELoRAExperts(3, 4, config(r=2), dtype=torch.float64)
    names, values = zip(*experts.named_parameters(), strict=True)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    values = [torch.randn_like(value, requires_grad=True) for value in values]
    assert torch.autograd.gradcheck(
        lambda x, *values: functional_call(experts, dict(zip(names, values, strict=True)), (x,)), (x, *values)
    )
