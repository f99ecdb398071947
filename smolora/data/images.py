"""Images as LLaVA-1.5 takes them: RGB, padded to a square with the mean colour, then CLIP's own processing by PIL."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import CLIPImageProcessorPil


class BrokenImageError(ValueError):
    """An image is missing or cannot be decoded; the message has its path."""


def read_image(path: Path) -> Image.Image:
    """An image file, decoded, in RGB.

    Raises:
        BrokenImageError: there is no such file, or it holds no whole image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise BrokenImageError(f"there is no image {path}") from error
    except UnidentifiedImageError as error:
        raise BrokenImageError(f"{path} is no image that Pillow knows") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenImageError(f"cannot decode {path}: {error}") from error


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square as large as its longer side."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


class ImageTransform:
    """From an image file to the vision tower's input.

    Args:
        processor: sizes, mean and standard deviation.
        square: pad to a square first; else CLIP's centre crop cuts off what is longer.
    """

    def __init__(self, processor: CLIPImageProcessorPil, *, square: bool = True) -> None:
        self.processor = processor
        self.square = square
        self.colour = tuple(int(255 * mean) for mean in processor.image_mean)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, square: bool = True) -> ImageTransform:
        """The transform of a model's folder (`preprocessor_config.json` or `processor_config.json`)."""
        return cls(CLIPImageProcessorPil.from_pretrained(folder), square=square)

    def __call__(self, path: Path) -> Tensor:
        """The pixels (3, height, width), float32.

        Raises:
            BrokenImageError: there is no such file, or it holds no whole image.
        """
        image = read_image(path)
        if self.square:
            image = pad_to_square(image, self.colour)
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels.to(torch.float32)
