"""What the fields of a record mean: image, question, answer, instruction, in conversations or in columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..instructions.texts import IMAGE_TOKEN
from .tables import Record

CONVERSATIONS = ("conversations", "messages", "conversation")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}  # as the benchmark's files name them
UNREADABLE = {
    **dict.fromkeys(("video", "videos"), "as reading one needs torchvision: give its frames as a list of images"),
    **dict.fromkeys(("audio", "audios"), "as no model here hears"),
}
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
    """A question and its answers, with the images and the turns before it.

    Of a question about one image or none, with no turn before it, the image token is left out. Otherwise it may stand
    in what the user says, once for each image.
    """

    question: str  # with its instruction as the last line
    answers: tuple[str, ...]
    pictures: tuple[Picture, ...] = ()
    before: tuple[tuple[str, str], ...] = ()  # who speaks in each turn, "system", "human" or "gpt", and the text

    @property
    def text(self) -> str:
        """The question without the places of images."""
        return "\n".join(piece.strip() for piece in self.question.split(IMAGE_TOKEN) if piece.strip())


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
    last = turns[-1] if isinstance(turns, list) and turns else None
    return isinstance(last, dict) and _role(last) == "assistant"


def _role(turn: dict[str, Any]) -> str | None:
    return ROLES.get(str(turn.get("from", turn.get("role"))))


def read_sample(record: Record, fields: Fields, where: str) -> Sample:
    """Read a record.

    Args:
        record: the record.
        fields: its fields.
        where: file and record, for errors.

    Raises:
        ValueError: a field is missing or has another form, the places of images are not as many as the images, a
            conversation is not of user and assistant in turn, or there is a video or sound.
    """
    for name in UNREADABLE:
        if record.get(name):
            raise ValueError(f"{where}: {name} cannot be used, {UNREADABLE[name]}, got {record[name]!r:.80}")
    pictures = [] if fields.image is None else _pictures(record.get(fields.image), f"{where}: {fields.image}")
    content, history = record.get(fields.question), record.get("history")
    if isinstance(content, str) and isinstance(history, list) and history:  # of the benchmark's test file
        content = [*history, {"from": "human", "value": content}]
    before: list[tuple[str, str]] = []
    answers: tuple[str, ...] = ()
    if isinstance(content, list):
        before, parts, answers, inside = _conversation(content, f"{where}: {fields.question}")
        pictures = pictures or inside
    else:
        parts = [_text(content, f"{where}: {fields.question}")]
    if fields.answer is not None:
        answers = _answers(record.get(fields.answer), f"{where}: {fields.answer}")
    if not answers:
        raise ValueError(f"{where}: has no answer")
    if fields.instruction is not None:
        parts.append(_text(record.get(fields.instruction), f"{where}: {fields.instruction}"))
    asked = [*(text for speaker, text in before if speaker == "human"), "\n".join(parts)]
    places = sum(text.count(IMAGE_TOKEN) for text in asked)
    if places not in (0, len(pictures)):
        raise ValueError(
            f"{where}: {IMAGE_TOKEN} must occur once for each of {len(pictures)} images, or not at all, got {places}"
            + ("" if pictures else " (--image names the field of the images)")
        )
    if not all(text.replace(IMAGE_TOKEN, "").strip() for text in asked):
        raise ValueError(f"{where}: must hold a question{' in each turn of the user' if before else ''}")
    if not before and len(pictures) < 2:
        parts = [part.replace(IMAGE_TOKEN, "") for part in parts]
    question = "\n".join(part for part in map(str.strip, parts) if part)
    return Sample(question, answers, tuple(pictures), tuple(before))


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


def _conversation(
    turns: list[Any], where: str
) -> tuple[list[tuple[str, str]], list[str], tuple[str, ...], list[Picture]]:
    """The turns before the last question, the parts of that, its answer if there is one, and the images in the turns.

    What the system says before a conversation of one question is its instruction, and follows the question.
    """
    said: list[tuple[str, str]] = []
    pictures: list[Picture] = []
    for turn in turns:
        role = _role(turn) if isinstance(turn, dict) else None
        if role is None:
            raise ValueError(f"{where} must be turns of {', '.join(ROLES)}, got {turn!r:.80}")
        value = turn.get("value", turn.get("content"))
        parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
        texts = []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text":
                texts.append(_text(part.get("text"), f"{where}: {role}"))
            elif kind in ("image", "image_url"):
                if role != "user":
                    raise ValueError(f"{where} must have images in the user's turns alone, got one of the {role}")
                source = part.get("image", part.get("image_url", part.get("path")))
                url = source.get("url") if isinstance(source, dict) and "url" in source else source
                pictures += _pictures(url, f"{where}: image")  # None: its place; the path is in a field of its own
                texts.append(IMAGE_TOKEN)
            else:
                reason = f" (no {kind}, {UNREADABLE[kind]})" if kind in UNREADABLE else ""
                raise ValueError(f"{where} must have parts of type text or image{reason}, got {part!r:.80}")
        said.append((SPEAKERS[role], "\n".join(texts)))
    speakers = [speaker for speaker, _ in said]
    if [speaker for speaker in speakers if speaker != "system"] in (["human"], ["human", "gpt"]):
        asked = [text for wanted in ("human", "system") for speaker, text in said if speaker == wanted]
        return [], asked, tuple(text for speaker, text in said if speaker == "gpt"), pictures
    own = speakers[speakers[:1] == ["system"] :]
    if own != (["human", "gpt"] * len(own))[: len(own)] or not own:
        raise ValueError(
            f"{where} must be of the user, then the assistant, and so on, after one turn of the system or none, got "
            f"{', '.join(speakers) or 'no turn'}"
        )
    last = len(said) - (2 if speakers[-1] == "gpt" else 1)
    return said[:last], [said[last][1]], tuple(text for _, text in said[last + 1 :]), pictures
