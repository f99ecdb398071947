"""CIDEr and CIDEr-D: tf-idf weighted n-gram similarity of a caption and its references (Vedantam et al., 2015)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

N = 4  # n-grams of 1 to 4 tokens
SIGMA = 6.0  # width of CIDEr-D's Gaussian length penalty, in bigrams

Tokens = Sequence[str]
NGrams = Counter[tuple[str, ...]]
DocumentFrequencies = Mapping[tuple[str, ...], int]


class Agreement(NamedTuple):
    """CIDEr of a caption with its references, 0 to 10."""

    cider_d: float  # n-gram counts clipped to the reference's, with a length penalty
    cider: float  # plain cosine similarity


class _Vector(NamedTuple):
    weights: dict[tuple[str, ...], float]
    norms: list[float]  # one for each n
    bigrams: int


def ngrams(tokens: Tokens) -> NGrams:
    """Count the n-grams of 1 to 4 tokens."""
    counts: NGrams = Counter()
    for n in range(1, N + 1):
        counts.update(zip(*(tokens[i:] for i in range(n)), strict=False))
    return counts


def document_frequencies(references: Iterable[Iterable[NGrams]]) -> DocumentFrequencies:
    """Count the images whose references contain each n-gram."""
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
    """Score each caption against the references of its image.

    Args:
        captions: n-grams of one caption per image.
        references: n-grams of each image's references, at least one.
        frequencies: document frequencies of the corpus.
        documents: number of documents of the corpus.
    """
    # inverse document frequency, indexed by document frequency; 0 documents count as 1
    idf = [math.log(documents / max(1, frequency)) for frequency in range(documents + 1)]
    scores = []
    for caption, of_image in zip(captions, references, strict=True):
        hypothesis = _vector(caption, frequencies, idf)
        pairs = [_similarity(hypothesis, _vector(reference, frequencies, idf)) for reference in of_image]
        scores.append(Agreement(*(10 * sum(values) / len(values) for values in zip(*pairs, strict=True))))
    return scores


def consensus(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[Agreement]:
    """Score tokenised captions against their images' references, which are the corpus as well.

    The mean of `cider_d` is the CIDEr of the COCO caption evaluation. `cider` does no stemming.
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
    """Cosine similarity of two captions averaged over n, clipped with length penalty and plain; 0 to 1."""
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
