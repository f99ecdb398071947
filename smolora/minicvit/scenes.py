"""MiniCVIT's pictures, 48 x 48 pixels: signs, objects, handwritten digits, shapes, places, people, books."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TypeVar

import numpy as np

from .drawing import GLYPH_WIDTH, Canvas, Colour, enlarge

T = TypeVar("T")

SIDE = 48
CELL = SIDE // 2

COLOURS: dict[str, Colour] = {
    "red": (208, 44, 44),
    "green": (40, 150, 66),
    "blue": (44, 92, 206),
    "yellow": (240, 196, 32),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OBJECTS = ("house", "tree", "car", "boat", "fish", "cup", "flower", "umbrella")
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("beach", "forest", "desert", "city", "mountain", "field")
COMPANIONS = ("dog", "ball", "umbrella")
WORDS = (
    "stop",
    "exit",
    "taxi",
    "cafe",
    "open",
    "sale",
    "milk",
    "bank",
    "park",
    "shop",
    "wine",
    "mail",
    "yoga",
    "rock",
    "jump",
    "gold",
)

_DARK: Colour = (38, 38, 46)
_PALE: Colour = (236, 233, 225)
_BROWN: Colour = (121, 80, 44)
_GREEN: Colour = (58, 140, 66)
_SKY: Colour = (160, 205, 238)
_SKIN: Colour = (226, 172, 134)


class StableRandom:
    """A random generator with the same choices on every machine.

    It uses `random()` alone, the one method of Python's generator that is guaranteed not to change.

    Args:
        seed: any text.
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def below(self, count: int) -> int:
        """Return an integer from 0 to count - 1."""
        return int(self._random() * count)

    def between(self, low: int, high: int) -> int:
        """Return an integer from low to high, both inclusive."""
        return low + self.below(high - low + 1)

    def choice(self, values: Sequence[T]) -> T:
        """Return one of the values."""
        return values[self.below(len(values))]

    def sample(self, values: Sequence[T], count: int) -> list[T]:
        """Return `count` different values in random order."""
        rest = list(values)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]

    def chance(self, percent: int) -> bool:
        """Return True with this probability, in percent."""
        return self.below(100) < percent


@cache
def _handwritten() -> tuple[np.ndarray, np.ndarray]:
    """Load scikit-learn's digits: images with values 0 to 16 (1797, 8, 8), and their labels (1797,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images.astype(np.int32), data.target.astype(np.int32)


def handwritten(digit: int, rng: StableRandom, held_out: bool) -> np.ndarray:
    """Choose a real digit (8, 8); every fifth image is held out for tests."""
    images, targets = _handwritten()
    indices = [index for index in np.flatnonzero(targets == digit) if (index % 5 == 0) == held_out]
    return images[rng.choice(indices)]


def _background(colours: Sequence[Colour], rng: StableRandom) -> Colour:
    """Choose a background colour and vary its brightness, so that no two pictures are the same."""
    red, green, blue = (min(255, max(0, value + rng.between(-15, 15))) for value in rng.choice(colours))
    return red, green, blue


# ---- pictures of one object


def draw_digit(digit: int, colour: str, rng: StableRandom, held_out: bool) -> Canvas:
    """Draw a handwritten digit, 40 pixels high, in coloured chalk on a blackboard."""
    canvas = Canvas(SIDE, SIDE, _background([_DARK], rng))
    cover = enlarge(handwritten(digit, rng, held_out), 5)
    canvas.blend(rng.between(3, 5), rng.between(3, 5), cover, 16 * 9, COLOURS[colour])
    return canvas


def draw_object(name: str, colour: str, rng: StableRandom) -> Canvas:
    """Draw one of OBJECTS."""
    canvas = Canvas(SIDE, SIDE, _background([_PALE, (205, 222, 235), (222, 214, 196)], rng))
    canvas.rectangle(0, 40, SIDE, SIDE, _background([(186, 178, 160), (150, 178, 128), (170, 170, 178)], rng))
    x, y = rng.between(-3, 3), rng.between(-3, 1)
    _paint_object(canvas, name, COLOURS[colour], 24 + x, 24 + y)
    return canvas


def _paint_object(canvas: Canvas, name: str, ink: Colour, x: int, y: int) -> None:
    """Paint an object of about 34 pixels around (x, y)."""
    if name == "house":
        canvas.rectangle(x - 13, y - 1, x + 13, y + 17, ink)
        canvas.polygon([(x - 17, y), (x, y - 17), (x + 17, y)], _BROWN)
        canvas.rectangle(x - 4, y + 7, x + 3, y + 17, _DARK)
        canvas.rectangle(x + 6, y + 3, x + 11, y + 8, _PALE)
    elif name == "tree":
        canvas.rectangle(x - 3, y + 4, x + 3, y + 18, _BROWN)
        for dx, dy in ((-8, 0), (8, 0), (0, -8)):
            canvas.ellipse(x + dx, y + dy, 9, 9, _GREEN)
        for dx, dy in ((-8, 1), (6, -2), (0, -10), (10, 4)):
            canvas.ellipse(x + dx, y + dy, 2, 2, ink)
    elif name == "car":
        canvas.polygon([(x - 10, y + 2), (x - 6, y - 8), (x + 7, y - 8), (x + 12, y + 2)], ink)
        canvas.polygon([(x - 6, y + 1), (x - 4, y - 6), (x + 5, y - 6), (x + 8, y + 1)], _SKY)
        canvas.rectangle(x - 18, y + 1, x + 18, y + 11, ink)
        for dx in (-10, 10):
            canvas.ellipse(x + dx, y + 12, 5, 5, _DARK)
            canvas.ellipse(x + dx, y + 12, 2, 2, _PALE)
    elif name == "boat":
        canvas.polygon([(x - 18, y + 7), (x + 18, y + 7), (x + 11, y + 16), (x - 11, y + 16)], _BROWN)
        canvas.rectangle(x - 1, y - 17, x + 1, y + 7, _DARK)
        canvas.polygon([(x + 2, y - 16), (x + 16, y + 4), (x + 2, y + 4)], ink)
        canvas.polygon([(x - 2, y - 12), (x - 12, y + 4), (x - 2, y + 4)], _PALE)
    elif name == "fish":
        canvas.polygon([(x + 8, y), (x + 19, y - 9), (x + 19, y + 9)], ink)
        canvas.ellipse(x - 3, y, 15, 10, ink)
        canvas.ellipse(x - 10, y - 3, 3, 3, _PALE)
        canvas.ellipse(x - 10, y - 3, 1, 1, _DARK)
    elif name == "cup":
        canvas.ellipse(x + 11, y + 2, 8, 8, ink)
        canvas.ellipse(x + 11, y + 2, 4, 4, _PALE)
        canvas.polygon([(x - 14, y - 12), (x + 12, y - 12), (x + 8, y + 14), (x - 10, y + 14)], ink)
        canvas.ellipse(x - 1, y - 12, 13, 3, _DARK)
    elif name == "flower":
        canvas.rectangle(x - 1, y, x + 1, y + 18, _GREEN)
        canvas.ellipse(x + 7, y + 12, 6, 3, _GREEN)
        for dx, dy in ((0, -14), (9, -8), (6, 1), (-6, 1), (-9, -8)):
            canvas.ellipse(x + dx, y + dy, 6, 6, ink)
        canvas.ellipse(x, y - 6, 5, 5, _DARK)
    elif name == "umbrella":
        canvas.ellipse(x, y, 18, 16, ink, upper_half=True)
        canvas.rectangle(x - 1, y - 1, x + 1, y + 16, _DARK)
        canvas.rectangle(x - 6, y + 14, x + 1, y + 16, _DARK)
        canvas.rectangle(x - 6, y + 11, x - 4, y + 16, _DARK)
    else:
        raise ValueError(f"name must be one of {', '.join(OBJECTS)}, got {name!r}")


# ---- shapes in the four cells of a picture


def draw_shapes(cells: Mapping[int, tuple[str, str]], rng: StableRandom) -> Canvas:
    """Draw shapes by cell, each with its colour; cells 0 and 1 are the upper row, 2 and 3 the lower."""
    canvas = Canvas(SIDE, SIDE, _background([_PALE, (226, 230, 240), (240, 228, 230)], rng))
    for cell, (shape, colour) in sorted(cells.items()):
        row, column = divmod(cell, 2)
        x, y = CELL * column + CELL // 2 + rng.between(-2, 2), CELL * row + CELL // 2 + rng.between(-2, 2)
        _paint_shape(canvas, shape, COLOURS[colour], x, y, rng.between(7, 9))
    return canvas


def draw_one_shape(shape: str, colour: str, rng: StableRandom) -> Canvas:
    """Draw a large shape."""
    canvas = Canvas(SIDE, SIDE, _background([_PALE, (226, 230, 240), (240, 228, 230)], rng))
    _paint_shape(canvas, shape, COLOURS[colour], 24 + rng.between(-3, 3), 24 + rng.between(-3, 3), rng.between(14, 18))
    return canvas


def draw_scene(
    size: tuple[int, int], shapes: Sequence[tuple[str, str, tuple[int, int], int]], rng: StableRandom
) -> Canvas:
    """Draw shapes, each (name, colour, upper left corner of its box, the box's even side), on `size` pixels."""
    canvas = Canvas(*size, _background([_PALE, (226, 230, 240), (240, 228, 230)], rng))
    for shape, colour, (left, top), side in shapes:
        half, ink = side // 2, COLOURS[colour]
        if shape == "square":  # `_paint_shape` makes it a pixel smaller on each side
            canvas.rectangle(left, top, left + side, top + side, ink)
        else:
            _paint_shape(canvas, shape, ink, left + half, top + half, half)
    return canvas


def _paint_shape(canvas: Canvas, shape: str, ink: Colour, x: int, y: int, size: int) -> None:
    if shape == "circle":
        canvas.ellipse(x, y, size, size, ink)
    elif shape == "square":
        canvas.rectangle(x - size + 1, y - size + 1, x + size - 1, y + size - 1, ink)
    elif shape == "triangle":
        canvas.polygon([(x - size, y + size - 1), (x, y - size), (x + size, y + size - 1)], ink)
    elif shape == "cross":
        arm = size // 3
        canvas.rectangle(x - size, y - arm, x + size, y + arm, ink)
        canvas.rectangle(x - arm, y - size, x + arm, y + size, ink)
    else:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")


# ---- words


def draw_sign(word: str, colour: str, rng: StableRandom) -> Canvas:
    """Draw a street sign with a word of four letters across the picture."""
    canvas = Canvas(SIDE, SIDE, _background([_SKY, (206, 214, 220), (244, 214, 178)], rng))
    canvas.rectangle(0, 40, SIDE, SIDE, _background([(120, 120, 128), _GREEN, (170, 150, 120)], rng))
    top = rng.choice([6, 9, 12])
    canvas.rectangle(22, top, 26, 44, (90, 90, 98))
    canvas.rectangle(0, top - 1, SIDE, top + 21, _DARK if colour == "yellow" else _PALE)
    canvas.rectangle(0, top, SIDE, top + 20, COLOURS[colour])
    _paint_word(canvas, word, top + 3, _DARK if colour == "yellow" else _PALE)
    return canvas


def draw_book(words: Sequence[str], colour: str, rng: StableRandom) -> Canvas:
    """Draw a book's cover with its title, a word on each line."""
    canvas = Canvas(SIDE, SIDE, _background([_BROWN], rng))
    canvas.rectangle(0, 1, SIDE, SIDE - 1, _PALE)
    canvas.rectangle(0, 2, SIDE, SIDE - 2, COLOURS[colour])
    ink = _DARK if colour == "yellow" else _PALE
    top = rng.between(5, 7)
    for index, word in enumerate(words):
        _paint_word(canvas, word, top + 18 * index, ink)
    canvas.rectangle(6, 42, SIDE - 6, 43, ink)
    return canvas


def _paint_word(canvas: Canvas, word: str, top: int, ink: Colour) -> None:
    scale = 2
    canvas.text((SIDE - GLYPH_WIDTH * len(word) * scale) // 2 + 1, top, word, ink, scale)


# ---- places, and people in them


def draw_place(name: str, rng: StableRandom) -> Canvas:
    """Draw one of PLACES."""
    canvas = Canvas(SIDE, SIDE, _background([_SKY], rng))
    horizon = rng.between(22, 27)
    if name == "beach":
        sun = rng.between(6, 42)
        canvas.ellipse(sun, 8, 5, 5, (250, 222, 90))
        canvas.rectangle(0, horizon - 4, SIDE, horizon + 8, (38, 110, 186))
        canvas.polygon(
            [(0, horizon + 10), (SIDE, horizon + rng.between(3, 7)), (SIDE, SIDE), (0, SIDE)], (233, 211, 152)
        )
    elif name == "forest":
        canvas.rectangle(0, 0, SIDE, SIDE, _background([(150, 190, 160)], rng))
        canvas.rectangle(0, 34, SIDE, SIDE, (74, 104, 54))
        for x in range(rng.between(-2, 3), SIDE + 4, 9):
            top = rng.between(2, 9)
            canvas.rectangle(x - 1, top + 10, x + 2, 38, _BROWN)
            canvas.polygon([(x - 7, top + 24), (x, top), (x + 7, top + 24)], rng.choice([(24, 92, 46), (36, 112, 56)]))
    elif name == "desert":
        canvas.rectangle(0, 0, SIDE, SIDE, _background([(250, 224, 180)], rng))
        canvas.ellipse(rng.between(6, 42), 9, 6, 6, (246, 150, 60))
        canvas.ellipse(rng.between(2, 18), SIDE, 30, SIDE - horizon, (222, 164, 92))
        canvas.ellipse(rng.between(34, 48), SIDE + 6, 32, SIDE - horizon, (204, 142, 74))
        x = rng.between(6, 40)
        canvas.rectangle(x - 2, 22, x + 2, 40, (52, 120, 60))
        canvas.rectangle(x - 6, 26, x - 3, 32, (52, 120, 60))
        canvas.rectangle(x - 6, 30, x + 5, 33, (52, 120, 60))
        canvas.rectangle(x + 3, 25, x + 6, 33, (52, 120, 60))
    elif name == "city":
        canvas.rectangle(0, 0, SIDE, SIDE, _background([(196, 202, 212)], rng))
        for x in range(-rng.below(5), SIDE, 12):
            top = rng.between(4, 18)
            canvas.rectangle(x, top, x + 11, 40, rng.choice([(92, 96, 112), (120, 104, 104), (74, 84, 104)]))
            for wy in range(top + 2, 36, 5):
                for wx in (x + 2, x + 7):
                    canvas.rectangle(wx, wy, wx + 2, wy + 3, (244, 214, 120))
        canvas.rectangle(0, 40, SIDE, SIDE, (84, 84, 90))
        for x in range(rng.below(6), SIDE, 10):
            canvas.rectangle(x, 43, x + 5, 44, _PALE)
    elif name == "mountain":
        for x, top in ((rng.between(8, 18), rng.between(4, 10)), (rng.between(30, 42), rng.between(8, 15))):
            canvas.polygon([(x - 26, 40), (x, top), (x + 26, 40)], (112, 118, 134))
            canvas.polygon([(x - 7, top + 10), (x, top), (x + 7, top + 10), (x, top + 7)], (250, 250, 252))
        canvas.rectangle(0, 39, SIDE, SIDE, (196, 204, 214))
    elif name == "field":
        canvas.ellipse(rng.between(8, 40), 8, 8, 4, (250, 250, 252))
        canvas.rectangle(0, horizon, SIDE, SIDE, (132, 190, 84))
        for _ in range(12):
            x, y = rng.below(SIDE), rng.between(horizon + 3, SIDE - 3)
            canvas.rectangle(x, y, x + 2, y + 2, rng.choice([(250, 240, 120), (240, 120, 150), (250, 250, 252)]))
    else:
        raise ValueError(f"name must be one of {', '.join(PLACES)}, got {name!r}")
    return canvas


def draw_person(shirt: str, companion: str, where: str, rng: StableRandom) -> Canvas:
    """Draw a person in a coloured shirt, with one of COMPANIONS, in one of PLACES."""
    canvas = draw_place(where, rng)
    x, feet = 15 + rng.between(-2, 2), SIDE - 2
    for dx in (-4, 1):
        canvas.rectangle(x + dx, feet - 12, x + dx + 4, feet, (62, 62, 92))
    canvas.rectangle(x - 9, feet - 26, x + 10, feet - 11, _DARK)
    canvas.rectangle(x - 8, feet - 25, x + 9, feet - 12, COLOURS[shirt])
    canvas.rectangle(x - 8, feet - 14, x - 5, feet - 12, _SKIN)
    canvas.rectangle(x + 6, feet - 14, x + 9, feet - 12, _SKIN)
    canvas.ellipse(x, feet - 31, 6, 6, _BROWN)
    canvas.ellipse(x, feet - 30, 5, 5, _SKIN)
    cx = 35 + rng.between(-1, 2)
    if companion == "dog":
        canvas.rectangle(cx - 8, feet - 9, cx + 6, feet - 3, _BROWN)
        for dx in (-8, -4, 1, 4):
            canvas.rectangle(cx + dx, feet - 3, cx + dx + 2, feet, _BROWN)
        canvas.ellipse(cx + 7, feet - 11, 4, 4, _BROWN)
        canvas.rectangle(cx + 9, feet - 11, cx + 10, feet - 10, _DARK)
        canvas.polygon([(cx - 8, feet - 9), (cx - 12, feet - 15), (cx - 5, feet - 9)], _BROWN)
    elif companion == "ball":
        canvas.ellipse(cx, feet - 7, 8, 8, _DARK)
        canvas.ellipse(cx, feet - 7, 7, 7, _PALE)
        canvas.ellipse(cx, feet - 7, 2, 2, _DARK)
        for dx, dy in ((-5, -4), (5, -4), (0, 6)):
            canvas.rectangle(cx + dx - 1, feet - 7 + dy - 1, cx + dx + 1, feet - 7 + dy + 1, _DARK)
    elif companion == "umbrella":
        canvas.rectangle(cx - 7, 8, cx - 5, feet - 12, _DARK)
        canvas.rectangle(x + 6, feet - 17, cx - 5, feet - 14, _SKIN)
        canvas.ellipse(cx - 9, 11, 20, 11, (150, 60, 150), upper_half=True)
    else:
        raise ValueError(f"companion must be one of {', '.join(COMPANIONS)}, got {companion!r}")
    return canvas
