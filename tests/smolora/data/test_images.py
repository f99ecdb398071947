"""Images: RGB, square, and broken ones named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from smolora.data.images import BrokenImageError, ImageTransform, pad_to_square, read_image

MEAN = (0.48145466, 0.4578275, 0.40821073)


@pytest.fixture
def processor():
    return CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_mean=MEAN)


@pytest.mark.parametrize(("size", "box"), [((6, 3), (0, 1, 6, 4)), ((3, 6), (1, 0, 4, 6)), ((5, 5), (0, 0, 5, 5))])
def test_square(size, box):
    square = pad_to_square(Image.new("RGB", size, "white"), (1, 2, 3))
    assert square.size == (max(size),) * 2
    pixels = np.asarray(square)
    left, top, right, bottom = box
    inside = np.zeros(pixels.shape[:2], bool)
    inside[top:bottom, left:right] = True
    assert (pixels[inside] == 255).all() and (pixels[~inside] == (1, 2, 3)).all()


def test_colour_is_the_mean(processor):
    assert ImageTransform(processor).colour == (122, 116, 104)  # int(255 * mean)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, processor, mode):
    path = tmp_path / "x.tiff"
    Image.new(mode, (10, 6)).save(path)
    assert read_image(path).mode == "RGB"
    pixels = ImageTransform(processor)(path)
    assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.float32


def test_without_a_square_the_centre_is_cut_out(tmp_path, processor):
    """A wide image, white but for black ends, which only the square keeps."""
    image = Image.new("RGB", (48, 8), "white")
    image.paste("black", (0, 0, 16, 8))
    image.save(tmp_path / "x.png")
    white = (1 - np.array(MEAN)) / np.array(processor.image_std)
    cropped = ImageTransform(processor, square=False)(tmp_path / "x.png")
    np.testing.assert_allclose(cropped.numpy(), np.broadcast_to(white[:, None, None], (3, 8, 8)), rtol=1e-5)
    assert ImageTransform(processor)(tmp_path / "x.png").min() < -1


def test_padding_is_almost_zero_after_normalisation(tmp_path, processor):
    Image.new("RGB", (64, 8), "white").save(tmp_path / "x.png")
    pixels = ImageTransform(processor)(tmp_path / "x.png")
    assert pixels[:, 0].abs().max() < 0.02 and pixels[:, 4].min() > 0.5


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "there is no image"),
        (b"", "is no image that Pillow knows"),
        (b"GIF89a", "cannot decode|is no image"),
        ("half", "cannot decode"),
    ],
)
def test_broken_images_are_named(tmp_path, content, match):
    path = tmp_path / "broken.png"
    if content == "half":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        content = path.read_bytes()[:4000]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BrokenImageError, match=match) as error:
        read_image(path)
    assert str(path) in str(error.value)


def test_folder_is_no_image(tmp_path):
    with pytest.raises(BrokenImageError, match="cannot decode"):
        read_image(tmp_path)


def test_equals_the_processor_alone_for_a_square_image(tmp_path, processor):
    pixels = np.random.default_rng(0).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    expected = processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ImageTransform(processor)(tmp_path / "x.png"), expected, rtol=0, atol=0)
