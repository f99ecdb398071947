"""Small pictures drawn in integer arithmetic, and PNG files of them, with the same bytes on every machine.

Pillow and zlib are not used, since the way they fill polygons and compress bytes has changed between versions.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from functools import cache

import numpy as np

Colour = tuple[int, int, int]
Point = tuple[int, int]

# capitals of 5 x 7 pixels: a byte for each row, whose five low bits are the pixels from left to right
_GLYPHS = {
    "A": "0e1111 1f111111",
    "B": "1e1111 1e11111e",
    "C": "0e1110 1010110e",
    "D": "1e1111 1111111e",
    "E": "1f1010 1e10101f",
    "F": "1f1010 1e101010",
    "G": "0e1110 1711110e",
    "H": "111111 1f111111",
    "I": "0e0404 0404040e",
    "J": "070202 0202120c",
    "K": "111214 18141211",
    "L": "101010 1010101f",
    "M": "111b15 15111111",
    "N": "111119 15131111",
    "O": "0e1111 1111110e",
    "P": "1e1111 1e101010",
    "Q": "0e1111 1115120d",
    "R": "1e1111 1e141211",
    "S": "0f1010 0e01011e",
    "T": "1f0404 04040404",
    "U": "111111 1111110e",
    "V": "111111 11110a04",
    "W": "111111 15151b11",
    "X": "11110a 040a1111",
    "Y": "11110a 04040404",
    "Z": "1f0102 0408101f",
}
GLYPH_WIDTH, GLYPH_HEIGHT = 6, 7  # with the column between two letters


class Canvas:
    """An RGB picture of `height` x `width` pixels. Drawing outside of it has no effect.

    Attributes:
        pixels: uint8 (height, width, 3).
    """

    def __init__(self, width: int, height: int, colour: Colour) -> None:
        self.pixels = np.empty((height, width, 3), dtype=np.uint8)
        self.pixels[:] = colour
        self._y, self._x = _centres(width, height)

    def rectangle(self, left: int, top: int, right: int, bottom: int, colour: Colour) -> None:
        """Fill pixels from `left` to `right` and from `top` to `bottom`, both ends exclusive."""
        self.pixels[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = colour

    def ellipse(self, x: int, y: int, rx: int, ry: int, colour: Colour, *, upper_half: bool = False) -> None:
        """Fill an ellipse around (x, y) with radii `rx` and `ry`, in pixels."""
        inside = ((self._x - 2 * x) * ry) ** 2 + ((self._y - 2 * y) * rx) ** 2 <= (2 * rx * ry) ** 2
        if upper_half:
            inside &= self._y < 2 * y
        self.pixels[inside] = colour

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        """Fill the pixels whose centres are inside the polygon."""
        inside = np.zeros(self._x.shape, dtype=bool)
        for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
            if ay == by:
                continue
            if ay > by:
                ax, ay, bx, by = bx, by, ax, ay
            crosses = (self._y > 2 * ay) & (self._y < 2 * by)
            # the edge passes this row to the right of the pixel's centre
            inside ^= crosses & ((self._x - 2 * ax) * (by - ay) < (self._y - 2 * ay) * (bx - ax))
        self.pixels[inside] = colour

    def text(self, x: int, y: int, word: str, colour: Colour, scale: int = 1) -> None:
        """Write a word in capitals, with its upper left corner at (x, y)."""
        for index, letter in enumerate(word.upper()):
            for row, bits in enumerate(bytes.fromhex(_GLYPHS[letter])):
                for column in range(GLYPH_WIDTH - 1):
                    if bits >> (GLYPH_WIDTH - 2 - column) & 1:
                        left, top = x + (index * GLYPH_WIDTH + column) * scale, y + row * scale
                        self.rectangle(left, top, left + scale, top + scale, colour)

    def blend(self, x: int, y: int, cover: np.ndarray, full: int, colour: Colour) -> None:
        """Blend in a colour with opacity `cover / full`; `cover` is (h, w) integers, with its corner at (x, y)."""
        height, width = cover.shape
        below = self.pixels[y : y + height, x : x + width].astype(np.int32)
        strength = cover.astype(np.int32)[..., None]
        mixed = (below * (full - strength) + np.array(colour, dtype=np.int32) * strength + full // 2) // full
        self.pixels[y : y + height, x : x + width] = mixed

    def blur(self, radius: int) -> None:
        """Apply a box filter of 2 radius + 1 pixels twice."""
        side = 2 * radius + 1
        for _ in range(2):
            for axis in (0, 1):
                around = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
                sums = np.cumsum(np.pad(self.pixels, around, mode="edge").astype(np.int32), axis)
                sums = np.concatenate([np.zeros_like(sums.take([0], axis)), sums], axis)
                count = self.pixels.shape[axis]
                upper, lower = sums.take(range(side, side + count), axis), sums.take(range(count), axis)
                self.pixels = ((upper - lower + side // 2) // side).astype(np.uint8)


@cache
def _centres(width: int, height: int) -> np.ndarray:
    """Return y and x of the pixels' centres in half pixels, (2, height, width)."""
    return np.mgrid[1 : 2 * height : 2, 1 : 2 * width : 2].astype(np.int32)


def enlarge(values: np.ndarray, times: int) -> np.ndarray:
    """Enlarge a grey picture (h, w) to (times h, times w) and smooth it; multiplies its values by 9."""
    big = np.pad(np.kron(values.astype(np.int32), np.ones((times, times), dtype=np.int32)), 1)
    rows = big[:-2] + big[1:-1] + big[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


def png(pixels: np.ndarray) -> bytes:
    """Encode uint8 pixels (height, width, 3) as a PNG file.

    The pixels are stored uncompressed, since a compressor's output depends on the library's build.
    """
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], 1).tobytes()
    blocks = [rows[start : start + 0xFFFF] for start in range(0, len(rows), 0xFFFF)]
    stream = b"\x78\x01"
    for index, block in enumerate(blocks):
        stream += struct.pack("<BHH", index == len(blocks) - 1, len(block), len(block) ^ 0xFFFF) + block
    stream += struct.pack(">I", zlib.adler32(rows))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB
    chunks = ((b"IHDR", header), (b"IDAT", stream), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
