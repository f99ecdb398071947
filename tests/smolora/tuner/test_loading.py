"""Adapters saved and loaded, by PEFT and by transformers; broken ones are refused."""

import json

import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from smolora.tuner.loading import refused_peft
from support.tiny_llava import (
    ADAPTED,
    PARAMETERS,
    adapted,
    batch,
    embeddings,
    fill_adapters,
    logits,
    tiny_config,
    tiny_llama,
    tiny_llava,
    trainable,
)


def test_save_and_load(tmp_path):
    config = tiny_config(
        r=3,
        top_k=2,
        lora_dropout=0.25,
        route_over="valid",
        decode_routing="token",
        fusion="mean",
        router_grad="straight_through",
        num_vu_experts=2,
        num_if_experts=5,
    )
    model = adapted(config)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
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


def test_frozen_routers_that_zero_3_left_out(tmp_path):
    """The state dict of `Trainer` under ZeRO-3 has no frozen parameters: routers are saved, or an error is raised."""
    model = adapted()
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("_router")}
    routers = {name: p for name, p in model.named_parameters() if name.endswith("_router")}
    for parameter in routers.values():
        parameter.ds_numel = parameter.numel()  # as DeepSpeed marks what it partitions
    model.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llava(), tmp_path)), logits(model))
    name, parameter = routers.popitem()
    parameter.ds_numel += 1
    with pytest.raises(KeyError, match=f"{name}.*stage3_param_persistence_threshold"):
        model.save_pretrained(tmp_path, state_dict=state)


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


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_modules_to_save(tmp_path, low_cpu_mem_usage):
    model = get_peft_model(tiny_llava(), tiny_config(modules_to_save=["lm_head"], exclude_modules=["linear_1"])).eval()
    fill_adapters(model)
    head = "base_model.model.lm_head.modules_to_save.default.weight"
    assert head in trainable(model)
    with torch.no_grad():
        model.get_parameter(head).mul_(1.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**batch()).logits, tiny_llava()(**batch()).logits)


def test_several_adapters_each_with_its_default_instruction(tmp_path):
    """PEFT puts further adapters into folders of their own; their instruction embeddings go with them."""
    model = adapted(tiny_config(default_instruction=0))
    model.peft_config["default"].instruction_embeddings = embeddings(2)
    model.add_adapter("second", tiny_config(r=2, target_modules=["up_proj", "linear_2"], default_instruction=1))
    model.peft_config["second"].instruction_embeddings = embeddings(3, 5)
    fill_adapters(model, 4)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "second" / "instruction_embeddings.safetensors").is_file()
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path / "second", "second", low_cpu_mem_usage=True)
    found = []
    for name in ("second", "default"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        with torch.no_grad():
            found.append(model(**batch()).logits)
            assert torch.equal(loaded(**batch()).logits, found[-1])
    assert not torch.allclose(*found)
    own = tmp_path / "alone"
    model.save_pretrained(own, selected_adapters=["second"])
    alone = PeftModel.from_pretrained(tiny_llava(), own / "second")
    with torch.no_grad():
        assert torch.equal(alone(**batch()).logits, found[0])


def test_transformers_loads_the_base_of_an_adapters_folder(tmp_path):
    tiny_llava().save_pretrained(tmp_path / "base")
    model = get_peft_model(LlavaForConditionalGeneration.from_pretrained(tmp_path / "base"), tiny_config())
    fill_adapters(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is LlavaForConditionalGeneration
    assert torch.equal(logits(loaded), logits(model))


def damaged(folder, change):
    """The adapter's file after `change` of its tensors."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = "base_model.model.model.language_model.layers.0.mlp.up_proj.smolora_experts.vu_A"
DAMAGE = {
    "missing": (lambda t: t.pop(KEY), KeyError, r"missing .*up_proj.smolora_experts.default.vu_A"),
    "a whole layer missing": (lambda t: [t.pop(k) for k in list(t) if "linear_2" in k], KeyError, "missing .*linear_2"),
    "extra": (lambda t: t.update({KEY + "x": torch.zeros(3)}), KeyError, "unknown .*vu_Ax"),
    "of another model": (lambda t: t.update({"lora_A": torch.zeros(3)}), KeyError, "unknown .*lora_A"),
    "wrong shape": (lambda t: t.update({KEY: t[KEY][:1].clone()}), RuntimeError, "up_proj.*vu_A"),
    "zero size": (lambda t: t.update({KEY: torch.zeros(0)}), RuntimeError, "up_proj.*vu_A"),
    "another adapter's": (
        lambda t: [t.update({k.replace("smolora_experts.", "lora_")[:-1]: t.pop(k)}) for k in list(t)],
        KeyError,
        "missing .*unknown",
    ),
}


WAYS = {
    "PeftModel": lambda folder: PeftModel.from_pretrained(tiny_llava(), folder),
    "low_cpu_mem_usage": lambda folder: PeftModel.from_pretrained(tiny_llava(), folder, low_cpu_mem_usage=True),
    "a second adapter": lambda folder: adapted().load_adapter(folder, "second"),
    "transformers": lambda folder: tiny_llava().load_adapter(str(folder)),
    "transformers, a second adapter": lambda folder: transformers_adapted().load_adapter(str(folder), "second"),
}


def transformers_adapted():
    if (reason := refused_peft()) is not None:
        pytest.skip(reason)
    model = tiny_llava()
    model.add_adapter(tiny_config())
    return model


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_checkpoint_is_refused(tmp_path, what, way):
    """PEFT and transformers by themselves warn of missing tensors and ignore unknown ones."""
    adapted().save_pretrained(tmp_path)
    change, error, message = DAMAGE[what]
    damaged(tmp_path, change)
    message = message.replace("default", "second") if "second" in way else message
    with pytest.raises((error, ValueError), match=message):
        WAYS[way](tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_a_flipped_bit_is_refused(tmp_path, way):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-777] ^= 4
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"is broken: the values of '.+' are not those that were written"):
        WAYS[way](tmp_path)


def test_transformers_loads_what_the_default_instruction_needs(tmp_path):
    want = adapted(tiny_config(default_instruction=1))
    want.peft_config["default"].instruction_embeddings = embeddings(2)
    want.save_pretrained(tmp_path)
    model = tiny_llava()
    model.load_adapter(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, want(**batch()).logits)
    (tmp_path / "instruction_embeddings.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*instruction_embeddings\.safetensors"):
        tiny_llava().load_adapter(str(tmp_path))


def test_a_lora_beside_it_is_loaded_as_ever(tmp_path):
    lora = LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    get_peft_model(tiny_llava(), lora).save_pretrained(tmp_path)
    model = transformers_adapted()
    assert not model.load_adapter(str(tmp_path), "lora").unexpected_keys
    assert len([name for name in model.state_dict() if ".lora." in name]) == 4


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
    with pytest.raises(ValueError, match="could run code"):
        PeftModel.from_pretrained(tiny_llava(), tmp_path)


def test_an_unknown_config_value_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fusion": "sum"}))
    with pytest.raises(ValueError, match=r"fusion must be one of.*'sum'"):
        PeftModel.from_pretrained(tiny_llava(), tmp_path)
