"""The rules for single answers, as released and as the field has them."""

from __future__ import annotations

import time

import pytest

from smolora.evaluate import ptb, rules, vqa
from smolora.evaluate.rules import Item
from support.scoring import correct


def test_released_rules_where_they_surprise():
    assert correct(rules.released_either_contains, "dog", "")  # an empty answer counts as right
    assert not correct(rules.released_exact, "dog", "dog ")  # nothing is stripped
    assert correct(rules.released_letter, "B", "it is (b) or C", choices=3)
    assert not correct(rules.released_letter, "D", "D", choices=3)  # there is no fourth choice
    assert not correct(rules.released_exact_answerable, "Unanswerable", "Unanswerable")
    assert correct(rules.released_follows_sentence, "a dog.", ".")  # one string is walked by letter
    assert not correct(rules.released_follows_sentence, "a dog.", "dog.")


def test_at_most_32_full_stops_are_removed_in_the_released_soft_accuracy():
    item = Item("0", "x", ("x",) * 10)
    assert rules.released_soft(item, "x" + "." * 32) == 1
    assert rules.released_soft(item, "x" + "." * 33) == 0
    assert rules.soft_textvqa(item, "x" + "." * 33) == 1


def test_letters_in_standard():
    assert correct(rules.letter, "B", " B", choices=3) and correct(rules.letter, "B", "The answer is B.", choices=3)
    assert not correct(rules.letter, "B", "b or not", choices=3)
    assert not correct(rules.letter, "A", "The answer is A. The answer is B.", choices=3)


COLLAPSED = (
    "a",
    ".",
    "a.",
    "-",
    "(",
    "(12",
    "1,",
    "a@",
    "'",
    "n't",
    "a-",
    "http://",
    " ",
    "#a",
    "<a",
    '"',
    "é",
    "+.",
    "a ",
)


@pytest.mark.parametrize("piece", COLLAPSED)
def test_a_collapsed_models_answers_are_scored_at_once(piece):
    """One thing thousands of times: no regular expression may go back and forth over it."""
    text = piece * 6000
    start = time.process_time()
    ptb.tokenize(text)
    vqa.normalize(text)
    for rule in (rules.letter, rules.released_letter):
        correct(rule, "A", text, choices=3)
    rules.follows_sentence(Item("1", ("A.",), ("A.",)), text)
    assert time.process_time() - start < 6
