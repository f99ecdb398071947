"""CIDEr and CIDEr-D: agreement of a caption with references in n-grams weighted by tf-idf (Vedantam et al., 2015)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

N = 4  # n-grams of 1 to 4 tokens
SIGMA = 6.0  # width of CIDEr-D's penalty on a difference in length, in bigrams

Tokens = Sequence[str]
NGrams = Counter[tuple[str, ...]]
DocumentFrequencies = Mapping[tuple[str, ...], int]


class Agreement(NamedTuple):
    """Of a caption with references, 0 to 10."""

    cider_d: float  # a repeated n-gram counts no more often than a reference has it; another length is penalised
    cider: float  # the plain cosine


class _Vector(NamedTuple):
    weights: dict[tuple[str, ...], float]
    norms: list[float]  # of the n-grams of each length
    bigrams: int


def ngrams(tokens: Tokens) -> NGrams:
    """How often each n-gram of 1 to 4 tokens occurs."""
    counts: NGrams = Counter()
    for n in range(1, N + 1):
        counts.update(zip(*(tokens[i:] for i in range(n)), strict=False))
    return counts


def document_frequencies(references: Iterable[Iterable[NGrams]]) -> DocumentFrequencies:
    """In how many images' references each n-gram occurs."""
    frequencies: Counter[tuple[str, ...]] = Counter()
    for of_image in references:
        frequencies.update({gram for counts in of_image for gram in counts})
    return frequencies


def agreement(
    captions: Sequence[NGrams],
    references: Sequence[Sequence[NGrams]],
    frequencies: DocumentFrequencies,
    documents: int,
) -> list[Agreement]:
    """The consensus of each caption with its image's references.

    Args:
        captions: n-grams of one caption an image.
        references: n-grams of the references of each image, at least one.
        frequencies: document frequencies of the corpus.
        documents: its number of documents.
    """
    # the inverse document frequency by how many documents have an n-gram; one that none has counts as if one had it
    idf = [math.log(documents / max(1, frequency)) for frequency in range(documents + 1)]
    scores = []
    for caption, of_image in zip(captions, references, strict=True):
        hypothesis = _vector(caption, frequencies, idf)
        pairs = [_similarity(hypothesis, _vector(reference, frequencies, idf)) for reference in of_image]
        scores.append(Agreement(*(10 * sum(values) / len(values) for values in zip(*pairs, strict=True))))
    return scores


def consensus(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[Agreement]:
    """The consensus of tokenised captions with their images' references, which are the corpus too.

    The mean of `cider_d` is what the COCO caption evaluation prints as CIDEr; `cider` is without stemming.
    """
    counted = [[ngrams(reference) for reference in of_image] for of_image in references]
    return agreement([ngrams(caption) for caption in captions], counted, document_frequencies(counted), len(counted))


def _vector(counts: NGrams, frequencies: DocumentFrequencies, idf: Sequence[float]) -> _Vector:
    weights, squares, bigrams = {}, [0.0] * N, 0
    for gram, count in counts.items():
        weights[gram] = weight = count * idf[frequencies.get(gram, 0)]
        length = len(gram)
        squares[length - 1] += weight * weight
        if length == 2:
            bigrams += count
    return _Vector(weights, [math.sqrt(square) for square in squares], bigrams)


def _similarity(hypothesis: _Vector, reference: _Vector) -> Agreement:
    """The cosine of two captions, averaged over the lengths of n-grams, clipped with a penalty and plain; 0 to 1."""
    clipped, plain = [0.0] * N, [0.0] * N
    for gram, weight in hypothesis.weights.items():
        other = reference.weights.get(gram)
        if other is not None:
            clipped[len(gram) - 1] += min(weight, other) * other
            plain[len(gram) - 1] += weight * other
    norms = [ours * theirs for ours, theirs in zip(hypothesis.norms, reference.norms, strict=True)]
    scale = [1 / norm if norm else 0 for norm in norms]
    penalty = math.exp(-((hypothesis.bigrams - reference.bigrams) ** 2) / (2 * SIGMA**2))
    return Agreement(penalty * _dot(clipped, scale) / N, _dot(plain, scale) / N)


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
