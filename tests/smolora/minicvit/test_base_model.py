"""MiniCVIT's base model: an ordinary checkpoint with its processor."""

import json
import threading
import time
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from smolora.backbones.load import load_backbone
from smolora.data.format import Question
from smolora.data.images import ImageTransform
from smolora.data.prompts import SYSTEM, PromptEncoder
from smolora.io.files import atomic_folder, write_json
from smolora.minicvit import base_model
from smolora.minicvit.base_model import make_base
from smolora.minicvit.drawing import png
from smolora.minicvit.kinds import BaseSettings, make_model, make_tokenizer
from smolora.minicvit.pictures import MINICVIT_PICTURES, dialogue
from smolora.minicvit.scenes import SIDE, StableRandom
from smolora.minicvit.tasks import MINICVIT
from support.answers import answered

TINY = BaseSettings(
    vision_hidden=16,
    vision_layers=1,
    hidden=16,
    layers=1,
    vision_steps=3,
    vision_batch=4,
    steps=3,
    batch=4,
    pictures=30,
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(MINICVIT_PICTURES)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base", TINY)


def test_the_model_is_small(tokenizer):
    assert sum(p.numel() for p in make_model(tokenizer, BaseSettings()).parameters()) <= 3_000_000


def test_it_is_an_ordinary_checkpoint(base):
    model = AutoModelForImageTextToText.from_pretrained(base).eval()
    assert AutoTokenizer.from_pretrained(base).bos_token == "<s>"
    encoder = PromptEncoder.for_model(AutoTokenizer.from_pretrained(base), model.config)
    assert encoder.image_features == 16
    sample = next(sample for sample, _ in MINICVIT.samples("TextVQA", "checkpoint", 1))
    picture = base.parent / "picture.png"
    picture.write_bytes(png(sample.canvas.pixels))
    pixels = ImageTransform.from_pretrained(base)(picture)
    assert pixels.shape == (3, SIDE, SIDE)
    ids = torch.tensor([encoder.expand(encoder.prompt("What does the sign say?", True))])
    logits = model(input_ids=ids, pixel_values=pixels[None]).logits
    with Image.open(picture) as image:
        inputs = AutoProcessor.from_pretrained(base)(
            images=image, text=f"{SYSTEM} USER: <image>\nWhat does the sign say? ASSISTANT:", return_tensors="pt"
        )
    assert torch.equal(inputs["pixel_values"][0], pixels)
    assert inputs["input_ids"][0].tolist() in (ids[0].tolist(), ids[0, 1:].tolist())  # BOS is the prompt encoder's
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(("kind", "style"), [("qwen2_5_vl", "chat"), ("internvl", "chat"), ("minigpt4", "minigpt4")])
def test_other_kinds_speak_in_their_own_style(kind, style, tmp_path):
    folder = make_base(tmp_path / kind, replace(TINY, backbone=kind))
    backbone, model = load_backbone(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert backbone.style == style
    rng = StableRandom("a picture")
    picture = next(one for one in iter(lambda: MINICVIT_PICTURES.draw(rng), None) if one.canvas is not None)
    path = tmp_path / "picture.png"
    path.write_bytes(png(picture.canvas.pixels))
    shown = backbone.read(path)
    sample = backbone.expand_sample(backbone.sample(dialogue(picture, rng, 2)), [shown.ids])
    assert backbone.tokenizer.unk_token_id not in sample.input_ids
    ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
    inputs = {**backbone.join([shown]), **backbone.token_inputs(ids)}
    assert model(input_ids=ids, labels=labels, **inputs).loss.isfinite()
    question = Question(0, 0, "Which word does the sign show?\nAnswer in a word.", path.name)
    answer = answered(model, backbone, [question], {path.name: path})[0][0]
    assert not any(stop in answer for stop in backbone.stop_texts)


def test_training_changed_it_all_and_the_report_says_how(base, tokenizer):
    fresh = make_model(tokenizer, TINY).state_dict()
    made = AutoModelForImageTextToText.from_pretrained(base).state_dict()
    unchanged = [name for name, value in made.items() if value.dim() > 1 and torch.equal(value, fresh[name])]
    assert unchanged == []
    report = json.loads((base / "base.json").read_text())
    assert report["parameters"] == sum(value.numel() for value in made.values())
    assert report["tower"]["loss"] > 0 and report["alignment"]["loss"] > 0


def test_it_is_made_once(base):
    stamp = (base / "model.safetensors").stat().st_mtime_ns
    assert make_base(base, TINY) == base
    assert (base / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="holds a base model of other settings"):
        make_base(base)


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be empty, or hold a base model"):
        make_base(tmp_path, TINY)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_two_that_want_it_at_once(tmp_path, monkeypatch):
    """One trains it, the other waits and finds it made."""
    made = []

    def make(folder, settings, curriculum):
        made.append(None)
        time.sleep(0.1)
        content = {"settings": asdict(settings) | {"data": MINICVIT.seed}}
        with atomic_folder(folder) as part:
            write_json(part / "base.json", content)

    monkeypatch.setattr(base_model, "_make_base", make)
    threads = [threading.Thread(target=base_model.make_base, args=(tmp_path / "base",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and [path.name for path in tmp_path.iterdir()] == ["base"]
