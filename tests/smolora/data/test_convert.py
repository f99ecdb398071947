"""Splits by picture, and tasks in the benchmark's format."""

from __future__ import annotations

import pytest

from smolora.data.convert import find_images, groups_of, split_samples, write_task
from smolora.data.fields import Picture, Sample
from smolora.data.format import Conversation, Message, Question, ask, read_conversations, read_questions

SAMPLES = [Sample(f"Q{index}", ("x",), (Picture(f"{index // 3}.png"),)) for index in range(60)]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_no_picture_is_in_both(fraction):
    train, test = split_samples(SAMPLES, fraction, seed=0)
    assert sorted([*train, *test]) == sorted(SAMPLES) and train and test
    assert not {s.pictures for s in train} & {s.pictures for s in test}
    assert 0 <= len(test) - fraction * 60 < 3 or len(train) == 3
    assert train == [s for s in SAMPLES if s in train], "in their order"


def test_the_seed_alone_decides():
    assert split_samples(SAMPLES, 0.1, seed=1) == split_samples(SAMPLES, 0.1, seed=1)
    assert split_samples(SAMPLES, 0.1, seed=1) != split_samples(SAMPLES, 0.1, seed=2)
    _, test = split_samples(SAMPLES, 0.1, seed=1)
    _, shuffled = split_samples(SAMPLES[::-1], 0.1, seed=1)
    assert sorted(test) == sorted(shuffled)


def test_what_belongs_together():
    same = [Sample("A", ("1",), (Picture("x", b"1"),)), Sample("B", ("2",), (Picture("y", b"1"),))]
    other = Sample("A", ("1",), (Picture("x", b"2"),))
    texts = [Sample("A", ("1",)), Sample("A", ("2",)), Sample("A", ("2",), (), (("human", "B"), ("gpt", "b")))]
    first, second, third, *of_texts = groups_of([*same, other, *texts])
    assert first == second != third and of_texts[0] == of_texts[1] != of_texts[2]
    assert len({first, third, *of_texts}) == 4
    with pytest.raises(ValueError, match="two pictures"):
        split_samples(same, 0.5, seed=0)
    with pytest.raises(ValueError, match="test fraction must lie between 0 and 1, got 1"):
        split_samples(SAMPLES, 1, seed=0)


def test_samples_of_several_pictures_join_their_groups():
    """Whatever their order: a chain of shared pictures is one group."""
    pairs = [("0", "1"), ("8", "9"), ("2", "3"), ("1", "2"), ("4", "5"), ("3",), ("9", "7")]
    samples = [Sample("Q", ("x",), tuple(Picture(name) for name in pair)) for pair in pairs]
    names = groups_of(samples)
    assert names == [f"path {name}" for name in ("0", "7", "0", "0", "4", "0", "7")]
    assert groups_of(samples[::-1]) == names[::-1]
    for seed in range(5):
        train, test = split_samples(samples, 0.3, seed)
        parts = [{picture for sample in part for picture in sample.pictures} for part in (train, test)]
        assert all(parts) and not parts[0] & parts[1]


def test_the_files_are_the_benchmarks(tmp_path):
    train = [Sample("Q\nOne word.", ("a", "b", "b"), (Picture("x.png"),)), Sample("Q", ("c",))]
    test = [Sample("Q", ("a", "b"), (Picture("x.JPG", b"bytes"),))]
    write_task(tmp_path, train, test)
    assert read_conversations(tmp_path / "train.json") == [
        Conversation(0, "Q\nOne word.", "b", "x.png"),
        Conversation(1, "Q", "c", None),
    ]
    (question,) = read_questions(tmp_path / "test.json")
    assert question == Question(0, 0, "Q", question.image, ("a", "b"))
    assert question.image.endswith(".jpg") and (tmp_path / "images" / question.image).read_bytes() == b"bytes"


def test_several_images_and_turns_are_what_the_trainer_reads(tmp_path):
    before = (("system", "Look."), ("human", "Is <image> red?"), ("gpt", "no"))
    samples = [
        Sample("And <image>?\nOne word.", ("yes",), (Picture("a.png"), Picture("b.png")), before),
        Sample("Which is red?", ("a",), (Picture("a.png"), Picture(None, b"bytes"))),
        Sample("Sure?", ("no",), (Picture("a.png"),), (("human", "Is it red?"), ("gpt", "no"))),
    ]
    write_task(tmp_path, samples, samples)
    first, second, third = read_conversations(tmp_path / "train.json")
    turns = (
        Message("system", ("Look.",)),
        Message("user", ("Is", None, "red?")),
        Message("assistant", ("no",)),
        Message("user", ("And", None, "?\nOne word.")),
    )
    assert first.messages == (*turns, Message("assistant", ("yes",))) and first.images == ("a.png", "b.png")
    assert first.text == "And\n?\nOne word." == samples[0].text
    assert second.messages == (Message("user", (None, None, "Which is red?")), Message("assistant", ("a",)))
    assert (tmp_path / "images" / second.images[1]).read_bytes() == b"bytes"
    assert third.messages[0] == Message("user", (None, "Is it red?")) and third.messages[2:3] == (ask("Sure?"),)
    for sample, question in zip((first, second, third), read_questions(tmp_path / "test.json"), strict=True):
        assert (question.images, question.messages) == (sample.images, sample.messages[:-1])
        assert (question.text, question.answer) == (sample.text, sample.answer)


def test_the_folder_of_the_images(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").touch()
    assert find_images(SAMPLES, [tmp_path, tmp_path / "images"]) == tmp_path / "images"
    with pytest.raises(ValueError, match=r"image '0\.png' is in none of"):
        find_images(SAMPLES, [tmp_path])
    with pytest.raises(ValueError, match=r"images must all be paths or all stand in the records, got '0\.png'"):
        find_images([*SAMPLES, Sample("Q", ("x",), (Picture(None, b"bytes"),))], [tmp_path])
