"""VQA accuracy: agreement of annotators, and the normalisation of answers."""

from __future__ import annotations

import pytest

from smolora.evaluate import vqa


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0, 0),
        (1, 0.3),  # the one annotator who gave it has no other behind; nine have one: 9/10 * 1/3
        (2, 0.6),
        (3, 0.9),
        (4, 1),
        (10, 1),
    ],
)
def test_agreement_with_ten_answers(given, expected):
    assert vqa.agreement("a", ["a"] * given + ["b"] * (10 - given)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Two dogs.", "2 dogs"),
        ("don't", "don't"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("yes, it is!", "yes it is"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("A-B", "b"),  # a hyphen between letters becomes a space, and the article goes
        ("none", "0"),
        ("10 oclock", "10 o'clock"),
        ("a/c (on)", "c on"),
        ("what?", "what"),
    ],
)
def test_vqa_normalisation(text, expected):
    assert vqa.normalize(text) == expected
