"""A look at a task's data."""

from __future__ import annotations

from smolora.data.format import Conversation, Dialogue, Message, Question
from smolora.train.look import LOOKED_AT, look_at, sentence
from support.train_world import draw


def test_duplicates_and_broken_pictures_are_found(tmp_path):
    for index in range(3):
        draw(tmp_path / f"{index}.png", "red", index)
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    train = [
        Conversation(0, "Which colour is it?", "red", "0.png"),
        Conversation(1, "What?", "a red wall", "1.png"),
        Conversation(2, "What?", "no", None),
    ]
    test = [Question(0, 0, "What?", "1.png", "red"), Question(1, 1, "Where?", "2.png", ("a", "b")), Question(2, 2, "Q")]
    look = look_at(train, test, tmp_path)
    assert look == {
        "pictures": 3,
        "without_picture": 2,
        "question_words": [1, 4],
        "answer_words": [1, 3],
        "in_both": 1,
        "pictures_in_both": 1,
        "looked_at": 3,
        "broken": [str(tmp_path / "2.png")],
    }
    line = sentence("x", look)
    for part in ("3 pictures", "1 questions are training", "1 of 3 pictures looked at are broken", "2.png"):
        assert part in line


def test_all_pictures_and_turns_count(tmp_path):
    """A second picture of a question may be a training sample's, and a question after other turns is another one."""
    both = Message("user", (None, None, "What?"))
    train = [
        Conversation(0, "What?", "a", "0.png", Dialogue((both, Message("assistant", ("a",))), ("0.png", "1.png"))),
        Conversation(1, "Sure?", "b"),
    ]
    later = Dialogue((both, Message("assistant", ("a",)), Message("user", ("Sure?",))), ("2.png", "1.png"))
    test = [
        Question(0, 0, "Sure?", "2.png", "b", later),
        Question(1, 1, "What?", "0.png", "a", Dialogue((both,), ("0.png", "1.png"))),
    ]
    look = look_at(train, test, tmp_path)
    assert [look[key] for key in ("pictures", "pictures_in_both", "in_both", "without_picture")] == [3, 2, 1, 1]


def test_many_pictures_are_looked_at_here_and_there(tmp_path):
    names = [f"{index}.png" for index in range(2 * LOOKED_AT + 1)]
    for name in names:
        (tmp_path / name).touch()
    look = look_at([Conversation(0, "Q", "a", name) for name in names], [], tmp_path)
    assert LOOKED_AT / 2 < look["looked_at"] == len(look["broken"]) <= LOOKED_AT
