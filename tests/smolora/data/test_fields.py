"""What the fields of a record mean."""

from __future__ import annotations

import pytest

from smolora.data.fields import Fields, Picture, Sample, guess_fields, read_sample

LLAVA = {
    "id": 1,
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhich colour?\nOne word."},
        {"from": "gpt", "value": "red"},
    ],
}
OPENAI = {
    "messages": [
        {"role": "system", "content": "One word."},
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Which colour?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
}
SHAREGPT = {
    "images": ["a.png"],
    "conversations": [{"from": "human", "value": "Which colour?\nOne word.<image>"}, {"from": "gpt", "value": "red"}],
}
QUESTION = {"question_id": 3, "image": "a.png", "text": "Which colour?\nOne word.", "answer": "red"}
COLUMNS = {"img": "a.png", "Query": "Which colour?", "format": "One word.", "label": "red"}
SAMPLE = Sample("Which colour?\nOne word.", ("red",), Picture("a.png"))


@pytest.mark.parametrize("record", [LLAVA, OPENAI, SHAREGPT, QUESTION, COLUMNS], ids=range(5))
def test_every_format_gives_the_same_sample(record):
    found, missing = guess_fields([record])
    assert missing == []
    assert read_sample(record, Fields(**found), "x") == SAMPLE


def test_fields_that_cannot_be_told_are_named():
    found, missing = guess_fields([{"a": "x", "b": "y", "image": "z"}])
    assert (found, missing) == ({"image": "image"}, ["question", "answer"])
    assert guess_fields([{"a": "x", "b": "y"}], {"question": "a", "answer": "b"})[1] == []
    assert guess_fields([{"messages": [{"role": "user", "content": "Q"}]}])[1] == ["answer"]
    with pytest.raises(ValueError, match="question must be a field of the records, a, b, got 'c'"):
        guess_fields([{"a": "x", "b": "y"}], {"question": "c"})


def test_several_answers_and_embedded_pictures():
    record = {"q": "Q", "a": [{"answer": "x"}, "y"], "i": {"bytes": b"1", "path": "a.png"}}
    sample = read_sample(record, Fields("q", "a", "i"), "x")
    assert sample == Sample("Q", ("x", "y"), Picture("a.png", b"1"))
    assert read_sample({"q": "Q", "a": 3, "i": None}, Fields("q", "a", "i"), "x") == Sample("Q", ("3",), None)


TURNS = OPENAI["messages"]


@pytest.mark.parametrize(
    ("record", "fields", "message"),
    [
        ({"q": None, "a": "x"}, Fields("q", "a"), "x: q must be a text, got None"),
        ({"q": "Q", "a": True}, Fields("q", "a"), "x: a must be a text, got True"),
        ({"q": "Q", "a": []}, Fields("q", "a"), "x: a must have an answer, got none"),
        ({"q": " <image> ", "a": "x"}, Fields("q", "a"), "x: must hold a question"),
        ({"q": "Q", "a": "x", "i": ["1", "2"]}, Fields("q", "a", "i"), "one image or none, got 2"),
        ({"q": "Q", "a": "x", "i": 5}, Fields("q", "a", "i"), "i must be a path, bytes"),
        ({"messages": TURNS[:2]}, Fields("messages"), "x: has no answer"),
        (
            {"messages": [*TURNS, *TURNS[1:]]},
            Fields("messages"),
            "one question and its answer, got 2 of the user",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, Fields("messages"), "must be turns of human, user"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]},
            Fields("messages"),
            "must have parts of type text or image, got .*video",
        ),
    ],
)
def test_malformed_records_are_named(record, fields, message):
    with pytest.raises(ValueError, match=message):
        read_sample(record, fields, "x")
