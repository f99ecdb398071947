"""What the adapters of a whole model route by: each layer against the reference, given what it should have got."""

import pytest
import torch
from peft import PeftModel

import smolora
from support.spy import GATE, Spy, check, expected, layers_of
from support.tiny_llava import (
    BOS,
    IMAGE,
    PATCHES,
    adapted,
    batch,
    embeddings,
    fill_adapters,
    tiny_config,
    tiny_llava,
)

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
    with Spy(model) as calls, torch.no_grad():
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
        input_ids=inputs["input_ids"][:, :-3],
        attention_mask=inputs["attention_mask"][:, :-3],
        pixel_values=inputs["pixel_values"],
        instruction_embeds=e,
    )
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

    return PeftModel.from_pretrained(tiny_llava(), folder)


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
    model(**batch((5, 9), (0, 0)), instruction_embeds=embeddings(2)).logits.sum().backward()
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
