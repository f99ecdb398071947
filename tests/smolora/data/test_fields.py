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
SAMPLE = Sample("Which colour?\nOne word.", ("red",), (Picture("a.png"),))


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
    assert sample == Sample("Q", ("x", "y"), (Picture("a.png", b"1"),))
    assert read_sample({"q": "Q", "a": 3, "i": None}, Fields("q", "a", "i"), "x") == Sample("Q", ("3",))


TURNS = OPENAI["messages"]
PICTURES = (Picture("a.png"), Picture("b.png"))
SHAREGPT_TURNS = [
    {"from": "system", "value": "One word."},
    {"from": "human", "value": "Which of\n<image>\nand\n<image>\nis red?"},
    {"from": "gpt", "value": "a"},
    {"from": "human", "value": "Sure?\nYes or no."},
    {"from": "gpt", "value": "yes"},
]


def parts(*texts):
    """Parts of a message as OpenAI writes them; None is an image whose path is in a field of its own."""
    images = {None: {"type": "image"}, "a.png": {"type": "image", "image": "a.png"}}
    images["b.png"] = {"type": "image_url", "image_url": {"url": "b.png"}}
    return [images.get(text, {"type": "text", "text": text}) for text in texts]


MESSAGES = [
    {"role": "system", "content": "One word."},
    {"role": "user", "content": parts("Which of", None, "and", None, "is red?")},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "Sure?\nYes or no."},
    {"role": "assistant", "content": "yes"},
]
INLINE = [
    MESSAGES[0],
    {"role": "user", "content": parts("Which of", "a.png", "and", "b.png", "is red?")},
    *MESSAGES[2:],
]


@pytest.mark.parametrize(
    "record",
    [
        {"images": ["a.png", "b.png"], "conversations": SHAREGPT_TURNS},
        {"images": [{"path": "a.png"}, {"path": "b.png"}], "messages": MESSAGES},
        {"messages": INLINE},
        {"images": ["a.png", "b.png"], "messages": MESSAGES[:-1], "answer": "yes"},
        {"image": ["a.png", "b.png"], "text": "Sure?\nYes or no.", "answer": "yes", "history": SHAREGPT_TURNS[:3]},
    ],
    ids=range(5),
)
def test_several_images_and_turns(record):
    """The system's text stays before several turns, and images stay in their places."""
    found, missing = guess_fields([record])
    assert missing == []
    question = "Which of\n<image>\nand\n<image>\nis red?"
    before = (("system", "One word."), ("human", question), ("gpt", "a"))
    assert read_sample(record, Fields(**found), "x") == Sample("Sure?\nYes or no.", ("yes",), PICTURES, before)


def test_several_images_of_one_question():
    """In columns; without places they come before the text."""
    fields = Fields("q", "a", "i", "format")
    record = {"q": "Which of <image> and <image> is red?", "a": "a", "i": ["a.png", "b.png"], "format": "One word."}
    sample = read_sample(record, fields, "x")
    assert sample == Sample("Which of <image> and <image> is red?\nOne word.", ("a",), PICTURES)
    assert sample.text == "Which of\nand\nis red?\nOne word."
    sample = read_sample({**record, "q": "Which is red?"}, fields, "x")
    assert sample == Sample("Which is red?\nOne word.", ("a",), PICTURES) and sample.text == sample.question


@pytest.mark.parametrize(
    ("record", "fields", "message"),
    [
        ({"q": None, "a": "x"}, Fields("q", "a"), "x: q must be a text, got None"),
        ({"q": "Q", "a": True}, Fields("q", "a"), "x: a must be a text, got True"),
        ({"q": "Q", "a": []}, Fields("q", "a"), "x: a must have an answer, got none"),
        ({"q": " <image> ", "a": "x", "i": "1"}, Fields("q", "a", "i"), "x: must hold a question"),
        ({"q": "<image>Q", "a": "x"}, Fields("q", "a"), r"once for each of 0 images, .* got 1 \(--image names"),
        ({"q": "<image>Q", "a": "x", "i": ["1", "2"]}, Fields("q", "a", "i"), "once for each of 2 images, .* got 1$"),
        ({"q": "Q", "a": "x", "videos": ["1.mp4"]}, Fields("q", "a"), "x: videos cannot be used, .*torchvision.*mp4"),
        ({"q": "Q", "a": "x", "audio": "1.wav"}, Fields("q", "a"), "x: audio cannot be used, as no model here hears"),
        ({"q": "Q", "a": "x", "i": 5}, Fields("q", "a", "i"), "i must be a path, bytes"),
        ({"messages": TURNS[:2]}, Fields("messages"), "x: has no answer"),
        ({"messages": [*TURNS, *TURNS[1:2]]}, Fields("messages"), "x: has no answer"),
        (
            {"messages": [*TURNS[1:2], *TURNS[1:]]},
            Fields("messages"),
            "must be of the user, then the assistant, and so on, .* got human, human, gpt",
        ),
        (
            {"messages": [*TURNS, *TURNS]},
            Fields("messages"),
            "after one turn of the system or none, got system, human, gpt, system, human, gpt",
        ),
        ({"messages": []}, Fields("messages"), "and so on, .* got no turn"),
        (
            {"messages": [*TURNS[:2], {"role": "assistant", "content": parts(None)}]},
            Fields("messages"),
            "must have images in the user's turns alone, got one of the assistant",
        ),
        (
            {"images": ["a", "b"], "messages": [*TURNS[1:], {"role": "user", "content": parts(None)}, TURNS[2]]},
            Fields("messages", image="images"),
            "x: must hold a question in each turn of the user",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, Fields("messages"), "must be turns of human, user"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]},
            Fields("messages"),
            r"must have parts of type text or image \(no video, as reading one needs torchvision: .*, got .*video",
        ),
    ],
)
def test_malformed_records_are_named(record, fields, message):
    with pytest.raises(ValueError, match=message):
        read_sample(record, fields, "x")
