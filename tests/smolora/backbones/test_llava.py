"""Vicuna's prompts of one and several turns, and CLIP's images."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import small_llava
from smolora.backbones.llava import Llava
from smolora.backbones.load import load_backbone
from smolora.data.format import Message, ask
from smolora.data.prompts import IGNORED_LABEL, SYSTEM
from support.backbones import BACKBONES

ANSWER = Message("assistant", ("a dog",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_llava.save_base(tmp_path_factory.mktemp("base"), small_llava.small_llava())


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(folder)


def labelled(backbone, sample):
    """The texts of each run of labels."""
    runs, before = [], IGNORED_LABEL
    for token, label in zip(*sample, strict=True):
        assert label in (IGNORED_LABEL, token)
        if label != IGNORED_LABEL:
            if before == IGNORED_LABEL:
                runs.append([])
            runs[-1].append(token)
        before = label
    return [backbone.tokenizer.decode(run) for run in runs]


def test_a_llava_is_loaded_as_released(folder, backbone):
    assert isinstance(backbone, Llava) and backbone.style == "vicuna_v1"
    assert backbone.stop_token_ids == [backbone.tokenizer.eos_token_id] and backbone.settings() == {
        "square_images": True
    }
    assert backbone.cropping().settings() == {"square_images": False}
    assert isinstance(load_backbone(folder, "vicuna_v1"), Llava)


def test_one_turn_is_that_of_the_encoder(backbone):
    encoder = backbone.encoder
    for image in (False, True):
        assert backbone.prompt([ask("what?\nBriefly.", image)]) == encoder.prompt("what?\nBriefly.", image)
        assert backbone.sample([ask("what?", image), ANSWER]) == encoder.sample("what?", "a dog", image)


def test_several_turns(backbone):
    """Each turn begins after the EOS of the one before, without BOS; all answers have labels."""
    encoder, eos = backbone.encoder, backbone.tokenizer.eos_token_id
    messages = [ask("what?", True), ANSWER, ask("sure?"), Message("assistant", ("yes",))]
    sample = backbone.sample(messages)
    first = encoder.sample("what?", "a dog", True)
    second = encoder._tokens("USER: sure? ASSISTANT: yes")
    assert sample.input_ids == [*first.input_ids, *second, eos]
    assert labelled(backbone, sample) == [" a dog</s>", " yes</s>"]
    assert backbone.prompt(messages[:3]) == [*first.input_ids, *encoder._tokens("USER: sure? ASSISTANT:")]


def test_a_system_message_and_several_images(backbone):
    own = backbone.prompt([Message("system", ("a wall.",)), Message("user", ("one", None, "two", None))])
    image = backbone.image_token_id
    pieces = [backbone.encoder._tokens(text) for text in ("a wall. USER: one\n", "\ntwo\n", " ASSISTANT:")]
    bos = backbone.tokenizer.bos_token_id
    assert own == [bos, *pieces[0], image, *pieces[1], image, *pieces[2]]
    assert SYSTEM not in backbone.tokenizer.decode(own)


def test_images(backbone, tmp_path):
    paths = [tmp_path / f"{side}.png" for side in (20, 30)]
    for side, path in zip((20, 30), paths, strict=True):
        Image.new("RGB", (side, 40), (side, 0, 0)).save(path)
    read = [backbone.read(path) for path in paths]
    pixels = backbone.join(read)["pixel_values"]
    assert torch.equal(pixels, torch.stack([backbone.transform(path) for path in paths]))
    ids = backbone.prompt([ask("what?", True)])
    whole = backbone.expand(ids, [read[0].ids])
    assert whole == backbone.encoder.expand(ids) and len(whole) == backbone.length(ids, paths[:1])
    assert backbone.join([]) == {}
    cropped = backbone.cropping().read(paths[0]).tensors["pixel_values"]
    assert not torch.equal(cropped, pixels[:1])


def test_another_model_is_refused(folder, backbone):
    config = BACKBONES["pixtral"].make().config
    with pytest.raises(ValueError, match=r"vicuna_v1 is for a LLaVA with a CLIP tower, got llava with pixtral in"):
        Llava.load(folder, config, backbone.tokenizer)
