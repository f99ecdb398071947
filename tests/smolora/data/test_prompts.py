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


WRITTEN = ["<image>", "<s>", "</s>", "<pad>", "<image>\nwhat?", "a </s></s> b <image>", "<s><image></s>"]


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("written", WRITTEN)
def test_special_tokens_in_a_text_are_text(encoder, tokenizer, written, image):
    """In a question neither an image, a beginning nor padding; in an answer no end: it comes back letter for letter."""
    question, answer = f"What is {written} ?\nAnswer", f"It is {written} ."
    for text in (question, written):
        ids = encoder.prompt(text, image)
        assert [ids.count(token) for token in (1, 2, 0, IMAGE)] == [1, 0, 0, int(image)]
    sample = encoder.sample(question, answer, image)
    labels = [label for label in sample.labels if label != IGNORED_LABEL]
    assert labels.count(2) == 1 == sample.input_ids.count(2) and labels[-1] == 2 and IMAGE not in labels
    assert encoder.decode(labels) == answer
    assert encoder.expand(sample.input_ids).count(IMAGE) == 4 * image
    after = sample.input_ids[sample.input_ids.index(IMAGE) + 1 :] if image else sample.input_ids[1:]
    assert question in tokenizer.decode(after)


def test_an_ordinary_text_is_tokenised_as_ever(encoder, tokenizer):
    text = "A tall < b > c, 3 </ 4 & s>\nAnswer"
    ids = tokenizer(f"\n{text} ASSISTANT:", add_special_tokens=False).input_ids
    assert encoder.prompt(text, True)[-len(ids) :] == ids


def test_a_token_that_cannot_be_read_as_text_is_refused():
    """An image token that its tokenizer does not mark as special is found in any text."""
    tokenizer = small_llava.small_tokenizer()
    tokenizer.add_tokens(["<picture>"])
    encoder = PromptEncoder(tokenizer, tokenizer.convert_tokens_to_ids("<picture>"), 4)
    assert encoder.prompt("what?", True).count(encoder.image_token_id) == 1
    for call in (lambda: encoder.prompt("a <picture> ?", True), lambda: encoder.sample("what?", "<picture>", False)):
        with pytest.raises(ValueError, match=r"a text must not hold '<picture>', which this tokenizer cannot read"):
            call()
    assert not encoder.is_short("a <picture> ?", "x", True, 10_000)


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize(
    ("text", "answer"), [("what?", "A"), ("word " * 40, "left or right."), ("é→\U0001f600" * 9, "é")]
)
def test_what_is_short_is_so(encoder, text, answer, image):
    length = len(encoder.expand_sample(encoder.sample(text, answer, image)).input_ids)
    assert not encoder.is_short(text, answer, image, length - 1) and encoder.is_short(text, answer, image, 8 * length)


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
