"""Answers of models with chat templates: in a batch as one by one, with several images and several turns."""

from __future__ import annotations

import peft
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

import smolora
from smolora.backbones.load import load_backbone
from smolora.data.format import Dialogue, Message, Question
from support.answers import answered
from support.chat_models import CHAT_KINDS, save_chat


def dialogue(place, turns, images):
    """A question after other turns, or with several images: each turn is a tuple of texts, with None for an image."""
    roles = ("user", "assistant")
    messages = tuple(Message(roles[number % 2], parts) for number, parts in enumerate(turns))
    return Question(place, place, messages[-1].text, next(iter(images), None), None, Dialogue(messages, images))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Pictures of three sizes, by name."""
    folder, found = tmp_path_factory.mktemp("pictures"), {}
    for name, size in {"a": (48, 48), "b": (96, 48), "c": (30, 70)}.items():
        found[name] = folder / f"{name}.png"
        Image.effect_noise(size, 90 + len(found)).convert("RGB").save(found[name])
    return found


QUESTIONS = [
    Question(0, 0, "What colour is it?", "a"),
    Question(1, 1, "Which shape is larger?"),
    dialogue(2, [(None, "and", None, "Which is red?")], ("b", "c")),
    dialogue(3, [(None, "What is this?"), ("red",), ("And", None, "?")], ("c", "a")),
    dialogue(4, [("Where is it?",), ("left",), ("How many are there?",)], ()),
    Question(5, 5, "How many are there?", "b"),
]


@pytest.fixture(scope="module", params=CHAT_KINDS)
def asked(request, tmp_path_factory):
    """A model with adapters that change its answers, its backbone, and an embedding of each question's text."""
    folder = save_chat(tmp_path_factory.mktemp(request.param), request.param)
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    config = smolora.SMoLoRAConfig(r=4, lora_alpha=8, num_vu_experts=3, num_if_experts=3, instruction_dim=12)
    model = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".smolora_experts." in name and name.endswith("_B"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    table = {question.text: torch.randn(12, generator=generator) for question in QUESTIONS}
    return model, load_backbone(folder), lambda texts: torch.stack([table[text] for text in texts])


def test_a_batch_is_answered_as_one_by_one(asked, paths):
    """Texts and routes; samples without an image between those with one or two, whatever their order."""
    model, backbone, embed = asked
    alone = [answered(model, backbone, [question], paths, embed) for question in QUESTIONS]
    for chosen in (slice(None), slice(None, None, -1), slice(1, None, 3)):
        texts, layers, _ = answered(model, backbone, QUESTIONS[chosen], paths, embed)
        assert texts == [one for (one,), _, _ in alone[chosen]] and len(set(texts)) > 1
        for found, (_, [expected], _) in zip(layers, alone[chosen], strict=True):
            assert [(entry["layer"], entry["vu"], entry["if"]) for entry in found] == [
                (entry["layer"], entry["vu"], entry["if"]) for entry in expected
            ]
    assert len({text for (text,), _, _ in alone}) > 3
    connector = [{entry["layer"] for entry in layers[0]} for _, layers, _ in alone]
    assert connector[1] == connector[4] < connector[0] == connector[3], "who has images routes in the connector too"


def test_images_and_turns_are_the_processors(asked, paths):
    """Without adapters: what transformers' own processor and `generate` make of the whole conversation."""
    model, backbone, _ = asked
    for question in QUESTIONS[2:5]:
        conversation = [
            {
                "role": message.role,
                "content": [{"type": "image"} if p is None else {"type": "text", "text": p} for p in message.parts],
            }
            for message in question.messages
        ]
        text = backbone.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        images = [Image.open(paths[name]) for name in question.images] or None
        inputs = backbone.processor(text=[text], images=images, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with model.disable_adapter(), torch.no_grad():
            options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": backbone.stop_token_ids}
            want = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
            ((got,), _, _) = answered(model, backbone, [question], paths)
        assert got == backbone.decode(want) != ""


def test_each_turn_and_image_counts(asked, paths):
    """Another first image, or another first answer, is another conversation."""
    model, backbone, embed = asked
    question, logits = QUESTIONS[3], []
    changed = dialogue(3, [(None, "What is this?"), ("blue",), ("And", None, "?")], ("c", "a"))
    for one in (question, changed, question._replace(dialogue=question.dialogue._replace(images=("b", "a")))):
        read = [backbone.read(paths[name]) for name in one.images]
        ids = torch.tensor([backbone.expand(backbone.prompt(one.messages), [image.ids for image in read])])
        inputs = {"input_ids": ids, **backbone.join(read), **backbone.token_inputs(ids)}
        with torch.no_grad():
            logits.append(model(**inputs, instruction_embeds=embed([one.text])).logits[0, -1])
    assert all((logits[0] - other).abs().max() > 1e-4 for other in logits[1:])
