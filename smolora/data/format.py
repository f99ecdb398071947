"""The benchmark's released file formats: questions, training conversations and answers.

Errors name the file and the record: the index in a JSON list (from 0), or the line of a JSON-lines file (from 1).

`<image>` at the head of a record's text, or as its last line, is the place of its image. Anywhere else it is text, and
so are `</s>`, `<s>` and all other special tokens. Where a record has several images or turns, every `<image>` in what
the user says is the place of one.

    train.json   {"image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}
    test.json    {"question_id", "image", "text", "answer"}, with the turns before the question in "history"

Both may begin with a turn from "system", and "image" is a path, a list of paths, or left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..instructions.texts import IMAGE_TOKEN
from ..io.files import decode, surrogate


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


class _DuplicateKey(dict):
    """A JSON object that gives a key twice; other readers silently take the last value."""

    key: str


def _mark_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        content = _DuplicateKey(content)
        names = [name for name, _ in pairs]
        content.key = next(name for name in names if names.count(name) > 1)
    return content


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = _mark_duplicates(pairs)
    if isinstance(content, _DuplicateKey):
        raise ValueError(f"an object gives {content.key!r} twice")
    return content


# Python's own decoder accepts NaN and Infinity. In records, duplicates are only marked: the error names the record.
_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_refuse_duplicates)
_RECORDS = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_mark_duplicates)


class Message(NamedTuple):
    """A turn of a conversation: its role ("system", "user" or "assistant"), and its texts, with None for an image."""

    role: str
    parts: tuple[str | None, ...]

    @property
    def text(self) -> str:
        """Its text without images, those parts in lines of their own."""
        return "\n".join(part for part in self.parts if part is not None)


class Dialogue(NamedTuple):
    """A whole conversation, and the images of its messages in order."""

    messages: tuple[Message, ...]
    images: tuple[str, ...]


class Question(NamedTuple):
    """A record of a test file: `{"question_id", "image", "text": "question\\ninstruction", "answer"}`.

    "image" may be a list of several, and "history" may hold the turns before the question.
    """

    index: int  # type: ignore[assignment]  # in the file
    question_id: int | str
    text: str
    image: str | None = None  # the first one
    answer: str | tuple[str, ...] | None = None  # several references, one, or none in the file
    dialogue: Dialogue | None = None  # where there is more than a question about an image or none

    @property
    def images(self) -> tuple[str, ...]:
        """Its images in order."""
        return _images(self)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation up to the question."""
        return (ask(self.text, self.image is not None),) if self.dialogue is None else self.dialogue.messages


class Conversation(NamedTuple):
    """A record of a training file: a question, with or without an image, and its answer; or several turns.

    Of several turns, `text` and `answer` are the last ones.
    """

    index: int  # type: ignore[assignment]
    text: str  # without the image token
    answer: str
    image: str | None = None  # the first one
    dialogue: Dialogue | None = None  # where there is more than a question about an image or none

    @property
    def images(self) -> tuple[str, ...]:
        """Its images in order."""
        return _images(self)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The whole conversation."""
        if self.dialogue is not None:
            return self.dialogue.messages
        return ask(self.text, self.image is not None), Message("assistant", (self.answer,))


def ask(text: str, image: bool = False) -> Message:
    """The user's message with a question, after its image if it has one."""
    return Message("user", (None, text) if image else (text,))


def instruction_source(record: Question | Conversation, where: str) -> str:
    """Return the text of a record that its instruction is in.

    Args:
        record: the record.
        where: "system" for its system message, anything else for the last question.

    Raises:
        ValueError: it has no system message.
    """
    if where != "system":
        return record.text
    first = record.messages[0]
    if first.role != "system":
        raise ValueError(
            f"record {record.index} must have a system message, in which instructions.where 'system' finds its "
            "instruction, got none"
        )
    return first.text


def _images(record: Question | Conversation) -> tuple[str, ...]:
    if record.dialogue is not None:
        return record.dialogue.images
    return () if record.image is None else (record.image,)


class Skipped(NamedTuple):
    """A record of a test file that could not be asked."""

    index: int  # type: ignore[assignment]
    question_id: int | str | None  # None: it is unreadable, or another record has it
    reason: str


class Answer(NamedTuple):
    """A line of an answers file."""

    line: int
    question_id: int | str
    text: str


def read_json(path: Path) -> Any:
    """Read a JSON file strictly, without NaN, Infinity and duplicate keys.

    Raises:
        ValueError: the file is not JSON; the message names file, line and column.
        OSError: it cannot be read.
    """
    return _decoded(path.read_bytes(), _DECODER, str(path))


def _decoded(content: bytes, decoder: json.JSONDecoder, where: str) -> Any:
    try:
        return decoder.decode(decode(content))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def read_questions(
    path: Path, *, skip: Collection[int] = (), broken: list[Skipped] | None = None, unique: bool = True
) -> list[Question]:
    """Read the questions of a test file (`test.json` or `val.json`).

    Args:
        path: the file.
        skip: indices of records to skip.
        broken: malformed records are appended here and skipped, instead of raising.
        unique: refuse a question id that occurs twice.

    Raises:
        ValueError: a record is malformed, or has the question id of an earlier one (with `unique`).
    """
    questions = []
    seen: dict[str, int] = {}  # the record of each question_id
    for index, record in _records(path):
        if index in skip:
            continue
        try:
            question = _question(index, record, f"{path}: record {index}")
            name = str(question.question_id)
            if unique and name in seen:
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
    """Return the question id of a malformed record, if it is readable and no earlier record has it."""
    try:
        question_id = _question_id(_object(record, ""), "")
    except ValueError:
        return None
    return None if str(question_id) in seen else question_id


def _question(index: int, record: Any, where: str) -> Question:
    record = _object(record, where)
    question_id, images, text = _question_id(record, where), _paths(record, where), _text(record, "text", where)
    before = record.get("history")
    if before or len(images) > 1:
        dialogue = _dialogue(_turns(before, where, "history", least=1) if before else [], text, images, where)
        question = dialogue.messages[-1].text
        return Question(index, question_id, question, next(iter(images), None), _references(record, where), dialogue)
    image = next(iter(images), None)
    text, places = _strip_image(text, image is not None)
    if places and image is None:
        raise ValueError(f"{where}: text has the place of an image, {IMAGE_TOKEN}, and there is no image")
    if not _has_instruction(text):
        raise ValueError(f"{where}: text must hold a question, got {_shorten(record['text'])}")
    return Question(index, question_id, text, image, _references(record, where))


def _has_instruction(text: str) -> bool:
    """Return whether a text has more than images and turn markers, so that it has an instruction."""
    return re.sub(f"{IMAGE_TOKEN}|USER:|ASSISTANT:", "", text).strip() != ""


def _strip_image(text: str, image: bool) -> tuple[str, int]:
    """Remove the image token from a text; returns the text, and 1 if it had the token, else 0."""
    shown = text.strip()
    if shown.startswith(IMAGE_TOKEN if image else f"{IMAGE_TOKEN}\n") or shown == IMAGE_TOKEN:
        return shown.removeprefix(IMAGE_TOKEN).strip(), 1
    if shown.endswith(f"\n{IMAGE_TOKEN}"):
        return shown.removesuffix(IMAGE_TOKEN).strip(), 1
    return text, 0


def read_conversations(path: Path) -> list[Conversation]:
    """Read the samples of a training file (`train.json`): a human turn, then the answer, or several of both.

    Raises:
        ValueError: a record is malformed.
    """
    samples = []
    for index, record in _records(path):
        where = f"{path}: record {index}"
        record = _object(record, where)
        images = _paths(record, where)
        *earlier, (_, value), (_, answer) = _turns(record.get("conversations"), where, "conversations")
        image = next(iter(images), None)
        if earlier or len(images) > 1:
            dialogue = _dialogue(earlier, value, images, where)
            messages = (*dialogue.messages, Message("assistant", (answer,)))
            text = dialogue.messages[-1].text
            samples.append(Conversation(index, text, answer, image, dialogue._replace(messages=messages)))
            continue
        text, places = _strip_image(value, image is not None)
        tokens = value.count(IMAGE_TOKEN)
        if not places and tokens == 1 and image is not None:  # within a line; the released code accepts it there
            before, _, after = value.partition(IMAGE_TOKEN)
            text, places = (before.strip() + "\n" + after.strip()).strip(), 1
        if places != (image is not None):
            raise ValueError(
                f"{where}: {IMAGE_TOKEN} must occur once with an image and never without, got {tokens} with image "
                f"{image!r} (others are text where the first line or the last is the image's)"
            )
        if not _has_instruction(text):
            raise ValueError(f"{where}: the human turn must hold a question, got {_shorten(value)}")
        samples.append(Conversation(index, text, answer, image))
    return samples


def _turns(turns: Any, where: str, key: str, least: int = 2) -> list[tuple[str, str]]:
    """Read at least so many turns of 'human' and 'gpt', in turn, with one of 'system' before them or none.

    Returns:
        Who speaks in each, and the text.
    """
    if not isinstance(turns, list) or len(turns) < least or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: {key} must be a list of {least} turns or more, got {_shorten(turns)}")
    speakers = [turn.get("from") for turn in turns]
    own = speakers[speakers[:1] == ["system"] :]
    if own != ["human", "gpt"] * (len(own) // 2):
        raise ValueError(
            f"{where}: {key} must be from 'human', then 'gpt', and so on, after one turn from 'system' or "
            f"none, got {speakers}"
        )
    return [(str(turn["from"]), _text(_object(turn, where), "value", where)) for turn in turns]


def _dialogue(before: list[tuple[str, str]], question: str, images: tuple[str, ...], where: str) -> Dialogue:
    """The conversation up to a question. `<image>` is the place of an image; without any they come first."""
    asked = [text for speaker, text in (*before, ("human", question)) if speaker == "human"]
    places = sum(text.count(IMAGE_TOKEN) for text in asked)
    if places not in (0, len(images)):
        raise ValueError(
            f"{where}: {IMAGE_TOKEN} must occur once for each of {len(images)} images, or not at all, got {places}"
        )
    messages: list[Message] = []
    left = [None] * (len(images) - places)
    for speaker, text in (*before, ("human", question)):
        if speaker != "human":
            messages.append(Message("system" if speaker == "system" else "assistant", (text,)))
            continue
        parts: list[str | None] = [*left]
        for number, piece in enumerate(text.split(IMAGE_TOKEN)):
            parts += [None] * (number > 0) + [piece.strip()] * bool(piece.strip())
        if not any(parts):
            raise ValueError(f"{where}: each human turn must hold a question, got {_shorten(text)}")
        messages.append(Message("user", tuple(parts)))
        left = []
    return Dialogue(tuple(messages), images)


def read_answers(path: Path, *, unique: bool = True) -> list[Answer]:
    """Read `question_id` and `text` of each line of the evaluator's JSON-lines file.

    Args:
        path: the file.
        unique: refuse a second answer to a question.

    Raises:
        ValueError: a line is malformed, or answers a question that an earlier line answers (with `unique`).
    """
    answers = []
    seen: dict[str, int] = {}  # the line of each question_id
    for line, record in read_lines(path):
        where = f"{path}: line {line}"
        question_id = _question_id(record, where)
        if unique and str(question_id) in seen:
            raise ValueError(f"{where}: question_id {question_id!r} is answered in line {seen[str(question_id)]} too")
        seen[str(question_id)] = line
        answers.append(Answer(line, question_id, _text(record, "text", where)))
    return answers


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSON-lines file with their line numbers; blank lines are skipped."""
    with path.open("rb") as file:
        for line, content in enumerate(file, 1):
            if content.strip():
                where = f"{path}: line {line}"
                yield line, _object(_decoded(content, _RECORDS, where), where)


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    content = _decoded(path.read_bytes(), _RECORDS, str(path))
    if not isinstance(content, list):
        raise ValueError(f"{path}: must hold a list of records, got {_shorten(content)}")
    yield from enumerate(content)


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be an object, got {_shorten(record)}")
    if isinstance(record, _DuplicateKey):
        raise ValueError(f"{where}: {record.key!r} is given twice")
    return record


def _question_id(record: dict[str, Any], where: str) -> int | str:
    value = record.get("question_id")
    if not isinstance(value, (int, str)) or isinstance(value, bool):
        whole = ", which is no whole number" if isinstance(value, float) else ""
        raise ValueError(f"{where}: question_id must be a number or a string, got {_shorten(value)}{whole}")
    if isinstance(value, str):
        _check_unicode(value, "question_id", where)
    return value


def _check_unicode(text: str, key: str, where: str) -> str:
    """Return a text unless it has a lone surrogate."""
    fault = surrogate(text)
    if fault is not None:
        raise ValueError(f"{where}: {key} has {fault}")
    return text


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be a string, got {_shorten(value)}")
    return _check_unicode(value, key, where)


def _paths(record: dict[str, Any], where: str) -> tuple[str, ...]:
    """The paths of a record's images."""
    if record.get("video") is not None:
        raise ValueError(
            f"{where}: a video cannot be used, as reading one needs torchvision: give its frames as a list in image"
        )
    value = record.get("image")
    if value is None:
        return ()
    paths = value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"{where}: image must be a path or a list of paths, or be left out, got {_shorten(value)}")
    return tuple(_check_unicode(path, "image", where) for path in paths)


def _references(record: dict[str, Any], where: str) -> str | tuple[str, ...] | None:
    value = record.get("answer")
    if value is None or isinstance(value, str):
        return value and _check_unicode(value, "answer", where)
    if not isinstance(value, list) or not value or not all(isinstance(reference, str) for reference in value):
        raise ValueError(f"{where}: answer must be a string or a list of strings, got {_shorten(value)}")
    return tuple(_check_unicode(reference, "answer", where) for reference in value)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
