"""Pictures in integers: their shapes, and PNG files of them."""

import io

import numpy as np
import pytest
from PIL import Image

from smolora.minicvit import drawing


@pytest.mark.parametrize("size", [(1, 1), (48, 48), (300, 90)])  # the last is stored in two blocks
def test_png_files_hold_the_pixels(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(drawing.png(pixels))) as image:
        assert np.array_equal(np.asarray(image), pixels)


def test_a_polygon_is_filled_to_its_edges():
    canvas = drawing.Canvas(8, 8, (0, 0, 0))
    canvas.polygon([(1, 1), (5, 1), (5, 4), (1, 4)], (9, 9, 9))
    square = drawing.Canvas(8, 8, (0, 0, 0))
    square.rectangle(1, 1, 5, 4, (9, 9, 9))
    assert np.array_equal(canvas.pixels, square.pixels) and canvas.pixels.any()


def test_blurring_keeps_what_is_flat_and_spreads_what_is_not():
    canvas = drawing.Canvas(20, 20, (40, 80, 120))
    flat = canvas.pixels.copy()
    canvas.blur(2)
    assert np.array_equal(canvas.pixels, flat)
    canvas.rectangle(10, 10, 11, 11, (240, 80, 120))
    canvas.blur(1)
    changed = (canvas.pixels != flat).any(-1)
    assert changed[10, 12] and not changed[10, 13] and canvas.pixels[10, 10, 0] < 100
