"""MiniCVIT's base model: an ordinary checkpoint with its processor, and what recipes make of it."""

import json
import threading
import time
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from smolora.data.images import ImageTransform
from smolora.data.prompts import IGNORED_LABEL, SYSTEM, PromptEncoder
from smolora.instructions.texts import MULTI_TYPE, SINGLE_TYPE
from smolora.io.files import atomic_folder, write_json
from smolora.minicvit import base_model, tasks
from smolora.minicvit import prepare as preparation
from smolora.minicvit.base_model import (
    PROBE_HEADS,
    BaseSettings,
    converse,
    draw_picture,
    make_base,
    make_model,
    make_tokenizer,
)
from smolora.minicvit.scenes import SIDE, StableRandom
from smolora.minicvit.tasks import TASKS, samples

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
    return make_tokenizer()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base", TINY)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return PromptEncoder(tokenizer, tokenizer.convert_tokens_to_ids("<image>"), 16)


@pytest.mark.parametrize("name", TASKS)
def test_every_text_of_the_benchmark_is_known_and_comes_back(name, encoder):
    unknown = encoder.tokenizer.unk_token_id
    for index, (sample, _) in enumerate(samples(name, "words", 60)):
        for table in (SINGLE_TYPE, MULTI_TYPE):
            instruction = table[name][index % len(table[name])]
            text = f"{sample.question}\n{instruction}" if sample.question else instruction
            for answer in sample.references or (sample.answer,):
                ids, labels = encoder.sample(text, answer, True)
                assert unknown not in ids, encoder.tokenizer.convert_ids_to_tokens(ids)
                assert encoder.decode([i for i in labels if i != IGNORED_LABEL]) == answer


def test_conversations_are_known_and_only_answers_are_learned(encoder):
    system = encoder.tokenizer.convert_tokens_to_ids(SYSTEM)
    for index in range(80):
        picture = draw_picture(StableRandom(f"test {index}"))
        ids, labels = converse(picture, encoder, StableRandom(f"turns {index}"))
        assert encoder.tokenizer.unk_token_id not in ids
        assert (ids.count(system), ids.count(encoder.tokenizer.bos_token_id)) == (1, 1)
        assert ids.count(encoder.image_token_id) == (16 if picture.pixels is not None else 0)
        assert ids.count(encoder.tokenizer.eos_token_id) == labels.count(encoder.tokenizer.eos_token_id) > 0
        asked = encoder.tokenizer.convert_tokens_to_ids("▁USER")
        assert asked in ids and asked not in labels
        for head, place in picture.facts.items():
            assert 0 <= place < len(PROBE_HEADS[head].names)


def test_no_instruction_occurs_in_the_alignment():
    """What the instructions ask for is left to the benchmark's stages."""
    turns = [turn for n in range(200) for turn in draw_picture(StableRandom(f"{n}")).turns]
    said = " ".join(f"{question} {sentence}" for question, _, sentence in turns)
    assert all("{}" in sentence and sentence.endswith(".") for _, _, sentence in turns)
    for table in (SINGLE_TYPE, MULTI_TYPE):
        for instructions in table.values():
            assert not any(part in said for text in instructions for part in text.split("\n"))


def test_the_model_is_small(tokenizer):
    assert sum(p.numel() for p in make_model(tokenizer, BaseSettings()).parameters()) <= 3_000_000


def test_it_is_an_ordinary_checkpoint(base):
    model = AutoModelForImageTextToText.from_pretrained(base).eval()
    assert AutoTokenizer.from_pretrained(base).bos_token == "<s>"
    encoder = PromptEncoder.for_model(AutoTokenizer.from_pretrained(base), model.config)
    assert encoder.image_features == 16
    sample = next(sample for sample, _ in samples("TextVQA", "checkpoint", 1))
    picture = base.parent / "picture.png"
    picture.write_bytes(tasks.png(sample.canvas.pixels))
    pixels = ImageTransform.from_pretrained(base)(picture)
    assert pixels.shape == (3, SIDE, SIDE)
    ids = torch.tensor([encoder.expand(encoder.prompt("What does the sign say?", True))])
    logits = model(input_ids=ids, pixel_values=pixels[None]).logits
    with tasks.Image.open(picture) as image:
        inputs = AutoProcessor.from_pretrained(base)(
            images=image, text=f"{SYSTEM} USER: <image>\nWhat does the sign say? ASSISTANT:", return_tensors="pt"
        )
    assert torch.equal(inputs["pixel_values"][0], pixels)
    assert inputs["input_ids"][0].tolist() in (ids[0].tolist(), ids[0, 1:].tolist())  # BOS is the prompt encoder's
    assert torch.isfinite(logits).all()


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


# ---- as a recipe's preparation


def test_what_is_planned_is_made(tmp_path, monkeypatch):
    small = {name: task._replace(train=min(task.train, 3), test=2) for name, task in TASKS.items()}
    monkeypatch.setattr(tasks, "TASKS", small)
    monkeypatch.setattr(preparation, "TASKS", small)
    monkeypatch.setattr(preparation, "make_base", lambda folder: make_base(folder, TINY))
    options = {"data": str(tmp_path / "data"), "base": str(tmp_path / "base"), "tasks": ["GQA", "Places365"]}
    paths = preparation.planned(options)
    assert not any(path.exists() for path in paths)
    preparation.prepare(options)
    for path, count in paths.items():
        assert path.exists()
        if count is not None:
            assert len(json.loads(path.read_text())) == count
    preparation.prepare(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "b"}, "prepare.minicvit.data must be a folder, got None"),
        ({"data": "d", "base": 3}, "prepare.minicvit.base must be a folder, got 3"),
        ({"data": "d", "base": "b", "task": []}, "has data, base and tasks, got task too"),
        ({"data": "d", "base": "b", "tasks": ["GQB"]}, r"tasks must be a list of ScienceQA, .* got \['GQB'\]"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        preparation.planned(options)


def test_two_that_want_it_at_once(tmp_path, monkeypatch):
    """One trains it, the other waits and finds it made."""
    made = []

    def make(folder, settings):
        made.append(None)
        time.sleep(0.1)
        content = {"settings": asdict(settings) | {"data": tasks.SEED}}
        with atomic_folder(folder) as part:
            write_json(part / "base.json", content)

    monkeypatch.setattr(base_model, "_make_base", make)
    threads = [threading.Thread(target=base_model.make_base, args=(tmp_path / "base",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and [path.name for path in tmp_path.iterdir()] == ["base"]
