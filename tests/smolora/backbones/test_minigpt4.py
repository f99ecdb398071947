"""MiniGPT-4's prompt, its images, and answers that end at a text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration

import smolora
from smolora.backbones.load import load_backbone
from smolora.backbones.minigpt4 import MiniGPT4
from smolora.data.format import Message, Question, ask
from smolora.data.prompts import IGNORED_LABEL, pad
from support.answers import answered
from support.backbones import BACKBONES
from support.minigpt4 import QUERIES, assemble_golden, with_tokenizer

ANSWER = Message("assistant", ("Dog",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minigpt4")
    assemble_golden(folder / "model", language=with_tokenizer(folder / "language"))
    return folder / "model"


@pytest.fixture(scope="module")
def backbone(folder: Path) -> MiniGPT4:
    found = load_backbone(folder)
    assert isinstance(found, MiniGPT4)
    return found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{place}.png" for place in range(2)]
    for place, path in enumerate(paths):
        values = np.random.default_rng(place).integers(0, 256, (40, 30 + place, 3), dtype=np.uint8)
        Image.fromarray(values).save(path)
    return paths


def ids(backbone: MiniGPT4, *pieces: str | None) -> list[int]:
    """BOS and pieces, each tokenised by itself, with None for an image."""
    tokens = [backbone.tokenizer.bos_token_id]
    for piece in pieces:
        tokens += [backbone.image_token_id] if piece is None else backbone.tokenizer(piece).input_ids
    return tokens


# ---- text


def test_the_released_prompt(backbone: MiniGPT4):
    after = "</Img> What?\nIn one word. ###Assistant: "
    question = ask("What?\nIn one word.", image=True)
    prompt = ids(backbone, "###Human: <Img>", None, after)
    assert backbone.prompt([question]) == prompt
    assert backbone.prompt([ask("What?")]) == ids(backbone, "###Human: What? ###Assistant: ")
    sample = backbone.sample([question, ANSWER])
    answer = backbone.tokenizer("Dog###").input_ids
    assert sample.input_ids == [*prompt, *answer]
    assert sample.labels == [IGNORED_LABEL] * len(prompt) + answer


def test_several_turns(backbone: MiniGPT4):
    """A turn begins behind the mark that ended the answer before it; all answers have labels."""
    turns = [Message("system", ("Look.",)), ask("What?", image=True), ANSWER, ask("Sure?")]
    pieces = ("Look.###Human: <Img>", None, "</Img> What? ###Assistant: ", "Dog###", "Human: Sure? ###Assistant: ")
    assert backbone.prompt(turns) == ids(backbone, *pieces)
    sample = backbone.sample([*turns, Message("assistant", ("Yes",))])
    assert sample.input_ids == ids(backbone, *pieces, "Yes###")
    labelled = [token for token in sample.labels if token != IGNORED_LABEL]
    assert labelled == [*backbone.tokenizer("Dog###").input_ids, *backbone.tokenizer("Yes###").input_ids]


def test_several_images(backbone: MiniGPT4):
    message = Message("user", (None, None, "Which?", "Or this:", None))
    pieces = ("###Human: <Img>", None, "</Img> <Img>", None, "</Img> Which?\nOr this:\n<Img>", None)
    assert backbone.prompt([message]) == ids(backbone, *pieces, "</Img>  ###Assistant: ")


def test_texts_with_marks(backbone: MiniGPT4):
    """A special token in a text is none; the mark may be asked about, but an answer ends there."""
    assert backbone.tokenizer.eos_token_id not in backbone.prompt([ask("What is </s>?")])
    backbone.sample([ask("What is ###?"), ANSWER])
    with pytest.raises(ValueError, match="an answer must not hold '###', which ends it, got 'A###B'"):
        backbone.sample([ask("What?"), Message("assistant", ("A###B",))])
    assert backbone.decode(backbone.tokenizer(" Dog###Human: x").input_ids) == "Dog"
    assert backbone.decode([*backbone.tokenizer("Dog").input_ids, backbone.tokenizer.eos_token_id, 40]) == "Dog"


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("text", ["What?", "", "é" * 30])
def test_short_samples_are_short(backbone: MiniGPT4, text: str, images: int, pictures: list[Path]):
    """What is said to fit without looking fits."""
    messages = [ask(text, image=bool(images)), ANSWER]
    length = backbone.length(backbone.sample(messages).input_ids, pictures[:images])
    short = [limit for limit in range(2000) if backbone.is_short(messages, pictures[:images], limit)]
    assert short and length <= min(short) <= length + 120
    assert not backbone.is_short([ask("</s>"), ANSWER], [], 2000)
    assert not backbone.is_short([ask("What?"), Message("assistant", ("###",))], [], 2000)


# ---- images


def test_images(backbone: MiniGPT4, pictures: list[Path]):
    """Resized to the tower's size whatever their shape, with CLIP's mean and deviation; five ids stand for each."""
    found = [backbone.read(path) for path in pictures]
    assert all(image.ids == [backbone.image_token_id] * QUERIES for image in found)
    pixels = backbone.join(found)["pixel_values"]
    assert pixels.shape == (2, 3, 28, 28) and pixels.dtype == torch.float32
    resized = np.asarray(Image.open(pictures[1]).resize((28, 28), Image.Resampling.BICUBIC)).astype(np.float64) / 255
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = torch.from_numpy((resized - mean) / deviation).permute(2, 0, 1)
    assert (pixels[1].double() - expected).abs().max() <= 1e-6
    prompt = backbone.prompt([ask("What?", image=True)])
    assert len(backbone.expand(prompt, [found[0].ids])) == backbone.length(prompt, pictures[:1]) == len(prompt) + 4
    with pytest.raises(ValueError, match=r"evaluation\.padding must be 'all' where model.prompt is minigpt4"):
        backbone.cropping()


def test_which_folder(folder: Path, backbone: MiniGPT4):
    """An assembled MiniGPT-4 is known by its chat template; other models are refused."""
    assert isinstance(load_backbone(folder, "minigpt4"), MiniGPT4)
    assert backbone.settings() == {"prompt": "minigpt4"}
    config = BACKBONES["pixtral"].make().config
    with pytest.raises(ValueError, match="minigpt4 is for a Blip2 with a Llama, got llava with"):
        MiniGPT4.load(folder, config, backbone.tokenizer)


# ---- answers


def four_questions(pictures: list[Path]) -> list[Question]:
    """Two with a picture, two without."""
    first, second = (path.name for path in pictures)
    texts = [("What is it?", first), ("Why?", None), ("And this, in one word?", second), ("When?", None)]
    return [Question(place, place, text, image) for place, (text, image) in enumerate(texts)]


def test_adapters_route_a_batch_as_single_questions(folder: Path, backbone: MiniGPT4, pictures: list[Path]):
    """An instruction a question. The model cannot do without a picture, so a batch without any has a blank one, which
    is no sample's and leaves the adapter of the projection a gradient of zero."""
    base = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    config = {"num_vu_experts": 3, "num_if_experts": 3, "instruction_dim": 12}
    model = peft.get_peft_model(base, smolora.SMoLoRAConfig(r=4, lora_alpha=8, **config)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".smolora_experts." in name and name.endswith("_B"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    questions, paths = four_questions(pictures), {path.name: path for path in pictures}
    table = {question.text: torch.randn(12, generator=generator) for question in questions}

    def embed(texts):
        return torch.stack([table[text] for text in texts])

    alone = [answered(model, backbone, [question], paths, embed) for question in questions]
    for chosen in (slice(None), slice(1, None, 2)):
        texts, layers, _ = answered(model, backbone, questions[chosen], paths, embed)
        assert texts == [texts[0] for texts, _, _ in alone[chosen]] and len(set(texts)) == len(texts)
        for found, (_, [expected], _) in zip(layers, alone[chosen], strict=True):
            assert [(entry["layer"], entry["vu"], entry["if"]) for entry in found] == [
                (entry["layer"], entry["vu"], entry["if"]) for entry in expected
            ]
    assert [len(layers[0]) for _, layers, _ in alone] == [7, 6, 7, 6]  # the projection is of those with a picture

    samples = [backbone.sample([*question.messages, ANSWER]) for question in questions[1::2]]
    ids, mask = pad([sample.input_ids for sample in samples], backbone.pad_token_id, left=False)
    labels, _ = pad([sample.labels for sample in samples], IGNORED_LABEL, left=False)
    instructions = embed([question.text for question in questions[1::2]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, **backbone.join([])}
    model.train()(**batch, instruction_embeds=instructions).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in trained.values())
    assert {grad.any().item() for name, grad in trained.items() if "language_projection" in name} == {False}
    assert any(grad.any() for grad in trained.values())


def test_answers_of_a_batch_are_those_of_single_questions(folder: Path, backbone: MiniGPT4, pictures: list[Path]):
    """With images, without, and batches without any; an answer ends at a text of several tokens."""
    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    questions, paths = four_questions(pictures), {path.name: path for path in pictures}
    alone = [answered(model, backbone, [question], paths)[0][0] for question in questions]
    assert answered(model, backbone, questions, paths)[0] == alone and len(set(alone)) > 2
    assert answered(model, backbone, questions[1::2], paths)[0] == alone[1::2]
    stops = tuple(text[5:8] for text in alone)
    seen = []
    model.language_model.register_forward_pre_hook(lambda *_: seen.append(1))
    backbone.stop_texts, before = stops, backbone.stop_texts
    try:
        stopped = answered(model, backbone, questions, paths)[0]
    finally:
        backbone.stop_texts = before
    for text, found in zip(alone, stopped, strict=True):
        end = min(place for place in map(text.find, stops) if place >= 0)
        assert found == text[:end].strip()
    assert 5 < len(seen) < 20, "generation goes on behind the ends"
