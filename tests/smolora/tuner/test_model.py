"""SMoLoRA as a PEFT method: what PEFT and transformers offer for any adapter works for this one."""

import copy
import importlib.metadata
import pickle
import sys

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import LlavaForConditionalGeneration
from transformers.integrations import peft as integration

import smolora
from smolora.tuner import MixtureLinear, SMoLoRAModel
from smolora.tuner.loading import refused_peft
from support.tiny_llava import (
    ADAPTED,
    FFN,
    PARAMETERS,
    adapted,
    batch,
    embeddings,
    fill_adapters,
    logits,
    tiny_config,
    tiny_llava,
    trainable,
)


def adapted_names(model):
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {name for name, module in base.named_modules() if isinstance(module, MixtureLinear)}


# ------------------------------------------------------------------------------------------------------------- targets


def test_registered_on_import():
    assert type(peft.get_peft_config({"peft_type": "SMOLORA", "r": 8})) is smolora.SMoLoRAConfig
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.SMOLORA] is SMoLoRAModel


def test_an_older_peft_is_named(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.1" if name == "peft" else real(name))
    names = [name for name in sys.modules if name == "smolora" or name.startswith("smolora.")]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"needs peft 0\.21 or newer, found 0\.20\.1"):
        __import__("smolora.config")


def test_default_targets_are_the_text_ffn_and_the_projector():
    assert adapted_names(get_peft_model(tiny_llava(), tiny_config())) == set(ADAPTED)


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (["gate_proj", "linear_2"], lambda name: name.endswith(("gate_proj", "linear_2"))),
        (r".*layers\.1\.mlp\.(up|down)_proj", lambda name: "layers.1.mlp" in name and "gate" not in name),
        ("all-linear", None),
    ],
)
def test_targets_by_list_and_regex(targets, match):
    model = get_peft_model(tiny_llava(), tiny_config(target_modules=targets))
    if match is None:
        linears = {n for n, m in tiny_llava().named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
        assert adapted_names(model) == linears
        assert logits(model).isfinite().all()  # the vision tower's rows are images
    else:
        assert adapted_names(model) == {name for name in ADAPTED if match(name)}


def test_exclude_modules():
    model = get_peft_model(tiny_llava(), tiny_config(exclude_modules=r".*projector.*"))
    assert adapted_names(model) == {name for name in ADAPTED if "projector" not in name}


def test_targets_that_are_no_linear_layers():
    with pytest.raises(TypeError, match=r"linear layers.*embed_tokens is Embedding"):
        get_peft_model(tiny_llava(), tiny_config(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match=r"Target modules .*nothing.* not found"):
        get_peft_model(tiny_llava(), tiny_config(target_modules=["nothing"]))


def test_a_fresh_adapter_changes_nothing_and_all_of_it_trains():
    base = tiny_llava()
    with torch.no_grad():
        want = base(**batch()).logits
    model = get_peft_model(base, tiny_config())
    assert torch.equal(logits(model), want)
    names = {p for p in PARAMETERS if not p.endswith("router")}
    assert trainable(model) == {
        f"base_model.model.{layer}.smolora_experts.default.{p}" for layer in ADAPTED for p in names
    }
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "smolora" in n)


def test_print_trainable_parameters(capsys):
    model = get_peft_model(tiny_llava(), tiny_config())
    model.print_trainable_parameters()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"trainable params: {count:,}" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    """Float32 beside a half-precision base; the base's own only if asked for."""
    model = get_peft_model(tiny_llava(dtype=dtype), tiny_config())
    want = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for n, p in model.named_parameters() if "smolora" in n} == {want}
    model = get_peft_model(tiny_llava(dtype=dtype), tiny_config(), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in model.named_parameters() if "smolora" in n} == {dtype}
    inputs = batch()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    assert model(**inputs, instruction_embeds=embeddings(2)).logits.dtype == dtype


# ------------------------------------------------------------------------------------------------ without a PeftModel


def test_inject_adapter_in_model():
    model = peft.inject_adapter_in_model(tiny_config(), tiny_llava()).eval()
    assert isinstance(model, LlavaForConditionalGeneration) and adapted_names(model) == set(ADAPTED)
    fill_adapters(model)
    assert torch.equal(logits(model), logits(adapted()))
    e = embeddings(2)
    got = model.generate(**batch(), instruction_embeds=e, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, adapted().generate(**batch(), instruction_embeds=e, max_new_tokens=6, do_sample=False))
    with pytest.raises(ValueError, match="instruction_embeds must be given"):
        model(**batch())


@pytest.mark.skipif(refused_peft() is not None, reason=str(refused_peft()))
def test_adapters_of_transformers(tmp_path):
    """add_adapter, save_pretrained, load_adapter, disable_adapters, set_adapter of a PreTrainedModel."""
    want = adapted()
    want.save_pretrained(tmp_path / "peft")
    model = tiny_llava()
    model.load_adapter(str(tmp_path / "peft"))
    assert torch.equal(logits(model), logits(want))
    model.disable_adapters()
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, tiny_llava()(**batch()).logits)
    model.enable_adapters()
    model.load_adapter(str(tmp_path / "peft"), adapter_name="again", is_trainable=True)
    model.set_adapter("again")
    assert torch.equal(logits(model), logits(want))
    assert not [name for name in trainable(model) if "router" in name]
    model.set_adapter("default")
    model.save_pretrained(tmp_path / "transformers")
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path / "transformers")
    assert torch.equal(logits(loaded), logits(want))
    fresh = tiny_llava()
    fresh.add_adapter(tiny_config())
    assert trainable(fresh) == {name.removeprefix("base_model.model.") for name in trainable(want)}


def test_a_peft_that_transformers_refuses(monkeypatch):
    """What helps is said before transformers asks for a version that may not exist yet."""
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "99.0")
    with pytest.raises(ValueError, match=r"need peft 99.0, and peft .* is installed: .*get_peft_model\(\)"):
        tiny_llava().add_adapter(tiny_config())
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "0.1")
    assert refused_peft() is None


# ---------------------------------------------------------------------------------------------------- several adapters


def test_several_adapters():
    model = adapted()
    model.add_adapter("second", tiny_config(r=2, top_k=2, target_modules=["gate_proj", "linear_1"]))
    fill_adapters(model, seed=5)
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(first, second)
    wanted = {name for name in trainable(model) if ".second." in name}
    assert wanted == trainable(model) and len(wanted) == 3 * len(PARAMETERS)  # routers learn with top_k=2
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert not [name for name in trainable(model) if "router" in name or ".second." in name]
    model.delete_adapter("second")
    assert not [name for name in model.state_dict() if ".second." in name]
    assert torch.equal(logits(model), first)
    model.delete_adapter("default")
    with torch.no_grad():  # PEFT's own forward wants an active adapter
        assert torch.equal(model.base_model.model(**batch()).logits, tiny_llava()(**batch()).logits)


def test_several_adapters_generate():
    """One after the other, together, and none of them: each as by itself, with a cache and without."""
    inputs, e = batch((5, 9), (2, 1)), embeddings(2)

    def tokens(model, **options):
        return model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)

    model = adapted()
    first = tokens(model, instruction_embeds=e)
    model.add_adapter("second", tiny_config(r=2, top_k=2, target_modules=["gate_proj", "linear_1"]))
    fill_adapters(model, seed=5)
    model.base_model.set_adapter(["default", "second"])
    both = tokens(model, instruction_embeds=e)
    assert torch.equal(tokens(model, instruction_embeds=e, use_cache=False), both)
    with model.disable_adapter():
        assert torch.equal(tokens(model), tokens(tiny_llava()))
        assert torch.equal(tokens(model, num_beams=2), tokens(tiny_llava(), num_beams=2))
    assert torch.equal(tokens(model, instruction_embeds=e), both)
    model.set_adapter("second")
    second = tokens(model, instruction_embeds=e)
    assert len({tuple(found.flatten().tolist()) for found in (first, second, both)}) == 3
    model.delete_adapter("second")
    model.set_adapter("default")
    fill_adapters(model)
    assert torch.equal(tokens(model, instruction_embeds=e), first)


def test_an_adapter_for_each_sample_is_refused():
    """PEFT takes `adapter_names` off the arguments, so that nobody would look at it."""
    model = adapted()
    model.add_adapter("second", tiny_config(r=2))
    options = {"instruction_embeds": embeddings(2), "adapter_names": ["default", "second"]}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"adapter_names must be left out.*got \['default', 'second'\]"):
            call(**batch(), **options)


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({}, {"vu_router", "if_router"}),
        ({"top_k": 2}, set()),
        ({"router_grad": "straight_through"}, set()),
        ({"fusion": "mean"}, {"vu_router", "if_router", "vu_importance", "if_importance"}),
        ({"fusion": "vu", "top_k": 2}, {"if_A", "if_B", "if_router", "vu_importance", "if_importance"}),
    ],
)
def test_what_gets_no_gradient_stays_frozen(options, frozen):
    """PEFT switches all of an adapter's parameters on, in set_adapter and after disable_adapter."""
    model = get_peft_model(tiny_llava(), tiny_config(**options))

    def is_frozen():
        return {n.split(".")[-1] for n, p in model.named_parameters() if "smolora" in n and not p.requires_grad}

    assert is_frozen() == frozen
    model.set_adapter("default")
    assert is_frozen() == frozen
    with model.disable_adapter():
        assert is_frozen() == set(PARAMETERS)
    assert is_frozen() == frozen
    model.set_adapter("default", inference_mode=True)
    assert is_frozen() == set(PARAMETERS)
    model.set_requires_grad("default")
    assert is_frozen() == frozen
    model.set_requires_grad("default", requires_grad=False)
    assert is_frozen() == set(PARAMETERS)


def test_beside_a_lora_adapter():
    """One base, both methods, by transformers' own adapters."""
    config = LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, tiny_llava())
    with torch.no_grad():
        lora = model(**batch()).logits
    model = peft.inject_adapter_in_model(tiny_config(), model, "smolora_one")
    assert sum(isinstance(m, BaseTunerLayer) for m in model.modules()) == len(ADAPTED) + 2
    for module in model.modules():
        if isinstance(module, MixtureLinear):
            module.set_adapter("smolora_one")
    assert torch.equal(logits(model), lora)  # B is zero
    fill_adapters(model)
    assert not torch.allclose(logits(model), lora)


# ------------------------------------------------------------------------------------------------- removing, refusing


def test_disable_adapter():
    model = adapted()
    with torch.no_grad():
        want = tiny_llava()(**batch()).logits
        with model.disable_adapter():
            assert torch.equal(model(**batch()).logits, want)
            assert torch.equal(model(**batch(), instruction_embeds=embeddings(2)).logits, want)
            greedy = model.generate(**batch(), instruction_embeds=embeddings(2), max_new_tokens=5, do_sample=False)
            model.get_base_model().get_image_features(batch()["pixel_values"])
    assert torch.equal(greedy, tiny_llava().generate(**batch(), max_new_tokens=5, do_sample=False))
    assert not torch.allclose(logits(model), want)


def test_unload():
    model = adapted()
    before = logits(model)
    base = model.unload()
    fresh = tiny_llava()
    assert type(base) is type(fresh) and base.state_dict().keys() == fresh.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(base(**batch()).logits, fresh(**batch()).logits)
    assert torch.equal(base.generate(**batch(), max_new_tokens=4), fresh.generate(**batch(), max_new_tokens=4))
    hooks = [hook for m in base.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert not [hook for hook in hooks if hook.__module__.startswith("smolora")]
    assert base.__dict__.keys() == fresh.__dict__.keys()
    again = get_peft_model(base, tiny_config()).eval()
    fill_adapters(again)
    assert torch.equal(logits(again), before)


def test_merging_is_refused_with_the_reason():
    model = adapted()
    before = logits(model)
    for merge in (
        model.merge_and_unload,
        model.merge_adapter,
        next(m for m in model.modules() if isinstance(m, MixtureLinear)).merge,
    ):
        with pytest.raises(ValueError, match=r"cannot be merged.*alpha and beta.*depend on the sample and the token"):
            merge()
    assert torch.equal(logits(model), before)


# -------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_a_model_of_its_own(how):
    model = adapted()
    want, other = logits(model), logits(model, 7)
    # transformers' own hooks cannot be pickled once a model has run
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(adapted()))
    with pytest.raises(RuntimeError, match="outside of its model's forward"):
        twin.get_base_model().get_image_features(batch()["pixel_values"])
    assert torch.equal(logits(twin), want)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.endswith("_B"):
                parameter.zero_()
    greedy = dict(max_new_tokens=5, do_sample=False)
    assert torch.equal(
        twin.generate(**batch(), instruction_embeds=embeddings(2), **greedy),
        tiny_llava().generate(**batch(), **greedy),
    )
    assert torch.equal(logits(model), want) and torch.equal(logits(model, 7), other)


def test_models_in_one_process_do_not_share_instructions():
    one, two = adapted(), adapted()
    first, second = embeddings(2), embeddings(2, 7)
    want = one(**batch(), instruction_embeds=first).logits, two(**batch(), instruction_embeds=second).logits
    with torch.no_grad():

        def inside(module, args):
            assert torch.equal(two(**batch(), instruction_embeds=second).logits, want[1])

        handle = one.get_base_model().model.language_model.layers[0].register_forward_pre_hook(inside)
        got = one(**batch(), instruction_embeds=first).logits
        handle.remove()
    assert torch.equal(got, want[0])


def test_config_is_found_by_peft(tmp_path):
    tiny_config(target_modules=list(FFN)).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is smolora.SMoLoRAConfig and config.target_modules == set(FFN)
