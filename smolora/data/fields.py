"""What the fields of a record mean: image, question, answer, instruction, in conversations or in columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..instructions.texts import IMAGE_TOKEN
from .tables import Record

CONVERSATIONS = ("conversations", "messages", "conversation")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
NAMES = {  # the names that people give to a field, the usual first
    "image": ("image", "images", "image_path", "image_file", "file_name", "filename", "img", "picture", "path"),
    "question": ("question", "text", "query", "prompt", "problem", "input", "instruction"),
    "answer": ("answer", "answers", "label", "response", "output", "target", "caption", "captions", "solution"),
    "instruction": ("instruction", "format", "system"),
    "id": ("question_id", "id", "qid", "uid"),
}


class Fields(NamedTuple):
    """The names of the fields that samples are read from; None for one that there is not.

    Of records with conversations, `question` is the field with the turns, and `answer` is None or a field of its own.
    """

    question: str
    answer: str | None = None
    image: str | None = None
    instruction: str | None = None


class Picture(NamedTuple):
    """An image of a record: a path, or the bytes of a file with the path that they were read from, if it is known."""

    path: str | None
    content: bytes | None = None


class Sample(NamedTuple):
    """A question about an image or none, and its answers."""

    question: str  # with its instruction as the last line, without the image token
    answers: tuple[str, ...]
    picture: Picture | None


def guess_fields(records: Sequence[Record], given: dict[str, str] | None = None) -> tuple[dict[str, str], list[str]]:
    """Find the fields by their names and content.

    Args:
        records: some records of a table.
        given: fields that are known, by what they are.

    Returns:
        The fields by what they are ("question", "answer", "image", "instruction"), and those of "question" and "answer"
        that were not found.

    Raises:
        ValueError: a given field is in none of the records.
    """
    known = list(dict.fromkeys(name for record in records for name in record))
    found = dict(given or {})
    for kind, name in found.items():
        if name not in known:
            raise ValueError(f"{kind} must be a field of the records, {', '.join(known)}, got {name!r}")
    turns = next((name for name in CONVERSATIONS if name in known), None)
    if turns is not None:
        found.setdefault("question", turns)
    lower = {name.lower(): name for name in known}
    for kind in ("question", "answer", "image", "instruction"):
        for name in NAMES[kind]:
            if kind not in found and name in lower and lower[name] not in found.values():
                found[kind] = lower[name]
    needed = ["question", "answer"]
    if found.get("question") in CONVERSATIONS:
        own = set(given or {})
        if all(_has_answer(record.get(found["question"])) for record in records):
            needed, own = ["question"], own | {"question", "image"}
        else:
            own |= {"question", "image", "answer"}
        found = {kind: name for kind, name in found.items() if kind in own}
    return found, [kind for kind in needed if kind not in found]


def _has_answer(turns: Any) -> bool:
    return isinstance(turns, list) and any(
        isinstance(turn, dict) and ROLES.get(str(turn.get("from", turn.get("role")))) == "assistant" for turn in turns
    )


def read_sample(record: Record, fields: Fields, where: str) -> Sample:
    """Read a record.

    Args:
        record: the record.
        fields: its fields.
        where: file and record, for errors.

    Raises:
        ValueError: a field is missing or has another form, there are several images, or a conversation has more
            than one question and its answer.
    """
    pictures = [] if fields.image is None else _pictures(record.get(fields.image), f"{where}: {fields.image}")
    content = record.get(fields.question)
    if isinstance(content, list):
        parts, answers, inside = _conversation(content, f"{where}: {fields.question}")
        pictures = pictures or inside
    else:
        parts, answers = [_text(content, f"{where}: {fields.question}")], ()
    if fields.answer is not None:
        answers = _answers(record.get(fields.answer), f"{where}: {fields.answer}")
    if not answers:
        raise ValueError(f"{where}: has no answer")
    if fields.instruction is not None:
        parts.append(_text(record.get(fields.instruction), f"{where}: {fields.instruction}"))
    if len(pictures) > 1:
        raise ValueError(f"{where}: a sample has one image or none, got {len(pictures)}")
    question = "\n".join(part for part in (part.replace(IMAGE_TOKEN, "").strip() for part in parts) if part)
    if not question:
        raise ValueError(f"{where}: must hold a question")
    return Sample(question, answers, pictures[0] if pictures else None)


def _text(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where} must be a text, got {value!r:.80}")
    return str(value)


def _answers(value: Any, where: str) -> tuple[str, ...]:
    """One answer or several; annotators' answers may be objects with an `answer`."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"{where} must have an answer, got none")
    return tuple(_text(one["answer"] if isinstance(one, dict) and "answer" in one else one, where) for one in values)


def _pictures(value: Any, where: str) -> list[Picture]:
    if value is None or value == "" or value == []:
        return []
    if isinstance(value, list):
        return [picture for one in value for picture in _pictures(one, where)]
    if isinstance(value, str):
        return [Picture(value)]
    if isinstance(value, bytes):
        return [Picture(None, value)]
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):  # the Image feature of datasets
        return [Picture(value.get("path"), value["bytes"])]
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return [Picture(value["path"])]
    raise ValueError(f"{where} must be a path, bytes, or a list of one, got {value!r:.80}")


def _conversation(turns: list[Any], where: str) -> tuple[list[str], tuple[str, ...], list[Picture]]:
    """The question and what the system says after it, the answer, and the images that stand in the turns."""
    texts: dict[str, list[str]] = {"system": [], "user": [], "assistant": []}
    pictures: list[Picture] = []
    for turn in turns:
        role = ROLES.get(str(turn.get("from", turn.get("role")))) if isinstance(turn, dict) else None
        if role is None:
            raise ValueError(f"{where} must be turns of {', '.join(ROLES)}, got {turn!r:.80}")
        value = turn.get("value", turn.get("content"))
        parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
        said = []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text":
                said.append(_text(part.get("text"), f"{where}: {role}"))
            elif kind in ("image", "image_url"):
                source = part.get("image", part.get("image_url", part.get("path")))
                url = source.get("url") if isinstance(source, dict) and "url" in source else source
                pictures += _pictures(url, f"{where}: image")  # None: its place; the path is in a field of its own
            else:
                raise ValueError(f"{where} must have parts of type text or image, got {part!r:.80}")
        texts[role].append("\n".join(said))
    if len(texts["user"]) != 1 or len(texts["assistant"]) > 1:
        raise ValueError(
            f"{where} must be one question and its answer, got {len(texts['user'])} of the user and "
            f"{len(texts['assistant'])} of the assistant"
        )
    return [*texts["user"], *texts["system"]], tuple(texts["assistant"]), pictures
