"""The benchmark's files: what is read, and that what is wrong is named."""

from __future__ import annotations

import json
import re

import pytest

from smolora.data.format import (
    Conversation,
    Message,
    Question,
    ask,
    instruction_source,
    read_answers,
    read_conversations,
    read_json,
    read_questions,
)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def turns(human, answer="yes"):
    return [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]


def test_questions(tmp_path):
    records = [
        {"question_id": 3, "image": "a/b.jpg", "text": "what?\nBriefly.", "answer": "dog"},
        {"question_id": "q", "text": "no image", "answer": ["one", "two"], "more": 1},
        {"question_id": 4, "image": None, "text": "no answer"},
    ]
    assert read_questions(write(tmp_path / "val.json", records)) == [
        Question(0, 3, "what?\nBriefly.", "a/b.jpg", "dog"),
        Question(1, "q", "no image", None, ("one", "two")),
        Question(2, 4, "no answer", None, None),
    ]


@pytest.mark.parametrize(
    ("record", "match", "own_id"),
    [
        ("text", "record 1: must be an object, got 'text'", None),
        ({"text": "q"}, "record 1: question_id must be a number or a string, got None", None),
        ({"question_id": True, "text": "q"}, "question_id must be a number or a string, got True", None),
        ({"question_id": 1}, "record 1: text must be a string, got None", 1),
        (
            {"question_id": 1, "text": "q", "image": 3},
            "image must be a path or a list of paths, or .*, got 3",
            1,
        ),
        (
            {"question_id": 1, "text": "q", "image": ""},
            "image must be a path or a list of paths, or .*, got ''",
            1,
        ),
        ({"question_id": 1, "text": "q", "answer": []}, "answer must be a string or a list of strings", 1),
        ({"question_id": 1, "text": "q", "answer": [1]}, "answer must be a string or a list of strings", 1),
        ({"question_id": "0", "text": "q"}, "record 1: question_id 0 is that of record 0 too", None),
        ({"question_id": 7.0, "text": "q"}, "question_id must be .*, got 7.0, which is no whole number", None),
        ({"question_id": 1, "text": ""}, "record 1: text must hold a question, got ''", 1),
        ({"question_id": 1, "text": " \n\t"}, "record 1: text must hold a question", 1),
        ({"question_id": 1, "text": "<image>", "image": "a"}, "record 1: text must hold a question, got '<image>'", 1),
        ({"question_id": 1, "text": "<image>\n<image>", "image": "a"}, "text must hold a question", 1),
        ({"question_id": 1, "text": "USER: ASSISTANT:"}, "text must hold a question", 1),
        ({"question_id": 1, "text": "<image>\nq"}, "text has the place of an image, <image>, and there is no image", 1),
        ({"question_id": 1, "text": "a\ud800"}, r"record 1: text has half a character .*U\+D800 at position 1", 1),
        ({"question_id": 1, "text": "q", "answer": "\udfff"}, "record 1: answer has half a character", 1),
        ({"question_id": 1, "text": "q", "answer": ["a", "\udfff"]}, "answer has half a character", 1),
        ({"question_id": 1, "text": "q", "image": "\udfff.png"}, "image has half a character", 1),
        ({"question_id": "\ud800", "text": "q"}, "question_id has half a character", None),
    ],
)
def test_broken_questions_are_named_or_listed(tmp_path, record, match, own_id):
    path = write(tmp_path / "val.json", [{"question_id": 0, "text": "q"}, record, {"question_id": 2, "text": "q"}])
    with pytest.raises(ValueError, match=match):
        read_questions(path)
    broken = []
    assert [question.index for question in read_questions(path, broken=broken)] == [0, 2]
    assert [(b.index, b.question_id) for b in broken] == [(1, own_id)] and str(path) in broken[0].reason
    assert [question.index for question in read_questions(path, skip={1})] == [0, 2]


def test_a_key_given_twice_is_named_by_its_record(tmp_path):
    path = write(
        tmp_path / "val.json", '[{"question_id": 0, "text": "q"}, {"question_id": 1, "text": "a", "text": "b"}]'
    )
    with pytest.raises(ValueError, match=r"val\.json: record 1: 'text' is given twice"):
        read_questions(path)
    broken = []
    assert len(read_questions(path, broken=broken)) == 1 and "record 1: 'text' is given twice" in broken[0].reason
    turn = '{"from": "human", "value": "a", "value": "b"}, {"from": "gpt", "value": "c"}'
    with pytest.raises(ValueError, match=r"record 0: 'value' is given twice"):
        read_conversations(write(tmp_path / "train.json", '[{"conversations": [' + turn + "]}]"))
    with pytest.raises(ValueError, match=r"line 2: 'text' is given twice"):
        read_answers(
            write(tmp_path / "a.jsonl", '{"question_id": 1, "text": "a"}\n{"question_id": 2, "text": "a", "text": "b"}')
        )
    with pytest.raises(ValueError, match=r"x\.json: not JSON: an object gives 'a' twice"):
        read_json(write(tmp_path / "x.json", '{"b": {"a": 1, "a": 2}}'))


@pytest.mark.parametrize(
    ("text", "image", "expected"),
    [
        ("<image>\nwhat?\nBriefly.", "a.jpg", "what?\nBriefly."),  # as LLaVA's own question files have it
        ("<image>what?", "a.jpg", "what?"),
        ("what?\n<image>", "a.jpg", "what?"),
        ("<image>\nIs it <image> or <img>?", "a.jpg", "Is it <image> or <img>?"),
        ("Is it <image> or <img>?", "a.jpg", "Is it <image> or <img>?"),
        ("Is it <image> or <img>?", None, "Is it <image> or <img>?"),
        ("<image> is what?", None, "<image> is what?"),
        ("  what? ", "a.jpg", "  what? "),
    ],
)
def test_where_the_image_is_and_where_it_is_spelled(tmp_path, text, image, expected):
    (question,) = read_questions(write(tmp_path / "val.json", [{"question_id": 1, "text": text, "image": image}]))
    assert (question.text, question.image) == (expected, image)


@pytest.mark.parametrize(
    ("human", "image", "expected"),
    [
        ("<image>\nIs it <image> or <img>?", "a", "Is it <image> or <img>?"),
        ("Is it <image> or <img>?\n<image>", "a", "Is it <image> or <img>?"),
        ("See <image> here.\nBriefly.", "a", "See\nhere.\nBriefly."),  # one alone is the image's, wherever it is
        ("Is it <image> or <img>?", None, "Is it <image> or <img>?"),
    ],
)
def test_where_the_image_of_a_conversation_is(tmp_path, human, image, expected):
    record = {"conversations": turns(human, "It is <image>.</s>"), "image": image}
    (sample,) = read_conversations(write(tmp_path / "train.json", [record]))
    assert (sample.text, sample.answer, sample.image) == (expected, "It is <image>.</s>", image)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark(tmp_path, encoding):
    for name, content, read in (
        ("test.json", json.dumps([{"question_id": 1, "text": "é"}], ensure_ascii=False), read_questions),
        ("train.json", json.dumps([{"conversations": turns("é")}], ensure_ascii=False), read_conversations),
        ("a.jsonl", '{"question_id": 1, "text": "é"}\r\n', read_answers),
    ):
        (tmp_path / name).write_bytes(content.encode(encoding))
        assert [record.text for record in read(tmp_path / name)] == ["é"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252"])
def test_another_encoding_is_named(tmp_path, encoding):
    for name, content, read in (
        ("test.json", json.dumps([{"question_id": 1, "text": "é"}], ensure_ascii=False), read_questions),
        ("a.jsonl", '{"question_id": 1, "text": "é"}\n', read_answers),
    ):
        (tmp_path / name).write_bytes(content.encode(encoding))
        with pytest.raises(ValueError, match=rf"{re.escape(name)}.*not JSON: must be UTF-8, got (UTF|the byte 0xe9)"):
            read(tmp_path / name)


@pytest.mark.parametrize("content", ["[]", "", "{}", "[null]", "null", "[[]]", "3"])
def test_files_without_records(tmp_path, content):
    """An empty list has none; what else is no list of records is named."""
    path = write(tmp_path / "test.json", content)
    for read in (read_questions, read_conversations):
        if content == "[]":
            assert read(path) == []
        else:
            with pytest.raises(
                ValueError, match=r"test\.json: (not JSON|must hold a list of records|record 0: must be)"
            ):
                read(path)


def test_conversations(tmp_path):
    records = [
        {"image": "a.jpg", "conversations": turns("<image>\nwhat?\nBriefly.", "dog")},
        {"image": "a.jpg", "conversations": turns("what?\n<image>", "dog")},
        {"conversations": turns("what?", "dog")},
    ]
    assert read_conversations(write(tmp_path / "train.json", records)) == [
        Conversation(0, "what?\nBriefly.", "dog", "a.jpg"),
        Conversation(1, "what?", "dog", "a.jpg"),
        Conversation(2, "what?", "dog", None),
    ]


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({}, "record 0: conversations must be a list of 2 turns or more, got None"),
        ({"conversations": turns("q")[:1]}, "conversations must be a list of 2 turns or more"),
        ({"conversations": turns("q")[::-1]}, r"must be from 'human', then 'gpt', .*, got \['gpt', 'human'\]"),
        ({"conversations": turns("<image>\nq")}, "<image> must occur once with an image and never without, got 1"),
        ({"conversations": turns("q"), "image": "a"}, "got 0 with image 'a'"),
        ({"conversations": turns("q", None)}, "value must be a string, got None"),
        ({"conversations": turns("q", "\ud800")}, "record 0: value has half a character"),
        ({"conversations": turns("")}, "record 0: the human turn must hold a question, got ''"),
        ({"conversations": turns("<image>"), "image": "a"}, "the human turn must hold a question, got '<image>'"),
        ({"conversations": turns("a <image> b <image>"), "image": "a"}, "got 2 with image 'a'"),
        ({"conversations": turns("q\n<image>")}, "never without, got 1 with image None"),
    ],
)
def test_broken_conversations_are_named(tmp_path, record, match):
    path = write(tmp_path / "train.json", [record])
    with pytest.raises(ValueError, match=match) as error:
        read_conversations(path)
    assert str(path) in str(error.value)


SYSTEM = {"from": "system", "value": "Be short."}


def test_several_turns_and_images(tmp_path):
    records = [
        {"image": ["a", "b"], "conversations": turns("one <image> two <image>\nwhich?", "a")},
        {"image": ["a", "b"], "conversations": turns("which?", "a")},
        {"image": "a", "conversations": [SYSTEM, *turns("<image>\nwhat?", "dog"), *turns("sure?\nBriefly.", "yes")]},
        {"conversations": [SYSTEM, *turns("what?", "<image> is text")]},
    ]
    first, second, third, fourth = read_conversations(write(tmp_path / "train.json", records))
    assert first.messages == (Message("user", ("one", None, "two", None, "which?")), Message("assistant", ("a",)))
    assert (first.images, first.image, first.text, first.answer) == (("a", "b"), "a", "one\ntwo\nwhich?", "a")
    assert second.messages[0] == Message("user", (None, None, "which?"))
    assert third.messages == (
        Message("system", ("Be short.",)),
        ask("what?", True),
        Message("assistant", ("dog",)),
        ask("sure?\nBriefly."),
        Message("assistant", ("yes",)),
    )
    assert (third.images, third.text, third.answer) == (("a",), "sure?\nBriefly.", "yes")
    assert fourth.images == () and fourth.messages[2].text == "<image> is text"
    assert [instruction_source(r, "system") for r in (third, fourth)] == ["Be short."] * 2
    assert instruction_source(third, "user") == "sure?\nBriefly."
    with pytest.raises(ValueError, match="record 0 must have a system message"):
        instruction_source(first, "system")


def test_turns_before_a_question(tmp_path):
    before = [SYSTEM, *turns("<image>\nwhat?", "dog")]
    records = [
        {"question_id": 1, "image": "a", "text": "sure?", "history": before, "answer": "yes"},
        {"question_id": 2, "image": ["a", "b"], "text": "which?"},
    ]
    first, second = read_questions(write(tmp_path / "val.json", records))
    assert [message.role for message in first.messages] == ["system", "user", "assistant", "user"]
    assert (first.text, first.images, first.messages[3]) == ("sure?", ("a",), ask("sure?"))
    assert second.messages == (Message("user", (None, None, "which?")),) and second.images == ("a", "b")


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"conversations": [*turns("q"), *turns("q")[:1]]}, "must be from 'human', then 'gpt'"),
        ({"conversations": [*turns("q"), SYSTEM]}, "must be from 'human', then 'gpt'"),
        ({"conversations": [SYSTEM, SYSTEM]}, "must be from 'human', then 'gpt'"),
        ({"conversations": turns("<image> q"), "image": ["a", "b"]}, "once for each of 2 images, or not at all, got 1"),
        ({"conversations": turns("q") + turns("<image> q")}, "once for each of 0 images, or not at all, got 1"),
        ({"conversations": turns("q") + turns(" ")}, "each human turn must hold a question, got ' '"),
        ({"conversations": turns("q"), "image": ["a", 1]}, "image must be a path or a list of paths"),
        ({"conversations": turns("q"), "video": "a.mp4"}, "a video cannot be used, as reading one needs torchvision"),
    ],
)
def test_broken_dialogues_are_named(tmp_path, record, match):
    with pytest.raises(ValueError, match=f"record 0: .*{match}"):
        read_conversations(write(tmp_path / "train.json", [record]))


def test_answers_skip_blank_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question_id": 1, "text": "a"}\n\n{"question_id": 2, "text": "b"}\n')
    assert [(answer.line, answer.text) for answer in read_answers(path)] == [(1, "a"), (3, "b")]


@pytest.mark.parametrize("content", ["", "[1,", "[NaN]", "[-Infinity]", "\udcff", "[" * 100_000])
def test_no_json(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"x\.json: not JSON"):
        read_json(path)
