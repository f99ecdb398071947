"""Pairs of questions and answers that a score is made of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from ..data.format import Answer, read_answers
from .rules import Item

Pairing = Literal["once", "last", "every", "position"]


class Paired(NamedTuple):
    """Questions and the answers that are scored against them."""

    items: list[Item]
    texts: list[str]
    missing: int = 0  # questions without an answer, whose text is empty
    uncounted: int = 0  # questions without an answer that are not among the items


def pair_answers(
    dataset: str,
    items: Sequence[Item],
    path: Path,
    pairing: Pairing = "once",
    *,
    skipped: Collection[str] = (),
    missing_scores_zero: bool = False,
) -> Paired:
    """Pair the answers of a file with a dataset's questions.

    Args:
        dataset: its name, for errors.
        items: its questions.
        path: the answers file.
        pairing: "once": one answer to every question, and anything else is an error. "last": a question's last answer
            counts, and answers to unknown questions are ignored. "every": each answer counts, so a question does as
            often as it is answered, possibly never. "position": the same, and answer n is to question n whatever its
            id.
        skipped: ids of questions that are left out unless they are answered.
        missing_scores_zero: with "once" and "last", a question without an answer has an empty one. Otherwise it is an
            error.

    Raises:
        ValueError: the file is malformed, or answers and questions do not match. The message names file and line.
    """
    answers = read_answers(path, unique=pairing == "once")
    if pairing == "position":
        return _by_position(dataset, items, answers, path)
    known = {item.question_id: item for item in items}
    given = {str(answer.question_id): answer.text for answer in answers}
    if pairing != "last":
        for answer in answers:
            if str(answer.question_id) not in known:
                raise ValueError(f"{path}: line {answer.line}: {dataset} has no question {answer.question_id}")
    if pairing == "every":
        unanswered = known.keys() - given.keys() - set(skipped)
        asked = [known[str(answer.question_id)] for answer in answers]
        return Paired(asked, [answer.text for answer in answers], uncounted=len(unanswered))
    # ScienceQA's items come from another file than its questions, so they are left out by id
    items = [item for item in items if item.question_id in given or item.question_id not in skipped]
    missing = [item.question_id for item in items if item.question_id not in given]
    if missing and not missing_scores_zero:
        raise ValueError(
            f"{path}: no answer to {len(missing)} of {len(items)} questions of {dataset}, the first is {missing[0]}"
        )
    return Paired(items, [given.get(item.question_id, "") for item in items], missing=len(missing))


def _by_position(dataset: str, items: Sequence[Item], answers: Sequence[Answer], path: Path) -> Paired:
    if len(answers) > len(items):
        raise ValueError(
            f"{path}: line {answers[len(items)].line}: answers to {dataset} are scored by their position, and it has "
            f"{len(items)} questions, got {len(answers)} answers"
        )
    texts = [answer.text for answer in answers]
    return Paired(list(items[: len(texts)]), texts, uncounted=len(items) - len(texts))
