"""What the adapters of a whole model route by: each layer against the reference, given what it should have got."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache, StaticCache

import smolora
from smolora.reference import smolora_forward
from smolora.tuner import SMoLoRALinear
from tiny_llava import (
    BOS,
    FFN,
    IMAGE,
    PATCHES,
    adapted,
    batch,
    embeddings,
    fill_adapters,
    tiny_config,
    tiny_llama,
    tiny_llava,
)  # fmt: skip

PROJECTOR = "model.multi_modal_projector.linear_1"
GATE = "model.language_model.layers.0.mlp.gate_proj"


def layers_of(model):
    return {m.smolora_key: m for m in model.modules() if isinstance(m, SMoLoRALinear)}


class Spy:
    """Inputs and outputs of the adapter layers in every call, by layer."""

    def __init__(self, model):
        self.calls = {name: [] for name in layers_of(model)}
        self.handles = [
            layer.register_forward_hook(lambda m, a, y: self.calls[m.smolora_key].append((a[0].detach(), y.detach())))
            for layer in layers_of(model).values()
        ]

    def __enter__(self):
        return self.calls

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()


def expected(layer, x, instruction, route_mask=None, adapter="default"):
    """The layer's output by the paper's equations."""
    experts, base, c = layer.smolora_experts[adapter], layer.get_base_layer(), layer.smolora_experts[adapter].config
    return smolora_forward(
        x, base.weight, base.bias, experts.vu_A, experts.vu_B, experts.if_A, experts.if_B, experts.vu_router,
        experts.if_router, experts.vu_importance, experts.if_importance, instruction, scaling=c.scaling, top_k=c.top_k,
        fusion=c.fusion, route_mask=route_mask,
    ).detach()  # fmt: skip


def check(calls, model, instruction, image_instruction, route_mask):
    """Each layer's first call is what the reference gives for these routing inputs."""
    for name, layer in layers_of(model).items():
        if "projector" in name:
            if image_instruction is None:
                assert not calls[name]
                continue
            x, y = calls[name][0]
            want = expected(layer, x, image_instruction)
        else:
            x, y = calls[name][0]
            want = expected(layer, x, instruction, route_mask)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
        plain = layer.base_layer(x)
        assert (y - plain).abs().max() > 1e-2, f"{name}: the adapter does nothing"


IMAGES = [
    ((1, 1), [0, 1]),
    ((2, 1), [0, 0, 1]),  # several images in a sample
    ((0, 3), [1, 1, 1]),  # a sample without an image
    ((1, 0, 2), [0, 2, 2]),
    ((0, 0), None),  # no image at all
]


@pytest.mark.parametrize(("images", "owner"), IMAGES)
def test_each_image_has_its_samples_instruction(images, owner):
    model, e = adapted(), embeddings(len(images))
    inputs = batch((5, 9, 4)[: len(images)], images)
    with Spy(model) as calls:
        model(**inputs, instruction_embeds=e)
    check(calls, model, e, None if owner is None else e[owner], inputs["attention_mask"].bool())


def test_one_vector_is_for_all():
    model, e = adapted(), embeddings(1)[0]
    inputs = batch((5, 9), (2, 1))
    one = model(**inputs, instruction_embeds=e).logits
    assert torch.equal(one, model(**inputs, instruction_embeds=e.expand(2, -1)).logits)
    assert not torch.allclose(one, model(**inputs, instruction_embeds=embeddings(1, 7)[0]).logits)


@pytest.mark.parametrize("route_over", ["prompt", "valid", "all"])
@pytest.mark.parametrize("answer", [0, 3])
def test_route_over(route_over, answer):
    model, e = adapted(tiny_config(route_over=route_over)), embeddings(2)
    inputs = batch((5, 9), answer=answer)
    valid = inputs["attention_mask"].bool()
    mask = {"all": None, "valid": valid, "prompt": valid}[route_over]
    if route_over == "prompt" and answer:
        mask = valid & (inputs["labels"] == -100)
    with Spy(model) as calls:
        model(**inputs, instruction_embeds=e)
    check(calls, model, e, e, mask)


def test_training_and_inference_route_alike():
    """The answer does not change what the prompt is routed to."""
    model, e = adapted(), embeddings(2)
    inputs = batch((5, 9), answer=3)
    model(**inputs, instruction_embeds=e)
    trained = smolora.routing_report(model)
    model(
        input_ids=inputs["input_ids"][:, :-3], attention_mask=inputs["attention_mask"][:, :-3],
        pixel_values=inputs["pixel_values"], instruction_embeds=e,
    )  # fmt: skip
    for name, layer in smolora.routing_report(model).items():
        torch.testing.assert_close(layer["vu_logits"], trained[name]["vu_logits"], rtol=1e-4, atol=1e-6)


def test_a_sample_that_is_all_answer_routes_by_its_valid_tokens():
    model, e = adapted(), embeddings(2)
    inputs = batch((5, 9))
    labels = inputs["input_ids"].clone()
    labels[1, :4] = -100
    mask = inputs["attention_mask"].bool()
    mask = torch.stack([mask[0], mask[1] & (labels[1] == -100)])
    with Spy(model) as calls:
        model(**inputs, labels=labels, instruction_embeds=e)
    check(calls, model, e, e, mask)


def test_inputs_embeds_take_an_explicit_map():
    model, e = adapted(), embeddings(2)
    inputs = batch((5, 9), (2, 1))
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    want = model(input_ids=ids, **inputs, instruction_embeds=e).logits
    got = model(inputs_embeds=embeds, **inputs, instruction_embeds=e, image_to_sample=torch.tensor([0, 0, 1])).logits
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match=r"image_to_sample must be given.*3 images"):
        model(inputs_embeds=embeds, **inputs, instruction_embeds=e)
    with pytest.raises(ValueError, match="each of the 3 images, got 2"):
        model(inputs_embeds=embeds, **inputs, instruction_embeds=e, image_to_sample=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="0 to 1, got 0 to 2"):
        model(inputs_embeds=embeds, **inputs, instruction_embeds=e, image_to_sample=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="integer tensor"):
        model(inputs_embeds=embeds, **inputs, instruction_embeds=e, image_to_sample=[0, 0, 1])


BAD = [
    ({}, ValueError, "instruction_embeds must be given"),
    ({"instruction_embeds": torch.zeros(2, 5)}, ValueError, r"shape \(2, 12\).*or \(12,\).*got \(2, 5\)"),
    ({"instruction_embeds": torch.zeros(3, 12)}, ValueError, r"shape \(2, 12\).*got \(3, 12\)"),
    ({"instruction_embeds": torch.zeros(2, 1, 12)}, ValueError, r"got \(2, 1, 12\)"),
    ({"instruction_embeds": [0.0] * 12}, TypeError, "instruction_embeds must be a floating.*list"),
    ({"instruction_embeds": torch.zeros(2, 12, dtype=torch.long)}, TypeError, "got dtype torch.int64"),
    ({"instruction_embeds": torch.full((2, 12), float("nan"))}, ValueError, "instruction must be finite"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD)
@pytest.mark.parametrize("entry", ["forward", "generate"])
def test_a_bad_embedding_is_refused(entry, given, error, message):
    model, inputs = adapted(), batch()
    with pytest.raises(error, match=message):
        (model if entry == "forward" else model.generate)(**inputs, **given)


@pytest.mark.parametrize("typo", ["instruction_embed", "instruct_embeds", "instructions_embeds", "images_to_sample"])
def test_a_misspelt_keyword_is_refused(typo):
    """Also where a default would let the call go on without it."""
    config = tiny_config(default_instruction=0)
    config.instruction_embeddings = embeddings(1)
    model, inputs = adapted(config), batch()
    with pytest.raises(TypeError, match=f"{typo!r}: did you mean"):
        model(**inputs, **{typo: embeddings(2)})
    with pytest.raises(ValueError, match=typo):
        model.generate(**inputs, **{typo: embeddings(2)}, max_new_tokens=2)


def test_default_instruction(tmp_path):
    config = tiny_config(default_instruction=1)
    model, inputs, e = adapted(config), batch(), embeddings(3)
    with pytest.raises(ValueError, match=r"default_instruction=1 is a row.*not loaded"):
        model(**inputs)
    config.instruction_embeddings = e
    want = model(**inputs, instruction_embeds=e[1]).logits
    assert torch.equal(model(**inputs).logits, want)
    other = embeddings(2, 9)
    model.save_pretrained(tmp_path)
    loaded = smolora_from(tmp_path)
    assert torch.equal(loaded(**inputs).logits, want)
    assert torch.equal(
        loaded(**inputs, instruction_embeds=other).logits, model(**inputs, instruction_embeds=other).logits
    )
    assert not torch.equal(loaded(**inputs, instruction_embeds=other).logits, want)
    greedy = dict(max_new_tokens=6, do_sample=False)
    assert torch.equal(loaded.generate(**inputs, **greedy), model.generate(**inputs, instruction_embeds=e[1], **greedy))
    config.default_instruction = 3
    with pytest.raises(ValueError, match=r"row below 3.*got 3"):
        model(**inputs)
    (tmp_path / "instruction_embeddings.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"instruction_embeddings\.safetensors"):
        smolora_from(tmp_path)


def smolora_from(folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(tiny_llava(), folder)


# ------------------------------------------------------------------------------------------------------------ generate


def new_tokens(model, inputs, **options):
    """Greedy by default; (B, 12), padded."""
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("images", [(1, 1, 1), (2, 0, 1)])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_batched_generation_is_one_by_one_uncached(images, cache):
    """Left-padded, with any cache: the routes of the prompt stay."""
    model, e = adapted(), embeddings(3)
    inputs = batch((5, 9, 3), images)
    options = {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}[cache]
    got = new_tokens(model, inputs, instruction_embeds=e, **options)
    texts, start = set(), 0
    for i in range(3):
        keep = inputs["attention_mask"][i].bool()
        one = {"input_ids": inputs["input_ids"][i : i + 1, keep], "attention_mask": keep[keep][None].long()}
        if images[i]:
            one["pixel_values"] = inputs["pixel_values"][start : start + images[i]]
            start += images[i]
        want = new_tokens(model, one, instruction_embeds=e[i : i + 1], use_cache=False)[0]
        assert torch.equal(got[i, : len(want)], want)
        assert not got[i, len(want) :].any()
        texts.add(tuple(want.tolist()))
    assert len(texts) == 3


def test_mask_that_generate_infers():
    """Without a mask, transformers takes padding from the ids; so do the adapters."""
    model, e, inputs = adapted(), embeddings(3), batch((5, 9, 3), (1, 1, 1))
    want = new_tokens(model, inputs, instruction_embeds=e)
    inputs.pop("attention_mask")
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(new_tokens(model, inputs, instruction_embeds=e, **options), want)


@pytest.mark.parametrize("images", [(1, 1), (2, 1), (0, 2)])
def test_beams(images):
    model, e, inputs = adapted(), embeddings(2), batch((5, 9), images)
    options = {"num_beams": 3, "instruction_embeds": e, "length_penalty": 0.0}
    got = new_tokens(model, inputs, **options)
    start = 0
    for i in range(2):
        keep = inputs["attention_mask"][i].bool()
        one = {"input_ids": inputs["input_ids"][i : i + 1, keep]}
        if images[i]:
            one["pixel_values"] = inputs["pixel_values"][start : start + images[i]]
            start += images[i]
        want = new_tokens(model, one, **{**options, "instruction_embeds": e[i]})[0]
        assert torch.equal(got[i, : len(want)], want)


def test_sampling_and_several_sequences():
    model, e, inputs = adapted(), embeddings(2), batch((5, 9))
    options = {"do_sample": True, "num_return_sequences": 3, "instruction_embeds": e}
    torch.manual_seed(3)
    got = new_tokens(model, inputs, **options)
    torch.manual_seed(3)
    assert got.shape[0] == 6 and torch.equal(new_tokens(model, inputs, **options), got)
    torch.manual_seed(3)
    assert not torch.equal(new_tokens(model, inputs, **{**options, "instruction_embeds": embeddings(2, 8)}), got)


def test_generate_with_inputs_embeds():
    model, e, inputs = adapted(), embeddings(2), batch((5, 9), (2, 1))
    for beams in (1, 2):
        want = new_tokens(model, inputs, instruction_embeds=e, num_beams=beams)
        embeds = {k: v for k, v in inputs.items() if k != "input_ids"}
        embeds["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
        owner = torch.tensor([0, 0, 1])
        got = model.generate(
            **embeds, instruction_embeds=e, image_to_sample=owner, max_new_tokens=12, do_sample=False, num_beams=beams
        )
        assert torch.equal(got, want)


def test_images_use_this_calls_embeddings():
    """generate() encodes images before its first forward: never by what an earlier call left."""
    model, inputs = adapted(), batch((5, 9))
    first, second = embeddings(2), embeddings(2, 5)
    for name, parameter in model.named_parameters():  # only the projector tells instructions apart
        if "language_model" in name and name.endswith("if_A"):
            parameter.data.zero_()
    with Spy(model) as calls:
        model.generate(**inputs, instruction_embeds=first, max_new_tokens=2)
        model(**inputs, instruction_embeds=first)
        model.generate(**inputs, instruction_embeds=second, max_new_tokens=2)
    for name, layer in layers_of(model).items():
        if "projector" in name:
            for (x, y), e in zip(calls[name], (first, first, second), strict=True):
                torch.testing.assert_close(y, expected(layer, x, e), rtol=1e-4, atol=1e-5)
    x, y = calls[PROJECTOR][2]
    assert (y - expected(layers_of(model)[PROJECTOR], x, first)).abs().max() > 1e-2


def test_nothing_outlives_its_call():
    model, e, inputs = adapted(), embeddings(2), batch((5, 9))
    model.generate(**inputs, instruction_embeds=e, max_new_tokens=2)
    for given in (None, e):
        if given is not None:
            model(**inputs, instruction_embeds=given)
        with pytest.raises(RuntimeError, match="outside of its model's forward"):
            model.get_base_model().get_image_features(inputs["pixel_values"])
        with pytest.raises(RuntimeError, match="outside of its model's forward"):
            model.get_base_model().model.language_model(inputs["input_ids"])
        with pytest.raises(ValueError, match="instruction_embeds must be given"):
            model.generate(**inputs, max_new_tokens=2)
        with pytest.raises(ValueError, match="instruction_embeds must be given"):
            model(**inputs)


def test_token_routing_is_the_released_one():
    """With a cache, the new token routes by itself; without, all positions do, in every step."""
    model, e = adapted(smolora_official()), embeddings(1)
    inputs = batch((7,))
    with Spy(model) as calls:
        cached = new_tokens(model, inputs, instruction_embeds=e, max_new_tokens=8)
    for name, layer in layers_of(model).items():
        steps = calls[name]
        assert len(steps) == (1 if "projector" in name else cached.shape[1])
        for x, y in steps:
            torch.testing.assert_close(y, expected(layer, x, e), rtol=1e-4, atol=1e-5)
    gate = layers_of(model)[GATE]
    chosen = {int((x.mean(1) @ gate.smolora_experts["default"].vu_router.T).argmax()) for x, _ in calls[GATE]}
    assert len(chosen) > 1
    with Spy(model) as calls:
        new_tokens(model, inputs, instruction_embeds=e, max_new_tokens=8, use_cache=False)
    assert [x.shape[1] for x, _ in calls[GATE]][:3] == [12, 13, 14]
    for x, y in calls[GATE]:
        torch.testing.assert_close(y, expected(gate, x, e), rtol=1e-4, atol=1e-5)


def smolora_official():
    return smolora.SMoLoRAConfig.official(
        r=4, lora_alpha=8, lora_dropout=0.0, num_vu_experts=3, num_if_experts=3, instruction_dim=12
    )


def test_prompt_routing_is_kept_while_decoding():
    model, e, inputs = adapted(), embeddings(2), batch((5, 9))
    with Spy(model) as calls:
        new_tokens(model, inputs, instruction_embeds=e, max_new_tokens=6)
    gate = layers_of(model)[GATE]
    experts = gate.smolora_experts["default"]
    x = calls[GATE][0][0]
    mask = inputs["attention_mask"].bool()
    mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    route = (mean @ experts.vu_router.T).argmax(1), (e @ experts.if_router.T).argmax(1)
    by_itself = 0
    for x, y in calls[GATE][1:]:
        torch.testing.assert_close(y, experts(x, routes=route, base=gate.base_layer), rtol=1e-4, atol=1e-5)
        by_itself += int(((x[:, 0] @ experts.vu_router.T).argmax(1) != route[0]).sum())
    assert by_itself, "the tokens would have been routed alike by themselves: the test shows nothing"


@pytest.mark.parametrize("cache", ["made by the model", "DynamicCache", "StaticCache"])
def test_hand_written_loop(cache):
    """The forward that starts a cache fixes the routes; several caches side by side keep theirs."""
    model, e, inputs = adapted(), embeddings(2), batch((5, 9))
    want = new_tokens(model, inputs, instruction_embeds=e, max_new_tokens=5, use_cache=False)
    other = new_tokens(model, inputs, instruction_embeds=e.flip(0), max_new_tokens=5, use_cache=False)
    make = {
        "made by the model": lambda: None,
        "DynamicCache": lambda: DynamicCache(config=model.config.text_config),
        "StaticCache": lambda: StaticCache(config=model.config.text_config, max_cache_len=32),
    }[cache]

    def start(instruction):
        out = model(**inputs, instruction_embeds=instruction, past_key_values=make(), use_cache=True)
        return {"cache": out.past_key_values, "mask": inputs["attention_mask"], "ids": [out.logits[:, -1].argmax(-1)]}

    def go_on(state, **extra):
        state["mask"] = torch.nn.functional.pad(state["mask"], (0, 1), value=1)
        position = state["mask"].sum(1, keepdim=True) - 1
        out = model(
            input_ids=state["ids"][-1][:, None], attention_mask=state["mask"], position_ids=position,
            past_key_values=state["cache"], use_cache=True, **extra,
        )  # fmt: skip
        state["ids"].append(out.logits[:, -1].argmax(-1))

    # position_ids of the first forward: left padding starts at 0, as generate() has it
    position = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    inputs["position_ids"] = position
    a, b = start(e), start(e.flip(0))
    for i in range(4):
        go_on(a, **({"instruction_embeds": e} if i % 2 else {}))
        go_on(b)
    for state, tokens in ((a, want), (b, other)):
        for i in range(2):
            ends = (tokens[i] == 2).nonzero()
            n = int(ends[0]) + 1 if len(ends) else 5
            assert torch.stack(state["ids"], 1)[i, :n].tolist() == tokens[i, :n].tolist()


def test_a_cache_of_unknown_routes_is_refused():
    model, e, inputs = adapted(), embeddings(2), batch((5, 9))
    with model.disable_adapter():
        cache = model(**inputs, use_cache=True).past_key_values
    step = {"input_ids": torch.full((2, 1), 7), "instruction_embeds": e}
    with pytest.raises(RuntimeError, match="no routes to keep"):
        model(**step, past_key_values=cache)
    with torch.no_grad():
        cache = model(**inputs, instruction_embeds=e, use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match="no routes to keep"):
            model(**step, past_key_values=copy.deepcopy(cache))
        model(**step, past_key_values=cache)
    cache.reset()  # an empty cache starts anew, and needs the instruction again
    with pytest.raises(ValueError, match="instruction_embeds must be given"):
        model(**inputs, past_key_values=cache)


def test_several_adapters_add_up():
    model, e, inputs = adapted(), embeddings(2), batch((5, 9))
    model.add_adapter("second", tiny_config(r=2, top_k=2, route_over="all"))
    fill_adapters(model, 4)
    model.base_model.set_adapter(["default", "second"])
    with Spy(model) as calls:
        model(**inputs, instruction_embeds=e)
    mask = inputs["attention_mask"].bool()
    for name, layer in layers_of(model).items():
        x, y = calls[name][0]
        one = expected(layer, x, e, None if "projector" in name else mask)
        two = expected(layer, x, e, None, "second")
        torch.testing.assert_close(y, one + two - layer.base_layer(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"several are active: \['default', 'second'\]"):
        smolora.routing_report(model)
    assert smolora.routing_report(model, "second")[GATE]["vu_experts"].shape == (2, 2)


@pytest.mark.parametrize("fusion", ["mean", "vu", "if"])
def test_ablations(fusion):
    model, e, inputs = adapted(tiny_config(fusion=fusion)), embeddings(2), batch((5, 9))
    needed = {} if fusion == "vu" else {"instruction_embeds": e}
    with Spy(model) as calls:
        model(**inputs, **needed)
    check(calls, model, e, e, inputs["attention_mask"].bool())
    assert torch.equal(new_tokens(model, inputs, **needed), new_tokens(model, inputs, use_cache=False, **needed))


def test_text_model():
    """A language model alone: no images anywhere."""
    model = get_peft_model(tiny_llama(), tiny_config()).eval()
    fill_adapters(model)
    assert {name.split(".")[-1] for name in model.targeted_module_names} == set(FFN)
    e, inputs = embeddings(2), batch((5, 9), (0, 0))
    with Spy(model) as calls:
        model(**inputs, instruction_embeds=e)
    check(calls, model, e, None, inputs["attention_mask"].bool())
    assert torch.equal(
        new_tokens(model, inputs, instruction_embeds=e),
        new_tokens(model, inputs, instruction_embeds=e, use_cache=False),
    )


def test_images_that_do_not_fit_the_text():
    model, e, inputs = adapted(), embeddings(2), batch((5, 9))
    cut = inputs["input_ids"][0] == IMAGE
    inputs["input_ids"][0, cut.nonzero()[:2]] = 9
    inputs["input_ids"][1, -2:] = IMAGE  # as many placeholders as before, so that transformers sees nothing
    with pytest.raises(ValueError, match=r"2 images do not fit.*\[2, 6\]"):
        model(**inputs, instruction_embeds=e)


# -------------------------------------------------------------------------------------------------------------- report


def test_routing_report():
    model, e, inputs = adapted(tiny_config(top_k=2)), embeddings(3), batch((5, 9, 3), (2, 0, 1))
    with Spy(model) as calls:
        model(**inputs, instruction_embeds=e)
    report = smolora.routing_report(model)
    assert list(report) == list(layers_of(model))
    for name, layer in layers_of(model).items():
        row, experts, x = report[name], layer.smolora_experts["default"], calls[name][0][0]
        images = "projector" in name
        assert row["rows"] == ("images" if images else "samples") and row["adapter"] == "default"
        instruction = e[[0, 0, 2]] if images else e
        mask = torch.ones(x.shape[:2], dtype=torch.bool) if images else inputs["attention_mask"].bool()
        assert images or torch.equal(row["valid"], mask)
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        vu, if_ = mean @ experts.vu_router.T, instruction @ experts.if_router.T
        torch.testing.assert_close(row["vu_logits"], vu.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(row["if_logits"], if_.detach(), rtol=1e-4, atol=1e-5)
        assert torch.equal(row["vu_experts"].long(), vu.topk(2).indices)
        assert torch.equal(row["if_experts"].long(), if_.topk(2).indices)
        torch.testing.assert_close(row["vu_gates"], vu.topk(2).values.softmax(1).detach(), rtol=1e-4, atol=1e-5)
        assert row["alpha"].shape == x.shape[:2]
        torch.testing.assert_close(row["alpha"] + row["beta"], torch.ones(x.shape[:2]))
        assert row["alpha"].std() > 0
    model(**batch((5, 9), (0, 0)), instruction_embeds=embeddings(2))
    assert not [name for name in smolora.routing_report(model) if "projector" in name], "an earlier batch's images"


def test_report_needs_a_forward_with_the_adapter():
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration has none"):
        smolora.routing_report(tiny_llava())
    model = adapted()
    with pytest.raises(RuntimeError, match="needs a forward"):
        smolora.routing_report(model)
    with pytest.raises(ValueError, match="got 'other'"):
        smolora.routing_report(model, "other")
    model(**batch(), instruction_embeds=embeddings(2))
    assert smolora.routing_report(model.get_base_model())
    with model.disable_adapter():
        model(**batch())
    with pytest.raises(RuntimeError, match="needs a forward"):
        smolora.routing_report(model)


def test_one_image_has_the_projectors_patches():
    assert batch((5,))["input_ids"].tolist()[0][:5] == [BOS, *[IMAGE] * PATCHES]
