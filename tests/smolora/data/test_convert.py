"""Splits by picture, and tasks in the benchmark's format."""

from __future__ import annotations

import pytest

from smolora.data.convert import find_images, group_of, split_samples, write_task
from smolora.data.fields import Picture, Sample
from smolora.data.format import Conversation, Question, read_conversations, read_questions

SAMPLES = [Sample(f"Q{index}", ("x",), Picture(f"{index // 3}.png")) for index in range(60)]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_no_picture_is_in_both(fraction):
    train, test = split_samples(SAMPLES, fraction, seed=0)
    assert sorted([*train, *test]) == sorted(SAMPLES) and train and test
    assert not {s.picture for s in train} & {s.picture for s in test}
    assert 0 <= len(test) - fraction * 60 < 3 or len(train) == 3
    assert train == [s for s in SAMPLES if s in train], "in their order"


def test_the_seed_alone_decides():
    assert split_samples(SAMPLES, 0.1, seed=1) == split_samples(SAMPLES, 0.1, seed=1)
    assert split_samples(SAMPLES, 0.1, seed=1) != split_samples(SAMPLES, 0.1, seed=2)
    _, test = split_samples(SAMPLES, 0.1, seed=1)
    _, shuffled = split_samples(SAMPLES[::-1], 0.1, seed=1)
    assert sorted(test) == sorted(shuffled)


def test_what_belongs_together():
    same = [Sample("A", ("1",), Picture("x", b"1")), Sample("B", ("2",), Picture("y", b"1"))]
    assert group_of(same[0]) == group_of(same[1]) != group_of(Sample("A", ("1",), Picture("x", b"2")))
    assert group_of(Sample("A", ("1",), None)) == group_of(Sample("A", ("2",), None)) != group_of(same[0])
    with pytest.raises(ValueError, match="two pictures"):
        split_samples(same, 0.5, seed=0)
    with pytest.raises(ValueError, match="test fraction must lie between 0 and 1, got 1"):
        split_samples(SAMPLES, 1, seed=0)


def test_the_files_are_the_benchmarks(tmp_path):
    train = [Sample("Q\nOne word.", ("a", "b", "b"), Picture("x.png")), Sample("Q", ("c",), None)]
    test = [Sample("Q", ("a", "b"), Picture("x.JPG", b"bytes"))]
    write_task(tmp_path, train, test)
    assert read_conversations(tmp_path / "train.json") == [
        Conversation(0, "Q\nOne word.", "b", "x.png"),
        Conversation(1, "Q", "c", None),
    ]
    (question,) = read_questions(tmp_path / "test.json")
    assert question == Question(0, 0, "Q", question.image, ("a", "b"))
    assert question.image.endswith(".jpg") and (tmp_path / "images" / question.image).read_bytes() == b"bytes"


def test_the_folder_of_the_images(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").touch()
    assert find_images(SAMPLES, [tmp_path, tmp_path / "images"]) == tmp_path / "images"
    with pytest.raises(ValueError, match=r"image '0\.png' is in none of"):
        find_images(SAMPLES, [tmp_path])
