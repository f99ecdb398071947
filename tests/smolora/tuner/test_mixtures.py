"""Every mixture but SMoLoRA as a PEFT method like any other; SMoLoRA has files of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import smolora
from smolora.config import MixtureConfig
from support.tiny_llava import ADAPTED, batch, tiny_llava

OPTIONS = {
    "moelora": {"num_experts": 3},
    "routedlora": {"num_experts": 3},
    "branchlora": {"num_branches": 4, "num_tasks": 3},
    "lilora": {"task_r": 2, "num_tasks": 3},
    "moecl": {"num_tasks": 3},
}
GIVEN = {  # of two samples
    "moelora": {},
    "routedlora": {
        "experts": torch.tensor([[0, 2], [1, -1]]),
        "expert_weights": torch.tensor([[0.5, 2.0], [1.0, 0.0]]),
    },
    "branchlora": {"task_ids": torch.tensor([2, 0])},
    "lilora": {"task_ids": torch.tensor([1, 2])},
    "moecl": {"task_ids": torch.tensor([1, 2])},
}
BLOCKS = [f"model.language_model.layers.{i}.mlp" for i in range(2)]
METHODS = list(OPTIONS)
BY_SAMPLE = [name for name in METHODS if GIVEN[name]]


def config(method: str, **options) -> MixtureConfig:
    defaults = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    return smolora.MIXTURES[method].config(**{**defaults, **OPTIONS[method], **options})


def filled(model: nn.Module, seed: int = 1) -> nn.Module:
    """B has values, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_experts.default." in name and name.endswith("B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def adapted(method: str, **options) -> nn.Module:
    return filled(get_peft_model(tiny_llava(), config(method, **options)))


def one(given: dict, i: int) -> dict:
    return {name: value[i : i + 1] for name, value in given.items()}


def forward(model: nn.Module, inputs: dict, given: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **given).logits


@pytest.mark.parametrize("method", METHODS)
def test_targets_and_parameters(method: str):
    base, mixture = tiny_llava(), smolora.MIXTURES[method]
    model = get_peft_model(base, config(method))
    assert sorted(model.targeted_module_names) == sorted(BLOCKS if mixture.target == "block" else ADAPTED)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(f".{method}_experts.default." in name for name in trained)
    adapted = nn.Linear(4, 6) if mixture.target == "linear" else tiny_llava().get_submodule(BLOCKS[0])
    layer = mixture.layer(adapted, config(method))
    assert {name.rpartition(".")[2] for name in trained} == set(dict(layer.named_parameters(recurse=False)))


@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_changes_nothing_and_a_filled_one_does(method: str):
    base, inputs = tiny_llava(), batch((5, 9))
    with torch.no_grad():
        expected = base(**inputs).logits
        model = get_peft_model(base, config(method)).eval()
        torch.testing.assert_close(forward(model, inputs, GIVEN[method]), expected)
        filled(model)
        assert (forward(model, inputs, GIVEN[method]) - expected).abs().max() > 0.01
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_gets_a_gradient(method: str):
    """But what the batch does not use: here every task, expert and branch is in it."""
    model = adapted(method, lora_dropout=0.1, **({"top_k": 4} if method == "branchlora" else {})).train()
    calls = [GIVEN[method]]
    if "task_ids" in GIVEN[method]:
        calls = [{"task_ids": torch.tensor(pair)} for pair in ([0, 1], [2, 2])]
    for given in calls:
        loss = model(**batch((5, 9), answer=2), **given).loss
        if method == "moecl":
            loss = loss + smolora.discriminator_loss(model)
        loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
            if parameter.dim() > 1:
                assert parameter.grad.flatten(1).any(1).any(), name


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load(method: str, tmp_path):
    model, inputs = adapted(method).eval(), batch((5, 9))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path).eval()
    assert loaded.peft_config["default"] == model.peft_config["default"].__class__.from_pretrained(str(tmp_path))
    expected = forward(model, inputs, GIVEN[method])
    assert torch.equal(forward(loaded, inputs, GIVEN[method]), expected)
    assert torch.equal(forward(copy.deepcopy(loaded), inputs, GIVEN[method]), expected)
    base = loaded.unload()
    with torch.no_grad():
        assert torch.equal(base(**inputs).logits, tiny_llava()(**inputs).logits)


@pytest.mark.parametrize("method", METHODS)
def test_broken_adapters_are_refused(method: str, tmp_path):
    """As SMoLoRA's: a tensor that is missing is named, and a flipped bit is found."""
    from safetensors.torch import load_file, save_file

    model = adapted(method)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 4]) + whole[-4:])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        PeftModel.from_pretrained(tiny_llava(), tmp_path)
    path.write_bytes(whole)
    tensors = load_file(path)
    gone = sorted(tensors)[0]
    save_file({name: t for name, t in tensors.items() if name != gone}, path)
    with pytest.raises(KeyError, match="missing"):
        PeftModel.from_pretrained(tiny_llava(), tmp_path)


@pytest.mark.parametrize("method", BY_SAMPLE)
def test_batch_equals_one_by_one(method: str):
    """Samples of different tasks or experts in one batch, padded on the left, answer as alone."""
    model, inputs = adapted(method).eval(), batch((9, 9))
    together = forward(model, inputs, GIVEN[method])
    for i in range(2):
        alone = forward(model, {name: value[i : i + 1] for name, value in inputs.items()}, one(GIVEN[method], i))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
    swapped = {name: value.flip(0) for name, value in GIVEN[method].items()}
    assert (forward(model, inputs, swapped) - together).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cache", [True, False])
def test_generate_equals_forwards(method: str, cache: bool):
    """What `generate` writes, with and without a cache and for beams, is what forwards over the whole text say; a
    router's choice is the prompt's."""
    model, inputs = adapted(method).eval(), batch((7, 7))
    given = GIVEN[method]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        written = model.generate(**inputs, **given, use_cache=cache, **options)
        text, images = (
            inputs["input_ids"],
            {n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask")},
        )
        prompt = text.shape[1]
        for _ in range(4):
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, text.shape[1] - prompt, dtype=torch.long)], 1)
            seen = {"labels": torch.full_like(text, -100)} if method == "branchlora" else {}
            if seen:
                seen["labels"][:, prompt:] = 1  # what was written is an answer: it does not route
            logits = model(input_ids=text, attention_mask=mask, **images, **given, **seen).logits
            text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(written, text)
        beams = model.generate(**inputs, **given, num_beams=2, **options)
        for i in range(2):
            own = {name: value[i : i + 1] for name, value in inputs.items()}
            assert torch.equal(model.generate(**own, **one(given, i), num_beams=2, **options)[0], beams[i])


def test_one_task_for_all_samples():
    model, inputs = adapted("lilora").eval(), batch((5, 9))
    expected = forward(model, inputs, {"task_ids": torch.tensor([1, 1])})
    assert torch.equal(forward(model, inputs, {"task_ids": 1}), expected)
    assert torch.equal(forward(model, inputs, {"task_ids": torch.tensor(1)}), expected)


@pytest.mark.parametrize("router_input", ["first", "mean", "last", "image"])
def test_branches_by_what_the_router_sees(router_input: str):
    """The text layers of a whole model see the prompt's first, last or image token, or the mean."""
    model, inputs = adapted("branchlora", router_input=router_input).eval(), batch((9, 9))
    spied = {}
    layer = model.base_model.model.model.language_model.layers[0].mlp.gate_proj
    handle = layer.register_forward_hook(lambda m, a, y: spied.update(x=a[0]))
    forward(model, inputs, {"task_ids": torch.tensor([1, 1])})
    handle.remove()
    experts, x = layer.experts["default"], spied["x"]
    image = inputs["input_ids"] == model.config.image_token_id
    assert image.any(1).all()
    valid = inputs["attention_mask"].bool()
    for i in range(2):
        tokens = x[i][valid[i]]
        seen = {
            "first": tokens[0],
            "mean": tokens.mean(0),
            "last": tokens[-1],
            "image": x[i][image[i]][0],
        }[router_input]
        torch.testing.assert_close(experts.last_routing().logits[i], experts.router[1] @ seen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", BY_SAMPLE)
def test_what_is_missing_is_asked_for(method: str):
    model, inputs = adapted(method), batch((5, 9))
    name = next(iter(GIVEN[method]))
    with pytest.raises(ValueError, match=f"{name} must be given to the model's forward"):
        model.eval()(**inputs)
    with pytest.raises(ValueError, match=f"{name} must be given to the model's forward"):
        model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        (
            "lilora",
            {"task_ids": torch.tensor([0])},
            r"task_ids must have shape \(2,\), one for each sample, got \(1,\)",
        ),
        (
            "lilora",
            {"task_ids": torch.tensor([0, 3])},
            r"task_ids must lie in 0 to 2, which the adapters have, got \[0, 3\]",
        ),
        ("branchlora", {"task_ids": "vqa"}, "task_ids must be int32 or int64"),
        ("branchlora", {"task_ids": torch.tensor([0.0, 1.0])}, "task_ids must be int32 or int64"),
        ("routedlora", {"experts": torch.tensor([0, 1])}, r"experts must be int32 or int64 of shape \(2, c\)"),
        ("routedlora", {"experts": torch.tensor([[3], [0]])}, "experts must lie in -1 to 2"),
        (
            "routedlora",
            {"experts": torch.tensor([[1], [0]]), "expert_weights": torch.ones(2)},
            r"expert_weights must be floating point of shape \(2, 1\)",
        ),
        ("routedlora", {"expert_weights": torch.ones(2, 1)}, "expert_weights must come with experts"),
    ],
)
def test_bad_input(method: str, given: dict, message: str):
    model = adapted(method).eval()
    with pytest.raises(ValueError, match=message):
        forward(model, batch((5, 9)), given)


def masks_of_frozen(model: nn.Module, name: str) -> list[list[bool]]:
    layers = [m for m in model.modules() if isinstance(m, smolora.tuner.MixtureLinear)]
    return [layer.experts["default"].get_buffer(name).tolist() for layer in layers]


@pytest.mark.parametrize(
    ("method", "freeze", "name", "frozen"),
    [
        ("branchlora", "freeze_branches", "frozen_branches", [True, False, False, True]),
        ("routedlora", "freeze_experts", "frozen_experts", [True, False, True]),
    ],
)
def test_frozen_experts_are_saved(method: str, freeze: str, name: str, frozen: list[bool], tmp_path):
    model = adapted(method)
    layers = [m for m in model.modules() if isinstance(m, smolora.tuner.MixtureLinear)]
    getattr(layers[0].experts["default"], freeze)(torch.tensor(frozen))
    model.save_pretrained(tmp_path)
    masks = masks_of_frozen(PeftModel.from_pretrained(tiny_llava(), tmp_path), name)
    assert masks[0] == frozen and len(masks) > 1 and not any(map(any, masks[1:]))


@pytest.mark.parametrize("by_transformers", [False, True])
def test_an_adapter_without_a_mask_of_frozen_experts_loads(by_transformers: bool, tmp_path):
    """As adapters were saved before experts could be frozen."""
    adapted("routedlora").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    older = {name: t for name, t in tensors.items() if not name.endswith("frozen_experts")}
    assert len(older) == len(tensors) * 2 // 3
    save_file(older, file, metadata={"format": "pt"})
    model = tiny_llava()
    if by_transformers:
        model.load_adapter(str(tmp_path))
    else:
        model = PeftModel.from_pretrained(model, tmp_path)
    masks = masks_of_frozen(model, "frozen_experts")
    assert masks and not any(map(any, masks))


@pytest.mark.parametrize("method", METHODS)
def test_merging_is_refused(method: str):
    model = get_peft_model(tiny_llava(), config(method))
    with pytest.raises(ValueError, match="cannot be merged into the base"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="adapter_names must be left out"):
        model(**batch(), **GIVEN[method], adapter_names=["default", "default"])


def test_moelora_runs_outside_of_its_model():
    """It treats every token alike, so that its layers need no call to belong to."""
    model = adapted("moelora")
    layer = model.base_model.model.model.language_model.layers[0].mlp.gate_proj
    x = torch.randn(5, layer.in_features)
    assert torch.equal(layer(x), layer(x[None])[0])


def test_other_layers_are_refused():
    with pytest.raises(TypeError, match="must name linear layers"):
        get_peft_model(tiny_llava(), config("moelora", target_modules=["embed_tokens"]))
