"""LiLoRA in the trainer: its parameters, and what holds B from the second stage on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from small_llava import small_llava
from smolora.methods.lilora import LiLoRAExperts
from smolora.train.methods import Method
from smolora.train.run import TrainingRun
from smolora.tuner.counts import num_trainable

SHAPES = 2 * [(32, 96), (32, 96), (96, 32)]  # inputs and outputs of the adapted layers in the language model


def test_trained_parameters(short):
    """A stage trains A and a pair of half the rank; the first one, or each with the paper's loss, B too."""
    for regulariser in ("freeze", "paper"):
        method = Method(short("method=lilora", f"methods.lilora.regulariser={regulariser}"))
        assert method.adds_to_gradients == (regulariser == "paper")
        model = method.adapter.start(small_llava().requires_grad_(False), None)
        projector = [m for n, m in model.named_modules() if isinstance(m, LiLoRAExperts) and "projector" in n]
        shapes = SHAPES + [(m.in_features, m.out_features) for m in projector]
        pairs = sum(16 * d + 8 * (16 + k) + 1 for d, k in shapes)
        for number, stage in enumerate(method.course.stages()):
            method.freeze(model, stage)
            shared = 0 if regulariser == "freeze" and number else sum(16 * k for _, k in shapes)
            assert num_trainable(model) == pairs + shared


def test_the_term_once_a_step(short):
    """It adds the gradient of lambda times L_reg, summed over the layers, to what is there, at the given scale."""
    recipe = short("method=lilora", "methods.lilora.regulariser=paper", "methods.lilora.regulariser_weight=0.5")
    method = Method(recipe)
    model = method.adapter.start(small_llava().requires_grad_(False), None)
    experts = [module for module in model.modules() if isinstance(module, LiLoRAExperts)]
    torch.manual_seed(0)
    with torch.no_grad():
        for module in experts:
            module.task_B.normal_()
    first, second = method.course.stages()
    method.before_stage(model, SimpleNamespace(stage=first))
    method.step_term(model, 4.0)
    assert all(p.grad is None for p in model.parameters())  # nothing came before
    method.before_stage(model, SimpleNamespace(stage=second))
    before = [module.B.detach().clone() for module in experts]
    with torch.no_grad():
        for module in experts:
            module.B.normal_()
    total = 0.5 * sum(module.regulariser(1, 0, b) for module, b in zip(experts, before, strict=True))
    expected = torch.autograd.grad(total, [p for module in experts for p in (module.B, module.task_A, module.task_B)])
    for module in experts:
        module.B.grad = torch.ones_like(module.B)
    method.step_term(model, 4.0)
    got = [p.grad for module in experts for p in (module.B, module.task_A, module.task_B)]
    for i, (gradient, wanted) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(gradient, 4.0 * wanted + (1.0 if i % 3 == 0 else 0.0))
    assert all(module.A.grad is None for module in experts)


@pytest.mark.parametrize("regulariser", ["freeze", "paper"])
def test_runs(short, tmp_path, regulariser):
    """The pair of the first task keeps its bits in the second stage; A moves, and B as the regulariser lets it."""
    TrainingRun(
        short(
            "method=lilora",
            f"methods.lilora.regulariser={regulariser}",
            "methods.lilora.task=oracle",
            "training.batch_size=4",
            "training.per_device_batch_size=2",
        )
    )()
    stages = [tmp_path / "run" / name / "adapter" for name in ("stage-1-ImageNet", "stage-2-Flickr30k")]
    before, after = (load_file(stage / "adapter_model.safetensors") for stage in stages)
    names = [name for name in before if "lilora_experts" in name]
    assert len(names) == 8 * 5
    for name in names:
        kind, same = name.rpartition(".")[2], torch.equal(before[name], after[name])
        if kind in ("A", "B"):
            assert same == (kind == "B" and regulariser == "freeze"), name
        else:
            assert torch.equal(before[name][0], after[name][0]) and not torch.equal(before[name][1], after[name][1])
