"""SMoLoRA as a PEFT method: what PEFT and transformers offer for any adapter works for this one."""

import copy
import importlib.metadata
import json
import pickle
import sys

import peft
import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import smolora
from smolora.config import SMOLORA
from smolora.tuner import SMoLoRALinear, SMoLoRAModel
from tiny_llava import (
    ADAPTED,
    FFN,
    adapted,
    batch,
    embeddings,
    fill_adapters,
    tiny_config,
    tiny_llama,
    tiny_llava,
)  # fmt: skip

PARAMETERS = ("vu_A", "vu_B", "if_A", "if_B", "vu_router", "if_router", "vu_importance", "if_importance")


def adapted_names(model):
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {name for name, module in base.named_modules() if isinstance(module, SMoLoRALinear)}


def logits(model, seed=0, **extra):
    with torch.no_grad():
        return model(**batch(), instruction_embeds=embeddings(2, seed), **extra).logits


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------------------- targets


def test_registered_on_import():
    assert type(peft.get_peft_config({"peft_type": "SMOLORA", "r": 8})) is smolora.SMoLoRAConfig
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[SMOLORA] is SMoLoRAModel


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


# ----------------------------------------------------------------------------------------------------- saving, loading


def test_save_and_load(tmp_path):
    config = tiny_config(
        r=3, top_k=2, lora_dropout=0.25, route_over="valid", decode_routing="token", fusion="mean",
        router_grad="straight_through", num_vu_experts=2, num_if_experts=5,
    )  # fmt: skip
    model = adapted(config)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == {
        f"base_model.model.{layer}.smolora_experts.{name}" for layer in ADAPTED for name in PARAMETERS
    }
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path)
    saved = {**config.to_dict(), "inference_mode": True, "base_model_name_or_path": ""}
    assert {**loaded.peft_config["default"].to_dict(), "base_model_name_or_path": ""} == saved
    assert not trainable(loaded)
    assert torch.equal(logits(loaded), logits(model))
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llava(), tmp_path, adapter_name="other")), logits(model))


def test_loaded_for_training(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llava(), tmp_path, is_trainable=True)
    assert trainable(model) == trainable(adapted())


def test_low_cpu_mem_usage(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    assert torch.equal(logits(loaded), logits(model))


def test_low_cpu_mem_usage_does_not_round(tmp_path):
    """The way through the base's dtype would take float32 weights through bfloat16."""
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llava(dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=True)
    want = {n: p for n, p in model.state_dict().items() if "smolora" in n}
    assert want.keys() == {n for n in loaded.state_dict() if "smolora" in n}
    assert all(torch.equal(loaded.state_dict()[n], p) for n, p in want.items())


@pytest.mark.parametrize("auto", [AutoPeftModelForCausalLM, AutoPeftModel])
def test_auto_peft_model(tmp_path, auto):
    """By task, where transformers maps the model to it, and by the class that the configuration names."""
    base = tiny_llama() if auto is AutoPeftModelForCausalLM else tiny_llava()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, tiny_config(task_type="CAUSAL_LM" if auto is AutoPeftModelForCausalLM else None))
    fill_adapters(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = auto.from_pretrained(tmp_path / "adapter")
    assert type(loaded.get_base_model()) is type(base)
    inputs = {**batch((5, 9), (0, 0)), "instruction_embeds": embeddings(2)}
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_modules_to_save(tmp_path):
    model = get_peft_model(tiny_llava(), tiny_config(modules_to_save=["lm_head"], exclude_modules=["linear_1"])).eval()
    fill_adapters(model)
    head = "base_model.model.lm_head.modules_to_save.default.weight"
    assert head in trainable(model)
    with torch.no_grad():
        model.get_parameter(head).mul_(1.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**batch()).logits, tiny_llava()(**batch()).logits)


def damaged(folder, change):
    """The adapter's file after `change` of its tensors."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = "base_model.model.model.language_model.layers.0.mlp.up_proj.smolora_experts.vu_A"
DAMAGE = {
    "missing": (lambda t: t.pop(KEY), KeyError, r"missing .*up_proj.smolora_experts.default.vu_A"),
    "a whole layer missing": (
        lambda t: [t.pop(k) for k in list(t) if "linear_2" in k], KeyError, "missing .*linear_2"
    ),
    "extra": (lambda t: t.update({KEY + "x": torch.zeros(3)}), KeyError, "unknown .*vu_Ax"),
    "of another model": (lambda t: t.update({"lora_A": torch.zeros(3)}), KeyError, "unknown .*lora_A"),
    "wrong shape": (lambda t: t.update({KEY: t[KEY][:1].clone()}), RuntimeError, "up_proj.*vu_A"),
    "zero size": (lambda t: t.update({KEY: torch.zeros(0)}), RuntimeError, "up_proj.*vu_A"),
    "another adapter's": (
        lambda t: [t.update({k.replace("smolora_experts.", "lora_")[:-1]: t.pop(k)}) for k in list(t)],
        KeyError, "missing .*unknown",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_damaged_checkpoint_is_refused(tmp_path, what, low_cpu_mem_usage):
    """PEFT by itself warns of missing tensors and ignores unknown ones."""
    adapted().save_pretrained(tmp_path)
    change, error, message = DAMAGE[what]
    damaged(tmp_path, change)
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(tiny_llava(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path, keep):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Exception, match=r"(?i)safetensor|header|incomplete"):
        PeftModel.from_pretrained(tiny_llava(), tmp_path)


def test_a_pickle_with_code_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("code of a checkpoint ran",)

    model = adapted()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llava(), tmp_path)), logits(model))
    torch.save({KEY: Code()}, tmp_path / "adapter_model.bin")
    with pytest.raises(pickle.UnpicklingError, match=r"(?i)weights.only"):
        PeftModel.from_pretrained(tiny_llava(), tmp_path)


def test_an_unknown_config_value_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fusion": "sum"}))
    with pytest.raises(ValueError, match=r"fusion must be one of.*'sum'"):
        PeftModel.from_pretrained(tiny_llava(), tmp_path)


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
        if isinstance(module, SMoLoRALinear):
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
        next(m for m in model.modules() if isinstance(m, SMoLoRALinear)).merge,
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
