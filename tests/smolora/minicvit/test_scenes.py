"""MiniCVIT's scenes: what cannot be drawn is refused, and no digit of a test occurs in training."""

import pytest

from smolora.minicvit import scenes
from smolora.minicvit.scenes import StableRandom


def test_train_and_test_share_no_handwritten_digit():
    of_train = {scenes.handwritten(d, StableRandom(f"a {n}"), False).tobytes() for d in range(10) for n in range(40)}
    of_test = {scenes.handwritten(d, StableRandom(f"b {n}"), True).tobytes() for d in range(10) for n in range(40)}
    assert of_train and of_test and not of_train & of_test


def test_unknown_names_are_refused():
    for draw in (
        lambda: scenes.draw_object("spoon", "red", StableRandom("")),
        lambda: scenes.draw_place("moon", StableRandom("")),
        lambda: scenes.draw_person("red", "cat", "beach", StableRandom("")),
        lambda: scenes.draw_one_shape("ring", "red", StableRandom("")),
    ):
        with pytest.raises(ValueError, match=r"must be one of .*, got '"):
            draw()
