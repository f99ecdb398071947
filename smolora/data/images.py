"""Images as LLaVA-1.5 processes them: RGB, padded to a square with the mean colour, then CLIP's processing by Pillow.

As there, an alpha channel is dropped and the camera's orientation (EXIF) is ignored. Unlike there, images of 16 bits or
of floats are scaled to 8 bits; LLaVA reads them as white.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import CLIPImageProcessorPil

LONGEST_SIDE = 8192  # of a square, 200 MB; longer images are shrunk first
LONGEST_SHAPE = 32  # times the shorter side; beyond it, a square is limited to a quarter, and a crop loses its ends
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags: bits a channel, 0 if white is 0, 2 if signed


class BrokenImageError(ValueError):
    """Raised for an image that is missing or cannot be decoded; the message has its path."""


def read_image(path: Path) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        BrokenImageError: there is no such file, it is not a complete image, or its white level is unknown.
    """
    with _opened(path) as image:
        if image.mode == "F" or image.mode.startswith("I"):
            return _to_8_bits(image).convert("RGB")
        return image.convert("RGB")


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height of an image file, without decoding it.

    Raises:
        BrokenImageError: there is no such file, or it is no image.
    """
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image file; what fails until it is closed is a `BrokenImageError`."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError as error:
        raise BrokenImageError(f"there is no image {path}") from error
    except UnidentifiedImageError as error:
        raise BrokenImageError(f"{path} is no image that Pillow knows") from error
    except Exception as error:  # a decoder may raise anything for a broken file
        raise BrokenImageError(f"cannot decode {path}: {str(error) or type(error).__name__}") from error


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Convert a grey image of more than 8 bits, or of floats from 0 to 1, to 8 bits."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        white = 1.0
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"floats must lie in [0, 1], where 1 is white, got {values.min():g} to {values.max():g}")
    else:
        # Pillow reads PNG and PGM images of 16 bits as 32
        bits = 16 if image.format in ("PNG", "PPM") else tags.get(BITS, (16 if ";16" in image.mode else 32,))[0]
        if bits > 16:
            raise ValueError(f"integers of {bits} bits do not say what is white: save it with 8 or 16 bits")
        if values.min() < 0:
            raise ValueError(f"integers must not be negative, got {values.min():g}")
        white = 2.0 ** (bits - (tags.get(SAMPLE_FORMAT, (1,))[0] == 2)) - 1
    if tags.get(PHOTOMETRIC) == 0:
        values = white - values
    return Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Centre an image in a square of its longer side."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _bounded(image: Image.Image, square: bool) -> Image.Image:
    """Shrink or crop an image whose square or enlargement would take more than a few hundred MB.

    Images of usual shape and size are returned as they are.
    """
    short, long = sorted(image.size)
    extreme = long > LONGEST_SHAPE * short
    limit = LONGEST_SIDE // 4 if extreme else LONGEST_SIDE
    if square and long > limit and short < long:
        return image.resize([max(1, round(side * limit / long)) for side in image.size])
    if not square and extreme:
        width, height = (min(side, LONGEST_SHAPE * short) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))
    return image


class ImageTransform:
    """The transform of an image file to the vision tower's input.

    Args:
        processor: sizes, mean and standard deviation.
        square: pad to a square first; otherwise CLIP's centre crop cuts off the ends of the longer side.
    """

    def __init__(self, processor: CLIPImageProcessorPil, *, square: bool = True) -> None:
        self.processor = processor
        self.square = square
        red, green, blue = (int(255 * mean) for mean in processor.image_mean)
        self.colour = red, green, blue

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, square: bool = True) -> ImageTransform:
        """Load the transform of a model's folder (`preprocessor_config.json` or `processor_config.json`)."""
        return cls(CLIPImageProcessorPil.from_pretrained(folder), square=square)

    def __call__(self, path: Path) -> Tensor:
        """Return the pixels (3, height, width), float32.

        Raises:
            BrokenImageError: see `read_image`.
        """
        image = _bounded(read_image(path), self.square)
        if self.square:
            image = pad_to_square(image, self.colour)
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels.to(torch.float32)
