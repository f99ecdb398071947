"""Text that becomes a part of a Markdown page, whatever is in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import quote

# an underscore within a word means nothing, and names are full of them
_SIGNS = re.compile(r"[\\`*\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Markup(str):
    """Text that is Markdown already."""


def escape(text: str) -> str:
    """A text that shows as it is, in a table, a heading or a line: no markup, no HTML, no formula; lines by `<br>`."""
    if isinstance(text, Markup):
        return text
    text = printable(text)
    return Markup(_SIGNS.sub(r"\\\g<0>", text).replace("\n", "<br>"))


def printable(text: str) -> str:
    """A text without control characters and half characters, and with `\\n` alone between its lines."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n").replace("\r", "\n"))


def picture(title: str, path: str) -> Markup:
    """An image."""
    return Markup(f"![{escape(title)}]({quote(path)})")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column stands left, the others right."""
    lines = ["|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    lines = ["| " + " | ".join(map(escape, header)) + " |", *lines]
    return "\n".join([*lines, *("| " + " | ".join(map(escape, row)) + " |" for row in rows)])
