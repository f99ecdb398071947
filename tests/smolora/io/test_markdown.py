"""Any text shows as it is: in a table, in a heading, beside a picture."""

from __future__ import annotations

import html
import re

import pytest

from smolora.io.markdown import escape, picture, printable, table

TEXTS = [
    "plain",
    "a | b",
    "a \\| b",
    "back\\slash",
    "two\nlines",
    "two\r\nlines",
    "old\rmac",
    "<b>bold</b>",
    "<img src=x onerror=y>",
    "*a* **b** _c_ __d__ ~~e~~",
    "`code`",
    "[link](http://x)",
    "![image](x)",
    "&amp; & &lt;",
    "$x^2$ costs $5",
    "snake_case_name",
    "| --- |",
    "a\x00b\x1b[31mred",
    "half \ud83d",
    "line\u2028separator",
    " ",
    "\\",
    "|",
    "x" * 300,
    "",
]


def shown(cell: str) -> str:
    """What a reader sees of a cell's HTML."""
    return html.unescape(re.sub("<[^>]+>", "", cell.replace("<br>", "\n").replace("<br />", "\n")))


@pytest.mark.parametrize("text", TEXTS)
def test_a_table_keeps_its_shape_and_shows_every_text(text):
    """By a Markdown parser: two columns, and no element but line breaks within a cell."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table")
    page = parser.render(table(["name", text], [["row", text], [text, "end"]]))
    cells = re.findall("<t[hd][^>]*>(.*?)</t[hd]>", page, re.S)
    assert len(cells) == 6 and page.count("<table>") == 1
    for cell in (cells[1], cells[3], cells[4]):
        assert set(re.findall("<[^>]+>", cell)) <= {"<br>", "<br />"}
        assert shown(cell) == printable(text).strip(" \t") or shown(cell).split() == printable(text).split()


def test_escaped_once():
    assert escape("a | b") == "a \\| b" and escape(escape("a | b")) == "a \\| b"
    assert escape("SMOLORA_BACKEND") == "SMOLORA_BACKEND" and escape("_x_") == "\\_x\\_"


def test_a_picture_with_a_name_of_several_words():
    assert picture("Places365, 5-shot 3", "cases/Places365, 5-shot-3.png") == (
        "![Places365, 5-shot 3](cases/Places365%2C%205-shot-3.png)"
    )
    assert picture("a]b", "x.png") == "![a\\]b](x.png)"
