"""What people do with PEFT's adapters: it works with these as with others, or is refused and changes nothing."""

import contextlib

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from transformers import Trainer, TrainingArguments

from support.tiny_llava import adapted, batch, embeddings, fill_adapters, logits, tiny_config, tiny_llava, trainable


def tied():
    model = tiny_llava()
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    return model


def grown():
    model = tiny_llava()
    torch.manual_seed(5)
    model.resize_token_embeddings(model.config.get_text_config().vocab_size + 2, mean_resizing=False)
    return model


def train(model):
    model.train()(**batch(answer=3), instruction_embeds=embeddings(2)).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    model.eval()


# base, configuration, how it is saved, how it is loaded
ROUND_TRIPS = {
    "autocast_adapter_dtype=False": (tiny_llava, {}, {}, {"autocast_adapter_dtype": False}),
    "is_trainable": (tiny_llava, {}, {}, {"is_trainable": True}),
    "embeddings saved": (tiny_llava, {}, {"save_embedding_layers": True}, {}),
    "two more tokens": (grown, {}, {}, {}),
    "two more tokens, embeddings saved": (grown, {}, {"save_embedding_layers": True}, {}),
    "a head": (tiny_llava, {"modules_to_save": ["lm_head"]}, {}, {}),
    "a head and embeddings": (tiny_llava, {"modules_to_save": ["embed_tokens", "lm_head"]}, {}, {}),
    "a head, low_cpu_mem_usage": (tiny_llava, {"modules_to_save": ["lm_head"]}, {}, {"low_cpu_mem_usage": True}),
    "a norm": (tiny_llava, {"modules_to_save": ["norm"]}, {}, {}),
    "a projector": (tiny_llava, {"target_modules": ["up_proj"], "modules_to_save": ["linear_1"]}, {}, {}),
    "an adapted head": (tiny_llava, {"target_modules": ["lm_head", "up_proj"]}, {}, {}),
    "all-linear": (tiny_llava, {"target_modules": "all-linear"}, {}, {}),
    "tied": (tied, {}, {}, {}),
    "tied, an adapted head": (tied, {"target_modules": ["lm_head"]}, {}, {}),
    "tied, a head": (tied, {"modules_to_save": ["lm_head"]}, {}, {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_heads_and_embeddings_are_saved_and_loaded(case, tmp_path):
    make, options, save, load = ROUND_TRIPS[case]
    model = get_peft_model(make(), tiny_config(**options))
    fill_adapters(model)
    train(model)
    model.save_pretrained(tmp_path, **save)
    again = PeftModel.from_pretrained(make(), tmp_path, **load).eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_saved_modules_are_switched_with_their_adapter():
    with torch.no_grad():
        base = tiny_llava()(**batch()).logits
    model = get_peft_model(tiny_llava(), tiny_config(modules_to_save=["lm_head", "norm"]))
    fill_adapters(model)
    train(model)
    own = logits(model)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**batch()).logits, base)
    assert torch.equal(logits(model), own)
    model.add_adapter("second", tiny_config(target_modules=r".*language_model.*up_proj"))
    model.set_adapter("second")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".smolora_experts.second." in name and name.endswith(("_A", "_B")):
                parameter.normal_(std=0.2)
    model.eval()
    assert not torch.allclose(logits(model), own)
    model.set_adapter("default")
    assert torch.equal(logits(model), own)


@pytest.mark.parametrize("names", [("a", "b", "c"), ("c", "b", "a"), ("b", "a", "c")], ids="".join)
def test_several_adapters_are_saved_and_loaded_in_any_order(names, tmp_path):
    """With other targets, sizes and modules to save; one by itself."""
    model = get_peft_model(tiny_llava(), tiny_config(modules_to_save=["lm_head"]), adapter_name="a")
    fill_adapters(model)
    train(model)
    for seed, (name, options) in enumerate(
        {
            "b": {"target_modules": ["up_proj"], "modules_to_save": ["norm"]},
            "c": {"target_modules": ["gate_proj"]},
        }.items()
    ):
        model.add_adapter(name, tiny_config(r=2, **options))
        model.set_adapter(name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f".smolora_experts.{name}." in key and key.endswith(("_A", "_B")):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        train(model)
    want = {}
    for name in "abc":
        model.set_adapter(name)
        want[name] = logits(model.eval())
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "chosen", selected_adapters=["c"])
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path / names[0], adapter_name=names[0])
    for name in names[1:]:
        loaded.load_adapter(tmp_path / name, name)
    for name in names:
        loaded.set_adapter(name)
        torch.testing.assert_close(logits(loaded.eval()), want[name], rtol=1e-5, atol=1e-5)
    one = PeftModel.from_pretrained(tiny_llava(), tmp_path / "chosen" / "c").eval()
    torch.testing.assert_close(logits(one), want["c"], rtol=1e-5, atol=1e-5)


@pytest.fixture
def two(tmp_path):
    """Folders of two adapters, and the logits with each."""
    found = []
    for seed in (1, 9):
        model = adapted()
        fill_adapters(model, seed)
        model.save_pretrained(tmp_path / str(seed))
        found.append((tmp_path / str(seed), logits(model)))
    return found


@pytest.mark.filterwarnings("ignore")
def test_adapters_put_in_twice(two):
    """Over a base that has one already: the last one's outputs, or an error with the names that are missing."""
    (one, first), (other, second) = two
    base = tiny_llava()
    PeftModel.from_pretrained(base, one)
    assert torch.equal(logits(PeftModel.from_pretrained(base, other).eval()), second)
    assert torch.equal(logits(PeftModel.from_pretrained(base, one).eval()), first)
    assert torch.equal(
        logits(PeftModel.from_pretrained(PeftModel.from_pretrained(tiny_llava(), one).unload(), other).eval()), second
    )
    with pytest.raises(KeyError, match=r"missing.*smolora_experts"):
        PeftModel.from_pretrained(PeftModel.from_pretrained(tiny_llava(), one), other)
    lora = get_peft_model(tiny_llava(), LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(KeyError, match=r"missing.*smolora_experts"):
        PeftModel.from_pretrained(lora, one)


def test_hotswap_is_refused(two):
    (one, first), (other, _) = two
    model = PeftModel.from_pretrained(tiny_llava(), one).eval()
    with pytest.raises(ValueError, match="Hotswapping only supports"):
        hotswap_adapter(model, other, "default")
    assert torch.equal(logits(model), first)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["stage-1", "stage 2", "a/b", "if_A", "vu_B", "smolora", "default_0", "0", "ünïcode"])
def test_names_of_adapters(name, two, tmp_path):
    """As people call them, or as parameters are called."""
    (folder, want), _ = two
    model = PeftModel.from_pretrained(tiny_llava(), folder, adapter_name=name).eval()
    assert torch.equal(logits(model), want)
    model.save_pretrained(tmp_path / "out")
    saved = next(path.parent for path in (tmp_path / "out").rglob("adapter_config.json"))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llava(), saved).eval()), want)


@pytest.mark.parametrize("name", ["v1.0", "train", "keys"])
def test_names_that_modules_cannot_have(name, two):
    with pytest.raises(KeyError, match=name):
        PeftModel.from_pretrained(tiny_llava(), two[0][0], adapter_name=name)


CALLS = {
    "status of the model": (lambda m: m.get_model_status(), None),
    "status of layers": (lambda m: m.get_layer_status(), None),
    "print_trainable_parameters": (lambda m: m.print_trainable_parameters(), None),
    "there and back": (lambda m: (m.set_adapter("b"), m.set_adapter("default")), None),
    "set_requires_grad": (lambda m: m.set_requires_grad("default"), None),
    "unmerge_adapter": (lambda m: m.unmerge_adapter(), None),
    "add_weighted_adapter": (lambda m: m.add_weighted_adapter(["default", "b"], [0.5, 0.5], "c"), AttributeError),
    "merge_adapter": (lambda m: m.merge_adapter(), ValueError),
    "an unknown adapter": (lambda m: m.set_adapter("nobody"), ValueError),
    "an adapter for each sample": (
        lambda m: m.generate(**batch(), instruction_embeds=embeddings(2), adapter_names=["default", "__base__"]),
        ValueError,
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_that_change_no_output(call):
    model = adapted()
    model.add_adapter("b", tiny_config(r=2))
    fill_adapters(model)
    model.eval()
    before, (function, error) = logits(model), CALLS[call]
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        function(model)
    assert torch.equal(logits(model), before)
    assert not [name for name in trainable(model) if "router" in name]


def test_mixed_models_and_scales_are_refused():
    with pytest.raises(ValueError, match="SMOLORA"):
        get_peft_model(tiny_llava(), tiny_config(), mixed=True)
    with pytest.raises(ValueError), peft.helpers.rescale_adapter_scale(adapted(), 0.5):
        pass


def test_state_dicts():
    model, other = adapted(), get_peft_model(tiny_llava(), tiny_config()).eval()
    tensors = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(other, tensors)
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(KeyError, match="missing"):
        set_peft_model_state_dict(other, dict(list(tensors.items())[1:]))


def test_evaluation_by_transformers_trainer(tmp_path):
    model, inputs, e = adapted(), batch((6, 6), seed=3, answer=3), embeddings(2)
    rows = [{name: tensor[i] for name, tensor in inputs.items()} | {"instruction_embeds": e[i]} for i in range(2)]
    arguments = TrainingArguments(
        tmp_path, per_device_eval_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    found = Trainer(model, arguments, eval_dataset=rows).evaluate()
    with torch.no_grad():
        want = float(model(**inputs, instruction_embeds=e).loss)
    assert found["eval_loss"] == pytest.approx(want, abs=1e-4)


DTYPES = {
    "a bfloat16 base": (torch.bfloat16, {}, None),
    "all of bfloat16": (torch.bfloat16, {"autocast_adapter_dtype": False}, None),
    "a float16 base": (torch.float16, {}, None),
    "autocast": (torch.float32, {}, torch.bfloat16),
    "a bfloat16 base, autocast": (torch.bfloat16, {}, torch.bfloat16),
}


@pytest.mark.parametrize("case", DTYPES)
def test_dtypes_of_base_adapter_and_autocast(case):
    """Near float32's outputs, with finite gradients."""
    dtype, options, autocast = DTYPES[case]
    model = get_peft_model(tiny_llava(dtype=dtype), tiny_config(), **options).eval()
    fill_adapters(model)
    inputs, e = batch(answer=3), embeddings(2)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        out = model.train()(**inputs, instruction_embeds=e)
    out.loss.backward()
    want = adapted().train()(**batch(answer=3), instruction_embeds=e).logits
    assert (out.logits.float() - want).abs().max() < 0.35
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_embeddings_of_any_precision(dtype):
    e = embeddings(2).to(dtype)
    with torch.no_grad():
        got = adapted()(**batch(), instruction_embeds=e).logits
        want = adapted()(**batch(), instruction_embeds=e.float()).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_assistants(options):
    """The base or another model proposes; one with adapters has no instruction, which is said."""
    model, inputs, e = adapted(), batch((6,), seed=2), embeddings(1)
    greedy = {"max_new_tokens": 8, "do_sample": False, "instruction_embeds": e}
    want = model.generate(**inputs, **greedy)
    if not options:
        assert torch.equal(model.generate(**inputs, **greedy, assistant_model=tiny_llava(3)), want)
        with pytest.raises(ValueError, match="instruction_embeds must be given"):
            model.generate(**inputs, **greedy, assistant_model=adapted(seed=3))
    found = model.generate(**inputs, **greedy, **options, output_scores=True, return_dict_in_generate=True)
    assert torch.equal(found.sequences, want)


def test_values_of_padding_reach_no_route():
    """Not a number, or too large a one, where the mask leaves a token out."""
    model, e, inputs = (
        adapted(tiny_config(target_modules=r".*language_model\.layers\.1\.mlp\..*_proj")),
        embeddings(2),
        batch(),
    )
    with torch.no_grad():
        want = model(**inputs, instruction_embeds=e).logits
        padding = ~inputs["attention_mask"].bool()
        layer = model.get_base_model().model.language_model.layers[1].mlp

        for value in (float("nan"), float("inf"), 1e38):
            handle = layer.register_forward_pre_hook(
                lambda module, args, value=value: (args[0].masked_fill(padding[..., None], value),)
            )
            got = model(**inputs, instruction_embeds=e).logits
            handle.remove()
            assert torch.equal(got[~padding], want[~padding])
