"""The table of families selects the layers that it should in transformers' own models, and no others."""

import re

import pytest
import torch
import transformers as T
from peft import get_peft_model
from torch import nn

import smolora
from smolora.backbones.families import FAMILIES, PIXTRAL, default_targets, family_of
from smolora.tuner.features import vision_tower
from support.backbones import BACKBONES, OPT, TEXT_ONLY
from support.tiny_llava import tiny_config, tiny_llava

ALL = {**BACKBONES, **TEXT_ONLY}


@pytest.fixture(scope="module", params=ALL)
def built(request):
    with torch.device("meta"):
        return ALL[request.param], ALL[request.param].make()


def linears(model: nn.Module, pattern: str) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(pattern, name)]


def test_default_targets(built):
    backbone, model = built
    want = linears(model, backbone.targets)
    assert want and linears(model, default_targets("linear")[model.config.model_type]) == want


def test_attention(built):
    """Every linear layer of the attention of language model and tower; of Qwen3.5's without softmax not the gates."""
    _, model = built
    targets, tower = default_targets("attention"), vision_tower(model)
    if tower is None:
        assert model.config.model_type not in targets
        return
    inside = {id(module) for part in (model.get_decoder(), tower) for module in part.modules()}
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside]
    want = [name for name in names if re.search(r"attn|attention", name) and not re.search(r"\.in_proj_[abz]$", name)]
    assert linears(model, targets[model.config.model_type]) == want != []


def test_the_connector_holds_its_linear_layers(built):
    backbone, model = built
    family = family_of(model.config)
    inside = {name for name, _ in model.named_parameters() if family.is_in_connector(name)}
    text = re.compile(r"language_model|text_model")
    adapted = [name for name in linears(model, backbone.targets) if not text.search(name)]
    if family.connector is None:
        assert not inside
    else:
        assert inside and all(f"{name}.weight" in inside for name in adapted)
        assert bool(adapted) == (family.connector_linears is not None)
        assert not [name for name in inside if text.search(name) or ".layers." in name or ".blocks." in name]


def test_a_type_that_is_not_known_is_told_the_known_ones():
    with torch.device("meta"):
        model = T.OPTForCausalLM(OPT)
    known = re.escape(", ".join(FAMILIES))
    with pytest.raises(ValueError, match=rf"target_modules must be given for .* 'opt': names.*Known types are {known}"):
        get_peft_model(model, tiny_config())
    with pytest.raises(ValueError, match=r"target_modules must be given.* Known types are (?!.*phi3).*llama"):
        get_peft_model(model, smolora.MoECLConfig())


def test_a_llava_with_pixtrals_tower_gets_its_images_in_one_row():
    with torch.device("meta"):
        model = BACKBONES["pixtral"].make()
    assert model.config.model_type == "llava" and family_of(model.config) is PIXTRAL
    assert family_of(tiny_llava().config).image_rows == "images"
