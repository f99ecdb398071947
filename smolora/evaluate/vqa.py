"""VQA accuracy: agreement with ten human answers after the normalisation of the VQA and TextVQA evaluations."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
FULL_STOP = re.compile(r"\.(?!\d)")
COMMA_IN_NUMBER = re.compile(r"\d,+\d")
RELEASED_FULL_STOPS = 32  # value of re.UNICODE, which the released code passes as the count of `re.sub`

# A missing apostrophe in one of these is restored.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTIONS.split()
    for at, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # reversed in the evaluations' own table


def normalize(text: str, *, commas_first: bool = False, full_stops: int = 0) -> str:
    """Normalise punctuation, articles, number words and contractions of an answer, as the VQA evaluation does.

    Args:
        text: the answer.
        commas_first: first drop "," and "?" and split off "'s", as the TextVQA evaluation does.
        full_stops: maximum number of full stops to remove; 0 for all.
    """
    text = text.lower()
    if commas_first:
        text = text.replace(",", "").replace("?", "").replace("'s", " 's")
    text = before = " ".join(text.split())
    comma_in_number = COMMA_IN_NUMBER.search(before) is not None
    for mark in PUNCTUATION:
        if mark in text:
            beside_space = f"{mark} " in before or f" {mark}" in before
            text = text.replace(mark, "" if beside_space or comma_in_number else " ")
    text = FULL_STOP.sub("", text, count=full_stops)
    words = (NUMBERS.get(word, word) for word in text.split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def agreement(answer: str, references: Sequence[str]) -> float:
    """Mean over the annotators of `min(1, number of others who gave this answer / 3)`, on normalised answers.

    With a single reference, 1 if the answer equals it, else 0.
    """
    if len(references) == 1:
        return float(answer == references[0])
    given = Counter(references)[answer]
    # an annotator who gave the answer has given - 1 others who did
    return (given * min(1, (given - 1) / 3) + (len(references) - given) * min(1, given / 3)) / len(references)
