"""Images: RGB, square, and broken ones named."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from smolora.data.images import BrokenImageError, ImageTransform, _bounded, pad_to_square, read_image

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


RAMP = np.linspace(0, 1, 64)[None].repeat(8, 0)


def saved(path, values, **tags):
    Image.fromarray(values).save(path, **tags)
    return path


@pytest.mark.parametrize("name", ["x.png", "x.tiff", "x.pgm"])
def test_16_bits_are_scaled(tmp_path, name):
    grey = np.asarray(read_image(saved(tmp_path / name, (RAMP * 65535).astype(np.uint16))))
    assert np.abs(grey - 255 * RAMP[..., None]).max() <= 1 and grey.min() == 0 and grey.max() == 255


def test_floats_are_scaled(tmp_path):
    grey = np.asarray(read_image(saved(tmp_path / "x.tiff", RAMP.astype(np.float32))))
    assert np.abs(grey - 255 * RAMP[..., None]).max() <= 1


def tiff(bits, data, *, signed=False, order="<"):
    """A grey TIFF of 64 x 8, which Pillow does not write itself."""
    tags = [(256, 64), (257, 8), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, len(data))]
    tags.append((339, 2 if signed else 1))
    directory = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data))
    return head + data + struct.pack(order + "H", len(tags)) + directory + struct.pack(order + "I", 0)


@pytest.mark.parametrize("kind", ["signed", "other end first", "12 bits"])
def test_further_tiffs_are_scaled(tmp_path, kind):
    values = (RAMP * 4095).astype(np.uint16)
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    content = {
        "signed": lambda: tiff(16, (RAMP * 32767).astype("<i2").tobytes(), signed=True),
        "other end first": lambda: tiff(16, (RAMP * 65535).astype(">u2").tobytes(), order=">"),
        "12 bits": lambda: tiff(12, packed.astype(np.uint8).tobytes()),
    }[kind]()
    (tmp_path / "x.tiff").write_bytes(content)
    grey = np.asarray(read_image(tmp_path / "x.tiff"))
    assert np.abs(grey - 255 * RAMP[..., None]).max() <= 1


def test_8_bits_are_left_alone(tmp_path):
    values = (RAMP * 255).astype(np.uint8)
    assert np.array_equal(np.asarray(read_image(saved(tmp_path / "x.png", values)))[..., 0], values)


def test_white_is_zero(tmp_path):
    """A TIFF may say so; of 16 bits Pillow leaves it to the reader."""
    grey = np.asarray(read_image(saved(tmp_path / "x.tiff", (RAMP * 65535).astype(np.uint16), tiffinfo={262: 0})))
    assert np.abs(grey - 255 * (1 - RAMP)[..., None]).max() <= 1


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ((RAMP * 2e9).astype(np.int32), "integers of 32 bits do not say what is white"),
        ((RAMP * 255).astype(np.float32), r"floats must lie in \[0, 1\], where 1 is white, got 0 to 255"),
        ((RAMP - 0.5).astype(np.float32), r"floats must lie in \[0, 1\]"),
        (np.full((4, 4), np.nan, np.float32), r"floats must lie in \[0, 1\]"),
    ],
)
def test_a_picture_whose_white_is_not_known_is_refused(tmp_path, values, match):
    with pytest.raises(BrokenImageError, match=match):
        read_image(saved(tmp_path / "x.tiff", values))


def test_what_is_invisible_is_shown_and_orientation_left_alone(tmp_path):
    """As LLaVA-1.5 has it: alpha is dropped, whatever file it is in, and EXIF turns nothing."""
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[..., 0] = 200
    image = Image.fromarray(clear)
    image.save(tmp_path / "rgba.png")
    image.save(tmp_path / "rgba.webp", lossless=True, exact=True)
    image.convert("LA").save(tmp_path / "la.png")
    image.convert("RGB").convert("P").save(tmp_path / "p.png", transparency=0)
    image.convert("RGB").save(tmp_path / "trns.png", transparency=(200, 0, 0))
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    for path in sorted(tmp_path.iterdir()):
        found = read_image(path)
        assert found.mode == "RGB" and found.size == (8, 8)
        assert found.getpixel((4, 4))[0] > 50 and found.getpixel((4, 4))[2] < 70, (
            path
        )  # neither black nor the 2nd frame
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (24, 16), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (24, 16)


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize(
    "size", [(1, 1), (3, 3), (1, 3), (3, 1), (4, 1), (3, 200), (20_000, 1), (2, 50_000), (9000, 200)]
)
def test_any_shape(tmp_path, size, square):
    """A pixel, a row, very long ones: red where the picture is, and never more memory than some pictures take."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    Image.new("RGB", size, (255, 0, 0)).save(tmp_path / "x.png")
    biggest = []
    resize, new = Image.Image.resize, Image.new
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", lambda self, to, *a, **k: biggest.append(to) or resize(self, to, *a, **k))
        patch.setattr(Image, "new", lambda mode, to, *a: biggest.append(to) or new(mode, to, *a))
        pixels = ImageTransform(processor, square=square)(tmp_path / "x.png")
    assert pixels.shape == (3, 336, 336) and torch.isfinite(pixels).all()
    assert all(width * height <= 8192**2 for width, height in biggest)
    if not square or size[0] == size[1]:
        red = pixels[:, 168, 168] * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
        assert torch.allclose(red, torch.tensor([1.0, 0, 0]), atol=0.02)


def test_a_usual_shape_is_not_touched(processor):
    for size in ((640, 480), (8192, 5000), (2000, 3), (7, 7), (9000, 9000)):
        image = Image.new("RGB", size)
        assert _bounded(image, True) is image
    assert _bounded(Image.new("RGB", (9000, 300)), True).size == (8192, 273)
    assert _bounded(Image.new("RGB", (9000, 200)), True).size == (2048, 46)
    for size in ((640, 480), (20_000, 5000), (100, 3200), (7, 7)):
        image = Image.new("RGB", size)
        assert _bounded(image, False) is image


@pytest.mark.parametrize(
    "error",
    [RuntimeError("no"), IndexError("1"), EOFError(), AttributeError("x"), TypeError("y"), MemoryError(), KeyError(3)],
)
def test_whatever_a_decoder_raises(tmp_path, monkeypatch, error):
    def load(self, *args, **kwargs):
        raise error

    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "convert", load)
    with pytest.raises(BrokenImageError, match=r"cannot decode .*x\.png: ."):
        read_image(tmp_path / "x.png")


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
