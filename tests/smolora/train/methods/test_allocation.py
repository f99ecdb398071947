"""D-MoLE's allocator: scores against autograd in float64, and the split of the budget."""

from __future__ import annotations

import re

import pytest
import torch
from peft import get_peft_model

import smolora
from smolora.train.methods.allocation import allocate, expert_budget, gradient_scores
from support.tiny_llava import batch, tiny_llava

ATTENTION = re.compile(r"model\.(language_model|vision_tower)\..*\.self_attn\.(q|k|v|o|out)_proj")


def scored(model):
    return {name: module for name, module in model.named_modules() if ATTENTION.fullmatch(name)}


def batches():
    return [batch((5, 9), answer=2, seed=seed) for seed in (0, 1, 2)]


@pytest.mark.parametrize("adapted", [False, True])
def test_scores_are_the_norms_of_the_weights_gradients(adapted: bool):
    """Also in a model with adapters that are switched off, whose weights and mode stay as they are."""
    model = tiny_llava(dtype=torch.float64)
    expected = {}
    for given in batches():
        weights = {name: layer.weight.requires_grad_() for name, layer in scored(model).items()}
        inputs = {name: t.double() if t.is_floating_point() else t for name, t in given.items()}
        loss = model(**inputs).loss
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, gradients, strict=True):
            expected[name] = expected.get(name, 0.0) + (0.0 if gradient is None else gradient.norm().item())
    model.requires_grad_(False)
    tuned = model
    if adapted:
        config = smolora.RoutedLoRAConfig(r=4, num_experts=2, target_modules=ATTENTION.pattern)
        tuned = get_peft_model(model, config).train()
        for name, parameter in tuned.named_parameters():
            if "experts" in name:
                torch.nn.init.normal_(parameter)
        tuned.base_model.disable_adapter_layers()
    layers = scored(model)
    inputs = [{name: t.double() if t.is_floating_point() else t for name, t in b.items()} for b in batches()]
    found = dict(zip(layers, gradient_scores(tuned, layers, inputs).tolist(), strict=True))
    assert found == pytest.approx(expected, rel=1e-10)
    unused = [name for name in found if "vision_tower.encoder.layers.1" in name]  # LLaVA reads the layer before
    assert len(found) == 16 and {name for name, score in found.items() if score == 0} == set(unused)
    assert tuned.training == adapted and all(p.grad is None for p in tuned.parameters())
    assert not any(module._forward_hooks for module in layers.values())


def test_scores_that_are_not_finite():
    model = tiny_llava().requires_grad_(False)
    inputs = batches()[0]
    inputs["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the gradient of model\..* is not finite"):
        gradient_scores(model, scored(model), [inputs])


LANGUAGE, VISION = [f"l{i}" for i in range(8)], [f"v{i}" for i in range(8)]


def split(language: list[float], vision: list[float], ratio=0.5, least=0.25, seed=0) -> tuple[list[str], list[str]]:
    scores = dict(zip([*LANGUAGE, *VISION], [*language, *vision], strict=True))
    chosen = allocate(scores, VISION, ratio=ratio, least_vision=least, seed=seed)
    return [name for name in chosen if name in LANGUAGE], [name for name in chosen if name in VISION]


def test_the_budget_follows_the_scores():
    rising = [float(i) for i in range(1, 9)]
    language, vision = split(rising, rising)
    assert language == ["l4", "l5", "l6", "l7"] and vision == ["v4", "v5", "v6", "v7"]
    language, vision = split([3 * s for s in rising], rising)
    assert (len(language), len(vision)) == (6, 2)
    language, vision = split([s / 1000 for s in rising], rising)
    assert (language, len(vision)) == (["l7"], 7), "the language model keeps one"


def test_the_vision_tower_gets_its_least():
    language, vision = split([1000.0] * 8, [1e-3 * i for i in range(8)])
    assert (len(language), vision) == (6, ["v6", "v7"])
    assert len(split([1000.0] * 8, [1e-3] * 8, least=0.5)[1]) == 4


def test_layers_that_no_gradient_reaches_are_not_chosen():
    language, vision = split([1.0] * 8, [0, 0, 0, 0, 0, 0, 0, 90.0])
    assert (len(language), vision) == (7, ["v7"]), "the rest of the tower's budget is the language model's"
    language, vision = split([1.0] * 8, [0.0] * 8, ratio=0.75)
    assert (len(language), vision) == (8, []), "a task without images"
    with pytest.raises(ValueError, match="no gradient reaches any of the scored layers"):
        split([0.0] * 8, [0.0] * 8)


def test_ties_are_decided_by_the_seed():
    found = {tuple(split([1.0] * 8, [1.0] * 8, seed=seed)[0]) for seed in range(5)}
    assert len(found) > 2 and all(len(names) == 4 for names in found)
    assert split([1.0] * 8, [1.0] * 8, seed=3) == split([1.0] * 8, [1.0] * 8, seed=3)


def test_budgets():
    assert expert_budget(128, 96, 0.5, 0.25) == (112, 28)
    assert expert_budget(8, 8, 0.125, 0.25) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 8, 0.05, 0.25), "got 0.05 of 8 and 8 scored layers, 1 experts of which 1 or more for the vision tower"),
        ((8, 0, 0.5, 0.25), "got 0.5 of 8 and 0 scored layers"),
        ((0, 8, 0.5, 0.25), "got 0.5 of 0 and 8 scored layers"),
        ((8, 8, 0.5, 1.0), "got 0.5 of 8 and 8 scored layers, 8 experts of which 8 or more"),
    ],
)
def test_budgets_that_leave_a_modality_without_an_expert(arguments, message: str):
    with pytest.raises(ValueError, match=f"budget must leave an expert for the language model and one .* {message}"):
        expert_budget(*arguments)
