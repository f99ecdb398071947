"""CIDEr and CIDEr-D: agreement of a caption with references in n-grams weighted by tf-idf (Vedantam et al., 2015)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

N = 4  # n-grams of 1 to 4 tokens
SIGMA = 6.0  # width of CIDEr-D's penalty on a difference in length, in bigrams

NGrams = Counter[tuple[str, ...]]
DocumentFrequencies = Mapping[tuple[str, ...], int]


class _Vector(NamedTuple):
    weights: dict[tuple[str, ...], float]
    norms: list[float]  # of the n-grams of each length
    bigrams: int


def ngrams(tokens: Sequence[str]) -> NGrams:
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
    *,
    clipped: bool,
) -> list[float]:
    """The consensus of each caption with its image's references, 0 to 10.

    Args:
        captions: n-grams of one caption an image.
        references: n-grams of the references of each image, at least one.
        frequencies: document frequencies of the corpus.
        documents: its number of documents.
        clipped: CIDEr-D, where a repeated n-gram counts no more often than the reference has it and a difference in
            length is penalised; else CIDEr, the plain cosine.
    """
    # tf-idf weights of the same counts are asked for again and again where references are shared
    idf = _Idf(frequencies, documents)
    scores = []
    for caption, of_image in zip(captions, references, strict=True):
        hypothesis = _vector(caption, idf)
        total = sum(_similarity(hypothesis, _vector(reference, idf), clipped) for reference in of_image)
        scores.append(10 * total / len(of_image))
    return scores


def cider_d(captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """CIDEr-D of tokenised captions, 0 to 10 each: what the COCO caption evaluation prints as CIDEr is their mean."""
    return _consensus(captions, references, clipped=True)


def cider(captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """CIDEr of tokenised captions, 0 to 10 each, without stemming: the cosine, neither clipped nor penalised."""
    return _consensus(captions, references, clipped=False)


def _consensus(
    captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]], *, clipped: bool
) -> list[float]:
    counted = [[ngrams(reference) for reference in of_image] for of_image in references]
    frequencies = document_frequencies(counted)
    return agreement([ngrams(caption) for caption in captions], counted, frequencies, len(counted), clipped=clipped)


class _Idf(dict):
    """Inverse document frequencies, each computed once: log(documents / max(1, frequency))."""

    def __init__(self, frequencies: DocumentFrequencies, documents: int) -> None:
        self.frequencies = frequencies
        self.log_documents = math.log(documents)

    def __missing__(self, gram: tuple[str, ...]) -> float:
        self[gram] = value = self.log_documents - math.log(max(1, self.frequencies.get(gram, 0)))
        return value


def _vector(counts: NGrams, idf: _Idf) -> _Vector:
    weights, squares, bigrams = {}, [0.0] * N, 0
    for gram, count in counts.items():
        weights[gram] = weight = count * idf[gram]
        squares[len(gram) - 1] += weight * weight
        if len(gram) == 2:
            bigrams += count
    return _Vector(weights, [math.sqrt(square) for square in squares], bigrams)


def _similarity(hypothesis: _Vector, reference: _Vector, clipped: bool) -> float:
    """The cosine of two captions, averaged over the lengths of n-grams."""
    products = [0.0] * N
    for gram, weight in hypothesis.weights.items():
        other = reference.weights.get(gram)
        if other is not None:
            products[len(gram) - 1] += (min(weight, other) if clipped else weight) * other
    total = 0.0
    for product, ours, theirs in zip(products, hypothesis.norms, reference.norms, strict=True):
        total += product / (ours * theirs) if ours and theirs else product
    if clipped:
        total *= math.exp(-((hypothesis.bigrams - reference.bigrams) ** 2) / (2 * SIGMA**2))
    return total / N
