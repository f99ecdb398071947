"""CIDEr and CIDEr-D, by hand and beside pycocoevalcap."""

from __future__ import annotations

import pytest

from smolora.evaluate import cider


def caption_set():
    """Captions with repetitions, other lengths, nothing in common, and nothing at all."""
    captions = ["a man rides a horse", "a a a dog", "two red cats sit on the red mat", "", "blue sky over the sea"]
    references = [
        ["a man rides a brown horse", "the man is on a horse"],
        ["a dog", "a small dog runs"],
        ["two cats sit on a mat", "red cats on the mat near the door", "cats"],
        ["nothing to see here"],
        ["a boat on the water", "birds"],
    ]
    return [c.split() for c in captions], [[r.split() for r in references_] for references_ in references]


def test_cider_by_hand():
    # two images; "a" is in both, so its idf is 0; x and y have log 2 each
    captions, references = [["a", "x"], ["a"]], [[["a", "x"]], [["a", "y"]]]
    # unigrams: cosine 1, bigrams: "a x" in one image: cosine 1; nothing longer. The other: nothing but "a"
    assert [score.cider_d for score in cider.consensus(captions, references)] == pytest.approx([10 * 2 / 4, 0])
    longer = cider.consensus(captions, [[["a", "x", "x"]], [["a", "y"]]])[0]
    # unigrams: clipped to min(1, 2) * 2 of norms 1 * 2; bigrams: "a x" of ("a x", "x x"): 1 / sqrt(2)
    assert longer.cider == pytest.approx(10 * (1 + 2**-0.5) / 4)
    penalty = 2.718281828459045 ** (-1 / 72)  # one bigram more
    assert longer.cider_d == pytest.approx(10 * (1 + 2**-0.5) / 4 * penalty)


def test_repetition_pays_in_cider_and_not_in_cider_d():
    references = [[["x", "y"]], [["z", "w"]]]
    once = cider.consensus([["x"], ["z"]], references)[0]
    twice = cider.consensus([["x", "x"], ["z"]], references)[0]
    assert twice.cider == pytest.approx(once.cider) and twice.cider_d < once.cider_d


def test_cider_d_is_that_of_pycocoevalcap():
    scorer = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    captions, references = caption_set()
    expected, each = scorer.compute_score(
        {i: [" ".join(r) for r in of_image] for i, of_image in enumerate(references)},
        {i: [" ".join(c)] for i, c in enumerate(captions)},
    )
    ours = [score.cider_d for score in cider.consensus(captions, references)]
    assert ours == pytest.approx(list(each), abs=1e-9) and sum(ours) / len(ours) == pytest.approx(expected)
