"""Images as LLaVA-1.5 takes them: RGB, padded to a square with the mean colour, then CLIP's own processing by PIL.

As there, what an image's alpha channel hides is shown, and the orientation that a camera noted (EXIF) is left alone.
Pictures of 16 bits and of floats, which it reads as white, are scaled to 8 bits here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import CLIPImageProcessorPil

LONGEST_SIDE = 8192  # of a square: 200 MB; a picture of a longer side is made smaller first
LONGEST_SHAPE = 32  # times the shorter side: of what is longer a square has a quarter of that, and a crop no ends
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of a TIFF: bits a channel, 0 if its white is 0, 2 if signed


class BrokenImageError(ValueError):
    """An image is missing or cannot be decoded; the message has its path."""


def read_image(path: Path) -> Image.Image:
    """An image file, decoded, in RGB.

    Raises:
        BrokenImageError: there is no such file, it holds no whole image, or it is not known what white is in it.
    """
    try:
        with Image.open(path) as image:
            if image.mode == "F" or image.mode.startswith("I"):
                image = _of_8_bits(image)
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise BrokenImageError(f"there is no image {path}") from error
    except UnidentifiedImageError as error:
        raise BrokenImageError(f"{path} is no image that Pillow knows") from error
    except Exception as error:  # of a broken file a decoder raises anything
        raise BrokenImageError(f"cannot decode {path}: {str(error) or type(error).__name__}") from error


def _of_8_bits(image: Image.Image) -> Image.Image:
    """A grey picture of more than 8 bits, or of floats from 0 to 1, as one of 8 bits."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        white = 1.0
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"floats must lie in [0, 1], where 1 is white, got {values.min():g} to {values.max():g}")
    else:
        # of 32 bits Pillow makes PNG's and PGM's 16 as well
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
    """The image in the middle of a square as large as its longer side."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _bounded(image: Image.Image, square: bool) -> Image.Image:
    """A picture of which neither its square nor its enlargement takes more than some hundred MB.

    Of a usual shape and size, it is the picture itself.
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
    """From an image file to the vision tower's input.

    Args:
        processor: sizes, mean and standard deviation.
        square: pad to a square first; else CLIP's centre crop cuts off what is longer.
    """

    def __init__(self, processor: CLIPImageProcessorPil, *, square: bool = True) -> None:
        self.processor = processor
        self.square = square
        red, green, blue = (int(255 * mean) for mean in processor.image_mean)
        self.colour = red, green, blue

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, square: bool = True) -> ImageTransform:
        """The transform of a model's folder (`preprocessor_config.json` or `processor_config.json`)."""
        return cls(CLIPImageProcessorPil.from_pretrained(folder), square=square)

    def __call__(self, path: Path) -> Tensor:
        """The pixels (3, height, width), float32.

        Raises:
            BrokenImageError: there is no such file, or it holds no whole image.
        """
        image = _bounded(read_image(path), self.square)
        if self.square:
            image = pad_to_square(image, self.colour)
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels.to(torch.float32)
