"""Pictures of Grounding's cases with the true box and those that were answered."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

from PIL import Image, ImageDraw, ImageFont

from ..evaluate.grounding import written_box
from .palette import LIGHT

Box = tuple[Decimal, ...]

TRUTH = "the true box"
MARGIN, LINE = 4, 14  # pixels around the legend, and of a line of it
BLACK, WHITE, GREY = (0, 0, 0), (255, 255, 255), (110, 110, 110)


def draw_boxes(image: Image.Image, truth: Box, answers: Mapping[str, str], side: int) -> Image.Image:
    """Draw boxes on a picture, with a legend below it.

    Args:
        image: the picture, RGB.
        truth: the true box, from 0 to 1 relative to the square that the picture is padded to.
        answers: the answers by their title. One without a box is named in the legend.
        side: longer side of the picture that is drawn on, in pixels. A small one is enlarged.
    """
    longer = max(image.size)
    resample = Image.Resampling.NEAREST if longer < side else Image.Resampling.LANCZOS
    size = [max(1, round(length * side / longer)) for length in image.size]
    legend = [(TRUTH, BLACK)]
    drawn: list[tuple[Box, tuple[int, int, int]]] = []
    for index, (title, text) in enumerate(answers.items()):
        box = written_box(text)
        colour = _rgb(LIGHT[index % len(LIGHT)])
        legend.append((title, colour) if box is not None else (f"{title}: no box", GREY))
        if box is not None:
            drawn.append((box, colour))
    sheet = Image.new("RGB", (max(size[0], side), size[1] + 2 * MARGIN + LINE * len(legend)), WHITE)
    sheet.paste(image.resize(tuple(size), resample), (0, 0))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default_imagefont()
    for number, (box, colour) in enumerate([(truth, BLACK), *drawn]):
        corners = _corners(box, size, side)
        if number == 0:  # a white line around the black one stands out on anything
            draw.rectangle(corners, outline=WHITE, width=4)
        draw.rectangle(corners, outline=colour, width=2)
    for place, (title, colour) in enumerate(legend):
        y = size[1] + MARGIN + place * LINE
        draw.rectangle((MARGIN, y + 1, MARGIN + 9, y + 10), outline=colour, width=2)
        draw.text((MARGIN + 15, y), title.encode("ascii", "replace").decode(), colour, font)
    return sheet


def _corners(box: Box, size: list[int], side: int) -> tuple[float, ...]:
    """Left, top, right and bottom in pixels. Wrong orders are put right, and nothing leaves the picture."""
    (left, right), (top, bottom) = (sorted(float(value) * side for value in box[axis::2]) for axis in (0, 1))
    across, down = (side - size[0]) // 2, (side - size[1]) // 2
    xs = [min(max(x - across, 0), size[0] - 1) for x in (left, right)]
    ys = [min(max(y - down, 0), size[1] - 1) for y in (top, bottom)]
    return xs[0], ys[0], xs[1], ys[1]


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return red, green, blue
