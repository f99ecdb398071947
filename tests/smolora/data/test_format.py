"""The benchmark's files: what is read, and that what is wrong is named."""

from __future__ import annotations

import json

import pytest

from smolora.data.format import Conversation, Question, read_answers, read_conversations, read_json, read_questions


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
        ({"question_id": 1, "text": "q", "image": 3}, "image must be a path, or be left out, got 3", 1),
        ({"question_id": 1, "text": "q", "image": ""}, "image must be a path, or be left out, got ''", 1),
        ({"question_id": 1, "text": "q", "answer": []}, "answer must be a string or a list of strings", 1),
        ({"question_id": 1, "text": "q", "answer": [1]}, "answer must be a string or a list of strings", 1),
        ({"question_id": "0", "text": "q"}, "record 1: question_id 0 is that of record 0 too", None),
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
        ({}, "record 0: conversations must be a list of two turns, got None"),
        ({"conversations": turns("q")[:1]}, "conversations must be a list of two turns"),
        ({"conversations": turns("q")[::-1]}, r"must be from 'human', then 'gpt', got \['gpt', 'human'\]"),
        ({"conversations": turns("<image>\nq")}, "<image> must occur once with an image and never without, got 1"),
        ({"conversations": turns("q"), "image": "a"}, "got 0 with image 'a'"),
        ({"conversations": turns("q", None)}, "value must be a string, got None"),
    ],
)
def test_broken_conversations_are_named(tmp_path, record, match):
    path = write(tmp_path / "train.json", [record])
    with pytest.raises(ValueError, match=match) as error:
        read_conversations(path)
    assert str(path) in str(error.value)


def test_answers_skip_blank_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question_id": 1, "text": "a"}\n\n{"question_id": 2, "text": "b"}\n')
    assert [(answer.line, answer.text) for answer in read_answers(path)] == [(1, "a"), (3, "b")]


@pytest.mark.parametrize("content", ["", "[1,", "[NaN]", "[-Infinity]", "\udcff"])
def test_no_json(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"x\.json: not JSON"):
        read_json(path)
