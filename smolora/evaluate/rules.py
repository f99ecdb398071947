"""The benchmark's rules: when an answer is right, and when it follows its instruction (MIF, Eq. 12).

A metric takes all items and all answers of a dataset and gives a number for each, `None` for an item that does not
count. The score is 100 times their mean. The `released_...` rules reproduce the released code exactly. The others are
the metrics as the field defines them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from . import cider, ptb, vqa

LETTERS = "ABCDE"


class Item(NamedTuple):
    """A question of a test set with its references."""

    question_id: str
    answer: str | tuple[str, ...]  # from the question file; decides on the format
    references: tuple[str, ...]  # the metric compares with these
    choices: int = 0  # number of choices, for multiple choice
    group: str = ""  # group with a score of its own; "-" for an item that does not count
    side: float = 0.0  # longer side of the image in pixels, for boxes


Metric = Callable[[Sequence[Item], Sequence[str]], list[float | None]]
Rule = Callable[[Item, str], bool]


def each(right: Callable[[Item, str], float]) -> Metric:
    """Make a metric of a rule that scores each answer by itself."""

    def metric(items: Sequence[Item], texts: Sequence[str]) -> list[float | None]:
        return [
            None if item.group == "-" else float(right(item, text)) for item, text in zip(items, texts, strict=True)
        ]

    return metric


# ---- one answer


def released_exact(item: Item, text: str) -> bool:
    """VQAv2 and VizWiz: case-insensitive equality, without stripping."""
    return text.lower() == item.answer.lower()


def released_exact_answerable(item: Item, text: str) -> bool:
    """OCRVQA: case-insensitive equality, and no "Unanswerable" in the answer."""
    return "Unanswerable" not in text and released_exact(item, text)


def released_either_contains(item: Item, text: str) -> bool:
    """ImageNet and Places365: either contains the other, so an empty answer is right."""
    text, answer = text.lower(), item.answer.lower()
    return text in answer or answer in text


def released_full_stop(item: Item, text: str) -> bool:
    """GQA: case-insensitive equality without full stops at the end."""
    return text.rstrip(".").lower() == item.references[0].lower()


def exact(item: Item, text: str) -> bool:
    """Case-insensitive equality without surrounding space and full stops at the end."""
    return bool(_plain(text)) and _plain(text) == _plain(item.references[0])


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()


# ---- a letter


def released_letter(item: Item, text: str) -> bool:
    """ScienceQA: a single letter, "X. ...", or the first one-character word, such as the b of "(b)"."""
    if text in tuple(LETTERS):
        letter = text
    elif text[:1] in tuple(LETTERS) and text[1:3] == ". ":
        letter = text[0]
    else:
        word = re.search(r"\b\w\b", text)
        letter = word[0].upper() if word else ""
    return _names_choice(item, letter)


def letter(item: Item, text: str) -> bool:
    """ScienceQA as LLaVA's evaluation parses it: "X", "X. ..." or "The answer is X."."""
    text = text.strip()
    found = re.findall(r"The answer is ([A-Z])\.", text)
    if text in tuple(LETTERS) or (text[:1] in tuple(LETTERS) and text[1:3] == ". "):
        found = [text[0]]
    return len(found) == 1 and _names_choice(item, found[0])


def _names_choice(item: Item, letter: str) -> bool:
    return letter in tuple(LETTERS[: item.choices]) and letter == item.references[0]


# ---- ten answers


def released_soft(item: Item, text: str) -> float:
    """TextVQA: agreement with ten answers after TextVQA's normalisation, with the released limit on full stops."""
    return _soft(item, text, commas_first=True, full_stops=vqa.RELEASED_FULL_STOPS)


def soft_textvqa(item: Item, text: str) -> float:
    """TextVQA's accuracy."""
    return _soft(item, text, commas_first=True) if text.strip() else 0.0


def soft_vqa(item: Item, text: str) -> float:
    """VQA accuracy. With a single reference, equality after the same normalisation."""
    return _soft(item, text) if text.strip() else 0.0


def _soft(item: Item, text: str, **options: int) -> float:
    references = [vqa.normalize(reference, **options) for reference in item.references]
    return vqa.agreement(vqa.normalize(text, **options), references)


# ---- captions


def released_cider(items: Sequence[Item], texts: Sequence[str]) -> list[float | None]:
    """TextCaps: CIDEr-D over whitespace-separated tokens, with case and punctuation."""
    references = [[reference.split() for reference in item.references] for item in items]
    return [score.cider_d for score in cider.consensus([text.split() for text in texts], references)]


def released_cider_swapped(items: Sequence[Item], texts: Sequence[str]) -> list[float | None]:
    """Flickr30k: CIDEr-D of each image's best reference against the answer, with the two roles swapped.

    The best reference has the highest CIDEr-D with the answer, by document frequencies over that image's references.
    """
    answers = [cider.ngrams(text.split()) for text in texts]
    best = []
    for item, answer in zip(items, answers, strict=True):
        references = [cider.ngrams(reference.split()) for reference in item.references]
        alone = [[reference] for reference in references]
        frequencies = cider.document_frequencies(alone)
        scores = cider.agreement([answer] * len(alone), alone, frequencies, len(alone))
        best.append(max(zip(scores, references, strict=True), key=lambda pair: pair[0].cider_d)[1])
    alone = [[answer] for answer in answers]
    swapped = cider.agreement(best, alone, cider.document_frequencies(alone), len(alone))
    return [score.cider_d for score in swapped]


def cider_d(items: Sequence[Item], texts: Sequence[str]) -> list[float | None]:
    """CIDEr-D over Penn Treebank tokens, the CIDEr of the COCO caption evaluation."""
    return [score.cider_d for score in _of_ptb_tokens(tuple(items), tuple(texts))]


def plain_cider(items: Sequence[Item], texts: Sequence[str]) -> list[float | None]:
    """CIDEr over Penn Treebank tokens, without clipping and length penalty."""
    return [score.cider for score in _of_ptb_tokens(tuple(items), tuple(texts))]


@lru_cache(maxsize=1)  # both metrics of a dataset are computed one after the other
def _of_ptb_tokens(items: tuple[Item, ...], texts: tuple[str, ...]) -> list[cider.Agreement]:
    references = [[ptb.tokenize(reference) for reference in item.references] for item in items]
    return cider.consensus([ptb.tokenize(text) for text in texts], references)


# ---- format of the answer


def follows_letter(item: Item, text: str) -> bool:
    """One letter in either case, surrounded by space at most."""
    return re.fullmatch("[A-Z]", text.strip().upper()) is not None


def released_follows_word(item: Item, text: str) -> bool:
    """At most two words, possibly none, or the answer itself."""
    return len(text.split()) <= 2 or text.lower() == item.answer.lower()


def follows_word(item: Item, text: str) -> bool:
    """One or two words, or the answer itself."""
    answers = (item.answer,) if isinstance(item.answer, str) else item.answer
    return 1 <= len(text.split()) <= 2 or (bool(_plain(text)) and _plain(text) in map(_plain, answers))


def released_follows_sentence(item: Item, text: str) -> bool:
    """Ends with a full stop, and has more than four words or is contained in a reference.

    As released, a single reference is walked letter by letter.
    """
    return text.endswith(".") and (
        len(text.split()) > 4 or any(text.lower() in reference.lower() for reference in item.answer)
    )


def follows_sentence(item: Item, text: str) -> bool:
    """Ends with a full stop, and has more than four words or is a reference."""
    text = text.strip()
    return text.endswith(".") and (len(text.split()) > 4 or _plain(text) in map(_plain, item.references))
