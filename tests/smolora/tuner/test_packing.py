"""Several samples packed in one row: each routes as it does alone, with an instruction of its own; or it is refused."""

import pytest
import torch
from peft import get_peft_model
from transformers import DataCollatorWithFlattening

import smolora
from support.gradients import assert_same_gradients, gradients
from support.tiny_llava import INSTRUCTION_DIM, adapted, batch, embeddings, fill_adapters, tiny_config, tiny_llama

LENGTHS = (6, 9, 1, 4)


def text_model(**options):
    model = get_peft_model(tiny_llama(), tiny_config(**options))
    fill_adapters(model)
    return model.eval()


def samples(lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 64, (1, n), generator=generator) for n in lengths]


def positions(lengths=LENGTHS):
    return torch.cat([torch.arange(n) for n in lengths])[None]


def bounds(lengths=LENGTHS):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def ways(lengths=LENGTHS):
    """How the boundaries are told; the stock model needs `position_ids` to keep the samples apart on a CPU."""
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int()
    at = {"cu_seq_lens_q": bounds(lengths), "cu_seq_lens_k": bounds(lengths)}
    at |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    plain = {"position_ids": positions(lengths)}
    return {
        "position_ids": plain,
        "cu_seq_lens": {**plain, **at},
        "cu_seq_lens of 64 bits": {**plain, **at, "cu_seq_lens_q": bounds(lengths).long()},
        "seq_idx beside": {**plain, "seq_idx": index},
    }


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("one", [False, True], ids=["rows", "vector"])
@pytest.mark.parametrize("fusion", ["adaptive", "vu", "if"])
def test_packed_samples_are_as_alone(way, one, fusion):
    model, parts = text_model(fusion=fusion), samples()
    e = embeddings(1).expand(4, -1) if one else embeddings(4)
    with torch.no_grad():
        want = torch.cat(
            [model(input_ids=x, instruction_embeds=e[i], use_cache=False).logits for i, x in enumerate(parts)], 1
        )
        got = model(
            input_ids=torch.cat(parts, 1), instruction_embeds=e[0] if one else e, use_cache=False, **ways()[way]
        )
    torch.testing.assert_close(got.logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("route_over", ["prompt", "valid", "all"])
def test_gradients_of_a_flattening_collator(route_over):
    """Labels tell each sample's prompt; one without any routes by all of itself."""
    model, parts, e = text_model(route_over=route_over).train(), samples((6, 9, 5)), embeddings(3)
    answers = (2, 3, 5)
    features = [
        {"input_ids": x[0].tolist(), "labels": [-100] * (x.shape[1] - n) + x[0, x.shape[1] - n :].tolist()}
        for x, n in zip(parts, answers, strict=True)
    ]
    found = []
    for name in ("alone", "packed", "with flash attention's arguments"):
        model.zero_grad()
        if name == "alone":
            for i, feature in enumerate(features):
                one = {k: torch.tensor([v]) for k, v in feature.items()}
                one["labels"][0, 0] = -100  # as the collator has it
                model(**one, instruction_embeds=e[i : i + 1], num_items_in_batch=9, use_cache=False).loss.backward()
        else:
            packed = DataCollatorWithFlattening(return_flash_attn_kwargs=name != "packed")(features)
            model(**packed, instruction_embeds=e, num_items_in_batch=9, use_cache=False).loss.backward()
        found.append(gradients(model))
    for other in found[1:]:
        assert_same_gradients(other, found[0], rtol=1e-4, atol=1e-7)


def test_recomputed_packed_samples():
    found = []
    for recompute in (False, True):
        model = text_model().train()
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids = torch.cat(samples(), 1)
        labels = torch.where(positions() < 3, -100, ids)
        model(
            input_ids=ids, labels=labels, position_ids=positions(), instruction_embeds=embeddings(4), use_cache=False
        ).loss.backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0])


def test_several_rows_of_several_samples():
    """In order of the rows; padding at a row's end is nobody's."""
    model, parts, e = text_model(), samples((3, 4, 5, 2)), embeddings(4)
    ids = torch.cat([torch.cat(parts[:2], 1), torch.cat(parts[2:], 1)])
    position = torch.cat([positions((3, 4)), positions((5, 2))])
    with torch.no_grad():
        want = [model(input_ids=x, instruction_embeds=e[i], use_cache=False).logits[0] for i, x in enumerate(parts)]
        got = model(input_ids=ids, position_ids=position, instruction_embeds=e, use_cache=False).logits
    torch.testing.assert_close(got.flatten(0, 1), torch.cat(want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("numbered", [False, True], ids=["restarting positions", "a numbering mask"])
def test_padding_of_a_packed_row(numbered):
    """A mask leaves padding out, or numbers the samples; the routes are those of each sample alone."""
    model, parts, e = text_model(), samples((5, 4)), embeddings(2)
    ids = torch.nn.functional.pad(torch.cat(parts, 1), (2, 3))
    mask = torch.tensor([[0] * 2 + [1] * 5 + [2 if numbered else 1] * 4 + [0] * 3])
    position = torch.tensor([[0, 0, *range(5), *range(4), 0, 0, 0]])
    given = {} if numbered else {"position_ids": position}
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, instruction_embeds=e, use_cache=False, **given)
        packed = smolora.routing_report(model)
        first = "model.layers.0.mlp.gate_proj"
        assert packed[first]["cu_seqlens"].tolist() == [0, 7, 14]
        assert packed[first]["alpha"].shape == packed[first]["valid"].shape == (14,)
        assert all(row["if_experts"].shape == (2,) for row in packed.values())
        alone = []
        for i, x in enumerate(parts):
            model(input_ids=x, instruction_embeds=e[i : i + 1], use_cache=False)
            alone.append(smolora.routing_report(model)[first]["if_logits"])
    torch.testing.assert_close(packed[first]["if_logits"], torch.cat(alone))


def test_images_of_packed_samples():
    """An image is its sample's, in the middle of the row."""
    model, images = adapted(), (1, 0, 2)
    whole, e = batch((5, 9, 3), images), embeddings(3)
    parts, start = [], 0
    for i, count in enumerate(images):
        ids = whole["input_ids"][i : i + 1, whole["attention_mask"][i].bool()]
        one = {"input_ids": ids}
        if count:
            one["pixel_values"] = whole["pixel_values"][start : start + count]
            start += count
        parts.append(one)
    lengths = [one["input_ids"].shape[1] for one in parts]
    packed = {"input_ids": torch.cat([one["input_ids"] for one in parts], 1), "pixel_values": whole["pixel_values"]}
    with torch.no_grad():
        want = [model(**x, instruction_embeds=e[i], use_cache=False).logits for i, x in enumerate(parts)]
        got = model(**packed, position_ids=positions(lengths), instruction_embeds=e, use_cache=False).logits
        torch.testing.assert_close(got, torch.cat(want, 1), rtol=1e-4, atol=1e-4)
        owner = torch.tensor([0, 2, 2])
        embeds = model.get_input_embeddings()(packed.pop("input_ids"))
        got = model(
            inputs_embeds=embeds,
            **packed,
            position_ids=positions(lengths),
            instruction_embeds=e,
            use_cache=False,
            image_to_sample=owner,
        ).logits
        torch.testing.assert_close(got, torch.cat(want, 1), rtol=1e-4, atol=1e-4)


REFUSED = {
    "too few embeddings": (
        {"instruction_embeds": embeddings(1)},
        r"shape \(4, 12\).*sample that is packed in the rows",
    ),
    "too many": ({"instruction_embeds": embeddings(5)}, r"\(4, 12\).*got \(5, 12\)"),
    "a jump": (
        {"position_ids": torch.cat([torch.arange(8), torch.arange(20, 32)])[None]},
        "got 7 and then 20 in row 0",
    ),
    "back to another start": ({"position_ids": positions() + 2}, "restart at 0.*got 7 and then 2 in row 0"),
    "boundaries that end early": ({"cu_seq_lens_q": torch.tensor([0, 6, 15])}, "rise from 0 to the 20.*15"),
    "boundaries that fall": ({"cu_seq_lens_q": torch.tensor([0, 9, 6, 20])}, "rise from 0 to the 20"),
    "boundaries of another kind": ({"cu_seq_lens_q": [0, 6, 20]}, "cu_seq_lens_q must be an integer tensor.*list"),
    "boundaries that are no numbers": ({"cu_seq_lens_q": torch.tensor([0.0, 20.0])}, "integer tensor.*float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_tell_the_samples_is_refused(case):
    given, message = REFUSED[case]
    inputs = {"input_ids": torch.cat(samples(), 1), "position_ids": positions(), "instruction_embeds": embeddings(4)}
    with pytest.raises((ValueError, TypeError), match=message):
        text_model()(**{**inputs, **given}, use_cache=False)


def test_boundaries_of_several_rows_are_refused():
    with pytest.raises(ValueError, match="one row is packed, but the batch has 2 rows"):
        text_model()(
            input_ids=torch.cat(samples((6, 6))), cu_seq_lens_q=torch.tensor([0, 6]), instruction_embeds=embeddings(2)
        )


def test_generating_and_going_on_from_packed_rows_is_refused():
    model, ids = text_model(), torch.cat(samples(), 1)
    for told in ({"position_ids": positions()}, {"attention_mask": torch.tensor([[1] * 6 + [2] * 14])}):
        with pytest.raises(ValueError, match="one sample a row"):
            model.generate(input_ids=ids, instruction_embeds=embeddings(1), max_new_tokens=2, **told)
    with torch.no_grad():
        cache = model(
            input_ids=ids, position_ids=positions(), instruction_embeds=embeddings(4), use_cache=True
        ).past_key_values
        with pytest.raises(RuntimeError, match="several samples were packed"):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)


ONE_SAMPLE = {
    "from 0": torch.arange(20)[None],
    "from another start": torch.arange(5, 25)[None],
    "of another shape": torch.arange(20).expand(1, 20),
    "of three axes": torch.arange(20).expand(3, 1, 20),
}


@pytest.mark.parametrize("case", ONE_SAMPLE)
def test_positions_of_one_sample(case):
    """They begin no other: one embedding is right."""
    model, ids, position = text_model(), torch.cat(samples(), 1), ONE_SAMPLE[case]
    if position.dim() == 3:  # the tiny Llama takes none: what matters comes before it
        model.get_base_model().register_forward_pre_hook(
            lambda m, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
        )
    with torch.no_grad():
        model(input_ids=ids, position_ids=position, instruction_embeds=embeddings(1), use_cache=False)
    assert smolora.routing_report(model)["model.layers.0.mlp.gate_proj"]["cu_seqlens"] is None


def test_positions_of_left_padding():
    """0 or 1 where there is padding, as generate() has had it: no sample begins there."""
    model, inputs, e = text_model(), batch((5, 9), (0, 0)), embeddings(2)
    mask = inputs["attention_mask"]
    plain = mask.cumsum(1) - 1
    with torch.no_grad():
        want = model(**inputs, position_ids=plain.clamp(min=0), instruction_embeds=e, use_cache=False).logits
        got = model(
            **inputs, position_ids=plain.masked_fill(mask == 0, 1), instruction_embeds=e, use_cache=False
        ).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)


def test_embeddings_have_the_configured_size():
    assert embeddings(4).shape == (4, INSTRUCTION_DIM)
