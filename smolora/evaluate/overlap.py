"""ROUGE-L (Lin, 2004) and ANLS (Biten et al., 2019) of an answer and one reference."""

from __future__ import annotations

import re
from collections.abc import Sequence

ANLS_THRESHOLD = 0.5  # a normalised distance of this or more scores 0


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence, over lower-case runs of letters and digits."""
    words, truth = _words(text), _words(reference)
    common = longest_common_subsequence(words, truth)
    return 2 * common / (len(words) + len(truth)) if common else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def anls(text: str, reference: str) -> float:
    """1 minus the edit distance over the longer length, without case and surrounding space; 0 below 1/2."""
    text, reference = text.strip().lower(), reference.strip().lower()
    longer = max(len(text), len(reference))
    distance = edit_distance(text, reference) / longer if longer else 0.0
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions that turn one text into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
