"""RoutedLoRA adapters whose experts are in some layers only, as D-MoLE places them."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

import smolora
from smolora.tuner import MixtureLinear
from smolora.tuner.placement import place_experts
from support.tiny_llava import batch, tiny_llava

TEXT, TOWER = (
    "model.language_model.layers.{}.self_attn.{}_proj",
    "model.vision_tower.encoder.layers.0.self_attn.{}_proj",
)
Q0, O1, V = TEXT.format(0, "q"), TEXT.format(1, "o"), TOWER.format("v")
TARGETS = r".*(language_model|vision_tower)\..*\.self_attn\.(q|k|v|o|out)_proj"


def adapted(placement, **options):
    """A tiny Llava with three experts, of which each layer has some, filled."""
    config = smolora.RoutedLoRAConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, num_experts=3, target_modules=TARGETS, placement=placement, **options
    )
    model = get_peft_model(tiny_llava(), config)
    fill(model)
    return model.eval()


def fill(model) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".routedlora_experts." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def layers(model):
    return {m.smolora_key: m for m in model.modules() if isinstance(m, MixtureLinear)}


def logits(model, experts, inputs=None):
    with torch.no_grad():
        return model(**(inputs or batch((5, 9))), experts=experts).logits


def test_equals_the_full_adapter_with_zeros():
    """An expert that a layer lacks adds what an expert with B = 0 adds: nothing."""
    placement = {Q0: [0, 2], O1: [1], V: [2]}
    sparse = adapted(placement)
    assert {k: m.experts["default"].expert_ids for k, m in layers(sparse).items() if len(m.experts)} == placement
    full = adapted(None)
    with torch.no_grad():
        for key, layer in layers(full).items():
            experts = layer.experts["default"]
            experts.B.zero_()
            for slot, expert in enumerate(placement.get(key, [])):
                own = layers(sparse)[key].experts["default"]
                experts.A[expert], experts.B[expert] = own.A[slot], own.B[slot]
    given = [torch.tensor([[0, 2], [1, -1]]), torch.tensor([[2], [2]]), torch.tensor([[-1], [1]])]
    outputs = [logits(sparse, experts) for experts in given]
    for experts, got in zip(given, outputs, strict=True):
        torch.testing.assert_close(got, logits(full, experts), rtol=1e-5, atol=1e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2


def test_save_and_load(tmp_path):
    """A loaded adapter has exactly the experts that were saved, layer by layer."""
    model = adapted({Q0: [0, 2], V: [1]})
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path).eval()
    assert {k: [*m.experts] for k, m in layers(loaded).items()} == {k: [*m.experts] for k, m in layers(model).items()}
    experts = torch.tensor([[0, 1], [2, -1]])
    assert torch.equal(logits(loaded, experts), logits(model, experts))
    assert layers(loaded)[Q0].experts["default"].A.shape == (2, 4, 64)


def test_a_layer_reports_the_numbers_of_its_experts():
    model = adapted({Q0: [0, 2], V: [1]})
    logits(model, torch.tensor([[2, 1], [-1, 0]]))
    found = layers(model)[Q0].experts["default"].last_routing()
    assert found.ids.tolist() == [[2, -1], [-1, 0]]


def test_place_experts_keeps_what_was_there():
    model = adapted({Q0: [0, 2], V: [1]})
    experts = torch.tensor([[0, 1], [2, -1]])
    before, old = logits(model, experts), layers(model)[Q0].experts["default"].A.clone()
    layers(model)[Q0].experts["default"].freeze_experts(torch.tensor([False, True]))
    torch.manual_seed(0)
    place_experts(model, {Q0: [0, 1, 2], V: [1], O1: [1]})
    assert torch.equal(logits(model, experts), before), "new experts start with B = 0"
    now = layers(model)[Q0].experts["default"]
    assert torch.equal(now.A[[0, 2]], old) and not now.B[1].any()
    assert now.frozen_experts.tolist() == [False, False, True]
    assert 0.5 * 64**-0.5 < now.A[1].abs().max() <= 64**-0.5
    assert model.peft_config["default"].placement == {Q0: [0, 1, 2], V: [1], O1: [1]}
    assert all(p.requires_grad for p in now.parameters())
    place_experts(model, {Q0: [2]})
    assert [key for key, layer in layers(model).items() if len(layer.experts)] == [Q0]
    assert torch.equal(layers(model)[Q0].experts["default"].A, old[1:])
    place_experts(model, {})
    with torch.no_grad():
        assert torch.equal(model(**batch((5, 9)), experts=experts).logits, tiny_llava()(**batch((5, 9))).logits)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ({"model.lm": [0]}, "placement must name layers that target_modules select, got 'model.lm'"),
        ({Q0: [3]}, r"must be a list of different numbers of experts, 0 to 2, in ascending order, got \[3\]"),
        ({Q0: [1, 1]}, r"in ascending order, got \[1, 1\]"),
        ({Q0: 1}, "in ascending order, got 1"),
    ],
)
def test_bad_placements(placement: dict, message: str):
    with pytest.raises(ValueError, match=message):
        adapted(placement)


def test_place_experts_of_another_method():
    model = get_peft_model(tiny_llava(), smolora.MoELoRAConfig(num_experts=2, target_modules=TARGETS))
    with pytest.raises(ValueError, match="must name a RoutedLoRA adapter of the model, got 'default'"):
        place_experts(model, {Q0: [0]})


# ------------------------------------------------------------------------------------------------------------- router


def questions(rows: int, seed: int) -> torch.Tensor:
    """Embeddings of a task's questions: near one direction."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, generator=generator) + 0.1 * torch.randn(rows, 8, generator=generator)


@pytest.fixture(scope="module")
def routed():
    """An adapter with a router that knows tasks 0 and 2; task 2's expert is used beside task 0's."""
    model = adapted({Q0: [0, 2], O1: [1, 2], V: [0, 2]}, router_hidden=8, instruction_dim=8)
    router = model.base_model.selector()
    for task in (0, 2):
        inputs = batch((5,) * 12, seed=task)
        features = model.base_model.sample_features(**inputs, instruction_embeds=questions(12, task))
        assert features.image.shape == (12, 16)
        router.fit(task, features, max_epochs=200, quantile=1.0)
    router.companion[2] = 0
    return model


def asked(tasks: list[int]) -> dict[str, torch.Tensor]:
    """A batch whose samples ask questions of these tasks; other tasks than 0 and 2 are unknown."""
    rows = [questions(12, task)[i] for i, task in enumerate(tasks)]
    return {**batch((5,) * len(tasks), seed=0), "instruction_embeds": torch.stack(rows)}


def test_a_router_finds_the_experts(routed, tmp_path):
    """Also after saving and loading; experts that are given win."""
    inputs = asked([2, 0, 2])
    router, expected = routed.base_model.selector(), torch.tensor([[2, 0], [0, -1], [2, 0]])
    router.threshold[router.threshold >= 0] = 1.0  # so that the smaller error decides
    with torch.no_grad():
        found = routed(**inputs).logits
        assert torch.equal(found, routed(**inputs, experts=expected).logits)
        given = routed(**inputs, experts=torch.tensor([[1], [1], [1]])).logits
        assert (found - given).abs().max() > 1e-2
        routed.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path).eval()
        assert torch.equal(loaded(**inputs).logits, found)


def test_samples_are_routed_one_by_one(routed):
    """Mixed in a batch as alone, by `generate()` with and without beams, and without any expert where none fits."""
    router = routed.base_model.selector()
    router.threshold[router.threshold >= 0] = 1.0
    inputs = asked([2, 0, 2])
    for options in ({}, {"num_beams": 2}):
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
        together = routed.generate(**inputs, **options)
        for i in range(3):
            own = {name: value[i : i + 1] for name, value in inputs.items()}
            assert torch.equal(routed.generate(**own, **options)[0], together[i])
    router.threshold[router.threshold >= 0] = 0.0  # nothing is below: the pretrained model answers
    plain = {name: value for name, value in inputs.items() if name != "instruction_embeds"}
    with torch.no_grad():
        torch.testing.assert_close(routed(**inputs).logits, tiny_llava()(**plain).logits)


def test_without_a_router_or_a_task_experts_must_be_given():
    for options in ({}, {"router_hidden": 8, "instruction_dim": 8}):
        model = adapted({Q0: [0]}, **options)
        with pytest.raises(ValueError, match="experts must be given to the model's forward"):
            model(**asked([0, 2]))
