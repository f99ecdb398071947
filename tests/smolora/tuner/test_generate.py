"""generate(): in a batch as one by one, with any cache and beams, by this call's instructions alone."""

import copy
import inspect

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache, LlavaModel, StaticCache

import smolora
from support.spy import GATE, PROJECTOR, Spy, check, expected, layers_of
from support.tiny_llava import (
    FFN,
    adapted,
    batch,
    embeddings,
    fill_adapters,
    tiny_config,
    tiny_llama,
)


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


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("decode_routing", ["prompt", "token"])
def test_beams_with_any_cache(options, decode_routing):
    """(e,) is (B, e) with equal rows; the cache changes nothing where the prompt's routes are kept."""
    model, inputs = adapted(tiny_config(decode_routing=decode_routing)), batch((5, 9), (2, 1))
    e = embeddings(1)[0]
    beams = {"num_beams": 3, "max_new_tokens": 5, **options}
    vector = new_tokens(model, inputs, instruction_embeds=e, **beams)
    assert torch.equal(new_tokens(model, inputs, instruction_embeds=e.expand(2, -1), **beams), vector)
    rows = new_tokens(model, inputs, instruction_embeds=embeddings(2), **beams)
    assert not torch.equal(rows, vector)
    cached = new_tokens(model, inputs, instruction_embeds=embeddings(2), num_beams=3, max_new_tokens=5)
    if decode_routing == "prompt" or "cache_implementation" in options:
        assert torch.equal(rows, cached)


def test_prompt_lookup():
    """Several tokens at a time, some of them taken back: as plain greedy decoding."""
    model, e, inputs = adapted(), embeddings(1), batch((12,))
    inputs["input_ids"][0, -6:] = inputs["input_ids"][0, -12:-6]
    calls = []
    handle = model.get_base_model().lm_head.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    plain = new_tokens(model, inputs, instruction_embeds=e)
    steps = len(calls)
    assert torch.equal(new_tokens(model, inputs, instruction_embeds=e, prompt_lookup_num_tokens=3), plain)
    handle.remove()
    assert any(shape[1] > 1 for shape in calls[steps + 1 :])


@pytest.mark.parametrize("lengths", [(9, 9), (5, 9)], ids=["even", "padded"])
def test_a_prompt_in_chunks_is_refused(lengths):
    """Its first chunk would choose the experts."""
    model, inputs = adapted(), batch(lengths, (0, 0))
    with pytest.raises(ValueError, match=r"prefill_chunk_size must be left out.*first forward has 4 of its 10 tokens"):
        new_tokens(model, inputs, instruction_embeds=embeddings(2), prefill_chunk_size=4)
    assert len(new_tokens(model, inputs, instruction_embeds=embeddings(2))) == 2  # nothing of it is left


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_sampling_is_of_the_same_distribution_with_any_cache(options):
    model, e, inputs = adapted(), embeddings(2), batch((5, 9))
    torch.manual_seed(3)
    want = new_tokens(model, inputs, instruction_embeds=e, do_sample=True, use_cache=False)
    torch.manual_seed(3)
    assert torch.equal(new_tokens(model, inputs, instruction_embeds=e, do_sample=True, **options), want)


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


def cache_of(out):
    """Under the name that this version of transformers has for it."""
    return out.cache if "cache" in out else out.past_key_values


@pytest.mark.parametrize("name", ["cache", "past_key_values"])  # transformers before 5.24 knows the latter alone
@pytest.mark.parametrize("cache", ["made by the model", "DynamicCache", "StaticCache"])
def test_hand_written_loop(cache, name):
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
        out = model(**inputs, instruction_embeds=instruction, use_cache=True, **{name: make()})
        return {"cache": cache_of(out), "mask": inputs["attention_mask"], "ids": [out.logits[:, -1].argmax(-1)]}

    def go_on(state, **extra):
        state["mask"] = torch.nn.functional.pad(state["mask"], (0, 1), value=1)
        position = state["mask"].sum(1, keepdim=True) - 1
        out = model(
            input_ids=state["ids"][-1][:, None],
            attention_mask=state["mask"],
            position_ids=position,
            use_cache=True,
            **{name: state["cache"]},
            **extra,
        )
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


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_of_unknown_routes_is_refused(name):
    model, e, inputs = adapted(), embeddings(2), batch((5, 9))
    with model.disable_adapter():
        cache = cache_of(model(**inputs, use_cache=True))
    step = {"input_ids": torch.full((2, 1), 7), "instruction_embeds": e}
    with pytest.raises(RuntimeError, match="no routes to keep"):
        model(**step, **{name: cache})
    with torch.no_grad():
        cache = cache_of(model(**inputs, instruction_embeds=e, use_cache=True))
        with pytest.raises(RuntimeError, match="no routes to keep"):
            model(**step, **{name: copy.deepcopy(cache)})
        model(**step, **{name: cache})
    with pytest.raises(ValueError, match="instruction_embeds must be given"):
        model(**inputs, **{name: DynamicCache(config=model.config.text_config)})


NAMED_CACHE = "cache" in inspect.signature(LlavaModel.forward).parameters


@pytest.mark.parametrize("name", ["cache", "past_key_values"] if NAMED_CACHE else ["past_key_values"])
@pytest.mark.parametrize("decode_routing", ["prompt", "token"])
def test_generate_with_a_cache_of_ones_own(name, decode_routing):
    """A left-padded batch gives the tokens of each sample by itself, whatever the cache's name."""
    model, e, inputs = adapted(tiny_config(decode_routing=decode_routing)), embeddings(2), batch((5, 9))
    got = new_tokens(model, inputs, instruction_embeds=e, **{name: DynamicCache(config=model.config.text_config)})
    for i in range(2):
        keep = inputs["attention_mask"][i].bool()
        one = {"input_ids": inputs["input_ids"][i : i + 1, keep], "attention_mask": keep[keep][None].long()}
        one["pixel_values"] = inputs["pixel_values"][i : i + 1]
        want = new_tokens(model, one, instruction_embeds=e[i : i + 1])[0]
        assert torch.equal(got[i, : len(want)], want)


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
