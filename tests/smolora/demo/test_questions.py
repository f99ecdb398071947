"""Questions as they stand and otherwise, the form that they ask for, and pictures that are not taken."""

from __future__ import annotations

import pytest
from PIL import Image

from smolora.demo import questions
from smolora.demo.questions import (
    NO_REFERENCE,
    TaskQuestions,
    UploadError,
    check_upload,
    compose,
    form_rule,
    known_to,
)
from support.train_world import OBJECT, SENTENCE


@pytest.fixture
def asked(runs) -> TaskQuestions:
    """The questions of a captioning task."""
    return TaskQuestions(runs[0].recipe, runs[0].task("Flickr30k"))


def test_a_question_as_it_stands(asked):
    question = asked.questions[0]
    assert asked.split(question) == ("", SENTENCE)
    query = asked.query(question, "", f"{SENTENCE}\n")
    assert (query.task, query.text, query.image) == ("Flickr30k", question.text, asked.images / question.image)
    assert query.item.references == tuple(question.answer)


def test_another_instruction_for_the_same_picture(asked):
    question = asked.questions[0]
    query = asked.query(question, "What colour?", OBJECT)
    assert query.text == f"What colour?\n{OBJECT}" and query.image == asked.images / question.image
    assert query.item is None  # its reference answers another question


def test_a_question_and_its_instruction_are_divided(asked):
    question = asked.questions[0]._replace(text=f"Who is it?\n{SENTENCE}")
    assert asked.split(question) == ("Who is it?", SENTENCE)
    assert asked.split(question._replace(text="Who is it?\nBe brief.")) == ("Who is it?", "Be brief.")


def test_the_form_is_that_of_the_instruction(runs):
    recipe, task = runs[0].recipe, runs[0].task("Flickr30k")
    sentence, word = form_rule(recipe, task, f"Who?\n{SENTENCE}"), form_rule(recipe, task, f"Who?\n{OBJECT}")
    long, short = "It is a very red wall.", "red"
    assert sentence(NO_REFERENCE, long) and not sentence(NO_REFERENCE, short)
    assert word(NO_REFERENCE, short) and not word(NO_REFERENCE, long)
    assert form_rule(recipe, task, "Who?\nSing it.") is None
    assert known_to([recipe, recipe]) == [OBJECT, SENTENCE]


def test_texts_are_bounded():
    assert compose(" a\n", "\nb ") == "a\nb" and compose("", "b") == "b"
    with pytest.raises(ValueError, match="There is nothing to answer"):
        compose(" ", "\n")
    with pytest.raises(ValueError, match="may have 4,000 characters, these have 4,001"):
        compose("a" * 3999, "b")


def test_pictures_that_are_not_taken(tmp_path, monkeypatch):
    whole, torn, text = tmp_path / "whole.png", tmp_path / "torn.png", tmp_path / "text.png"
    Image.effect_noise((60, 40), 60).save(whole)
    check_upload(whole)
    torn.write_bytes(whole.read_bytes()[:-400])
    text.write_text("no picture")
    for path, sentence in (
        (torn, "torn.png cannot be decoded: it is damaged, or of an unusual kind."),
        (text, "text.png is no picture that can be read."),
    ):
        with pytest.raises(UploadError) as error:
            check_upload(path)
        assert str(error.value) == sentence and str(tmp_path) not in sentence
    monkeypatch.setattr(questions, "MOST_PIXELS", 60 * 40 - 1)
    with pytest.raises(UploadError, match=r"whole\.png has 60 x 40 pixels; a picture may have 2,399 in all"):
        check_upload(whole)
    monkeypatch.setattr(questions, "MOST_BYTES", 1024)
    with pytest.raises(UploadError, match=r"whole.png has 0.0 MiB; a picture may have 0"):
        check_upload(whole)
