"""Which answers are scored against which questions."""

from __future__ import annotations

import pytest

from smolora.evaluate.pairing import pair_answers
from smolora.evaluate.rules import Item
from support.scoring import write_lines

ITEMS = [Item(str(index), f"answer {index}", (f"answer {index}",)) for index in range(3)]


@pytest.fixture
def answers(tmp_path):
    def write(*ids):
        return write_lines(tmp_path / "a.jsonl", [{"question_id": i, "text": f"text {n}"} for n, i in enumerate(ids)])

    return write


def asked(paired):
    return [(item.question_id, text) for item, text in zip(paired.items, paired.texts, strict=True)]


def test_once(answers):
    assert asked(pair_answers("D", ITEMS, answers(2, 0, "1"))) == [("0", "text 1"), ("1", "text 2"), ("2", "text 0")]
    with pytest.raises(ValueError, match="line 3: question_id 0 is answered in line 1 too"):
        pair_answers("D", ITEMS, answers(0, 1, 0, 2))
    with pytest.raises(ValueError, match="no answer to 1 of 3 questions of D, the first is 2"):
        pair_answers("D", ITEMS, answers(0, 1))
    assert len(pair_answers("D", ITEMS, answers(0, 1), skipped={"2"}).items) == 2
    found = pair_answers("D", ITEMS, answers(0, 1), missing_scores_zero=True)
    assert asked(found)[-1] == ("2", "") and found.missing == 1


def test_last(answers):
    found = pair_answers("D", ITEMS, answers(0, 9, 1, 0, 2), "last")
    assert asked(found) == [("0", "text 3"), ("1", "text 2"), ("2", "text 4")] and found.missing == 0


def test_every(answers):
    found = pair_answers("D", ITEMS, answers("1", 0, 1), "every")
    assert asked(found) == [("1", "text 0"), ("0", "text 1"), ("1", "text 2")] and found.uncounted == 1
    assert pair_answers("D", ITEMS, answers(0, 1), "every", skipped={"2"}).uncounted == 0
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2: D has no question 9"):
        pair_answers("D", ITEMS, answers(0, 9), "every")


def test_position(answers):
    found = pair_answers("D", ITEMS, answers(9, 9), "position")
    assert asked(found) == [("0", "text 0"), ("1", "text 1")] and found.uncounted == 1
    with pytest.raises(ValueError, match=r"a\.jsonl: line 4: answers to D .* has 3 questions, got 4 answers"):
        pair_answers("D", ITEMS, answers(0, 1, 2, 3), "position")
