"""Prompts as token ids: the released code's, and labels on the answer alone."""

from __future__ import annotations

import pytest
import torch

import small_llava
from smolora.data.prompts import IGNORED_LABEL, SYSTEM, PromptEncoder, Sample, pad, prompt_text

IMAGE = 3


@pytest.fixture(scope="module")
def tokenizer():
    return small_llava.small_tokenizer()


@pytest.fixture
def encoder(tokenizer):
    return PromptEncoder(tokenizer, IMAGE, 4)


def text_of(tokenizer, ids):
    return tokenizer.decode(ids)


def test_prompt_text():
    assert prompt_text("what?\nBriefly.", True) == (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nwhat?\nBriefly. ASSISTANT:"
    )
    assert prompt_text("what?", False) == f"{SYSTEM} USER: what? ASSISTANT:"


def test_pieces_around_the_image_are_tokenised_apart(encoder, tokenizer):
    ids = encoder.prompt("what?", True)
    before, after = f"{SYSTEM} USER: ", "\nwhat? ASSISTANT:"
    pieces = [tokenizer(piece, add_special_tokens=False).input_ids for piece in (before, after)]
    assert ids == [tokenizer.bos_token_id, *pieces[0], IMAGE, *pieces[1]]
    assert ids.count(tokenizer.bos_token_id) == 1 and ids.count(IMAGE) == 1


def test_without_an_image(encoder, tokenizer):
    ids = encoder.prompt("what?", False)
    assert text_of(tokenizer, ids) == "<s>" + prompt_text("what?", False) and IMAGE not in ids


def test_image_token_in_a_question_is_no_second_image(encoder):
    ids = encoder._encode(prompt_text("what is <image> ?", True))
    assert (
        ids[ids.index(IMAGE) + 1 :]
        == encoder.tokenizer("\nwhat is <image> ? ASSISTANT:", add_special_tokens=False).input_ids
    )


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("answer", ["left", "left or right.", "A", " two"])
def test_loss_on_the_answer_and_the_end_alone(encoder, tokenizer, image, answer):
    sample = encoder.sample("what?", answer, image)
    labelled = [token for token, label in zip(*sample, strict=True) if label != IGNORED_LABEL]
    assert text_of(tokenizer, labelled) == f" {answer}</s>"
    assert labelled == [label for label in sample.labels if label != IGNORED_LABEL]  # a label is its own token
    prompt = encoder.prompt("what?", image)
    # what is trained is what is asked for at evaluation
    assert sample.input_ids[: len(prompt)] == prompt and sample.labels[: len(prompt)] == [IGNORED_LABEL] * len(prompt)
    assert sample.input_ids[-1] == tokenizer.eos_token_id


def test_an_empty_answer_has_its_end(encoder, tokenizer):
    labels = encoder.sample("what?", "", True).labels
    assert labels[-1] == tokenizer.eos_token_id


def test_expand(encoder):
    assert encoder.expand([1, IMAGE, 7]) == [1, IMAGE, IMAGE, IMAGE, IMAGE, 7]
    assert encoder.length([1, IMAGE, 7]) == 6 and encoder.length([1, 7]) == 2
    sample = encoder.expand_sample(Sample([1, IMAGE, 7, 2], [-100, -100, 7, 2]))
    assert sample == Sample([1, IMAGE, IMAGE, IMAGE, IMAGE, 7, 2], [-100] * 5 + [7, 2])


@pytest.mark.parametrize(("strategy", "features"), [("default", 4), ("full", 5)])
def test_features_are_the_models(tokenizer, strategy, features):
    model = small_llava.small_llava()
    model.config.vision_feature_select_strategy = strategy
    assert PromptEncoder.for_model(tokenizer, model.config).image_features == features


def test_model_takes_the_prompt(tokenizer):
    """As many placeholders as features: else Llava raises."""
    model = small_llava.small_llava()
    encoder = PromptEncoder.for_model(tokenizer, model.config)
    ids = torch.tensor([encoder.expand(encoder.prompt("what?", True))])
    assert model(input_ids=ids, pixel_values=torch.zeros(1, 3, 28, 28)).logits.shape[:2] == ids.shape


def test_pad():
    ids, mask = pad([[5, 6, 7], [8]], 0, left=True)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = pad([[5, 6, 7], [8]], -100, left=False)
    assert ids.tolist() == [[5, 6, 7], [8, -100, -100]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_tokenizer_without_an_end_is_refused(tokenizer):
    class Endless:
        bos_token_id, eos_token_id, pad_token_id = 1, None, 0

    with pytest.raises(ValueError, match="the tokenizer must have a eos_token_id"):
        PromptEncoder(Endless(), IMAGE, 4)
