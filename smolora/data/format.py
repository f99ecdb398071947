"""The benchmark's files as released: questions, training conversations and answers.

Every error names the file and the record: its index in a JSON list (from 0), its line in a JSON-lines file (from 1).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

IMAGE_TOKEN = "<image>"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)  # Python's own reads NaN and Infinity


class Question(NamedTuple):
    """A record of a test file: `{"question_id", "image", "text": "question\\ninstruction", "answer"}`."""

    index: int  # its place in the file
    question_id: int | str
    text: str
    image: str | None = None
    answer: str | tuple[str, ...] | None = None  # several references, one, or none in the file


class Conversation(NamedTuple):
    """A record of a training file: one question about at most one image, and its answer."""

    index: int
    text: str  # without the image token
    answer: str
    image: str | None = None


class Skipped(NamedTuple):
    """A record of a test file that could not be asked."""

    index: int
    question_id: int | str | None  # None: it has none that could be read, or another record's
    reason: str


class Answer(NamedTuple):
    """A line of an answers file."""

    line: int
    question_id: int | str
    text: str


def read_json(path: Path) -> Any:
    """The content of a JSON file; NaN and Infinity, which are not JSON, are refused.

    Raises:
        ValueError: the file holds no JSON; the message names file, line and column.
        OSError: it cannot be read.
    """
    try:
        return _DECODER.decode(path.read_text(encoding="utf-8"))
    except ValueError as error:  # a UnicodeDecodeError is one too
        raise ValueError(f"{path}: not JSON: {error}") from error


def read_questions(path: Path, *, skip: Collection[int] = (), broken: list[Skipped] | None = None) -> list[Question]:
    """The questions of a test file (`test.json` or `val.json`).

    Args:
        path: the file.
        skip: indices of records to pass over.
        broken: what is malformed is put here and passed over, instead of being an error.

    Raises:
        ValueError: a record is malformed or its question id occurred before; file and index are named.
    """
    questions, seen = [], {}
    for index, record in _records(path):
        if index in skip:
            continue
        try:
            question = _question(index, record, f"{path}: record {index}")
            name = str(question.question_id)
            if name in seen:
                raise ValueError(f"{path}: record {index}: question_id {name} is that of record {seen[name]} too")
        except ValueError as error:
            if broken is None:
                raise
            broken.append(Skipped(index, _own_id(record, seen), str(error)))
            continue
        seen[name] = index
        questions.append(question)
    return questions


def _own_id(record: Any, seen: Collection[str]) -> int | str | None:
    """The question id of a malformed record, if it has one and no record before it has the same."""
    try:
        question_id = _question_id(_object(record, ""), "")
    except ValueError:
        return None
    return None if str(question_id) in seen else question_id


def _question(index: int, record: Any, where: str) -> Question:
    record = _object(record, where)
    return Question(
        index,
        _question_id(record, where),
        _text(record, "text", where),
        _image(record, where),
        _references(record, where),
    )


def read_conversations(path: Path) -> list[Conversation]:
    """The samples of a training file (`train.json`): a human turn, then the answer.

    Raises:
        ValueError: a record is malformed; file and index are named.
    """
    samples = []
    for index, record in _records(path):
        where = f"{path}: record {index}"
        record = _object(record, where)
        image = _image(record, where)
        turns = record.get("conversations")
        if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"{where}: conversations must be a list of two turns, got {_short(turns)}")
        if [turn.get("from") for turn in turns] != ["human", "gpt"]:
            raise ValueError(
                f"{where}: conversations must be from 'human', then 'gpt', got {[turn.get('from') for turn in turns]}"
            )
        text, answer = (_text(turn, "value", where) for turn in turns)
        tokens = text.count(IMAGE_TOKEN)
        if tokens != (image is not None):
            raise ValueError(
                f"{where}: {IMAGE_TOKEN} must occur once with an image and never without, "
                f"got {tokens} with image {image!r}"
            )
        if tokens:
            before, _, after = text.partition(IMAGE_TOKEN)
            text = (before.strip() + "\n" + after.strip()).strip()
        samples.append(Conversation(index, text, answer, image))
    return samples


def read_answers(path: Path) -> list[Answer]:
    """The answers of a JSON-lines file as the evaluator writes it: `question_id` and `text` of each line.

    Raises:
        ValueError: a line is malformed or answers a question that an earlier one answers; file and line are named.
    """
    answers, seen = [], {}
    for line, record in read_lines(path):
        where = f"{path}: line {line}"
        question_id = _question_id(record, where)
        if str(question_id) in seen:
            raise ValueError(f"{where}: question_id {question_id!r} is answered in line {seen[str(question_id)]} too")
        seen[str(question_id)] = line
        answers.append(Answer(line, question_id, _text(record, "text", where)))
    return answers


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file with their line numbers; blank lines are passed over."""
    with path.open("rb") as file:
        for line, content in enumerate(file, 1):
            if not content.strip():
                continue
            try:
                record = _DECODER.decode(content.decode())
            except ValueError as error:  # a UnicodeDecodeError is one too
                raise ValueError(f"{path}: line {line}: not JSON: {error}") from error
            yield line, _object(record, f"{path}: line {line}")


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    content = read_json(path)
    if not isinstance(content, list):
        raise ValueError(f"{path}: must hold a list of records, got {_short(content)}")
    yield from enumerate(content)


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be an object, got {_short(record)}")
    return record


def _question_id(record: dict[str, Any], where: str) -> int | str:
    value = record.get("question_id")
    if not isinstance(value, (int, str)) or isinstance(value, bool):
        raise ValueError(f"{where}: question_id must be a number or a string, got {_short(value)}")
    return value


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be a string, got {_short(value)}")
    return value


def _image(record: dict[str, Any], where: str) -> str | None:
    value = record.get("image")
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(f"{where}: image must be a path, or be left out, got {_short(value)}")
    return value


def _references(record: dict[str, Any], where: str) -> str | tuple[str, ...] | None:
    value = record.get("answer")
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or not all(isinstance(reference, str) for reference in value):
        raise ValueError(f"{where}: answer must be a string or a list of strings, got {_short(value)}")
    return tuple(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
