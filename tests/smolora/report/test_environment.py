"""The templates' filters and their escaping."""

from __future__ import annotations

import pytest

from smolora.report.environment import environment, sort_key
from smolora.report.tables import Spread


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1,600", 1600.0),
        ("-2.5", -2.5),
        ("-", None),
        ("0, 1", None),
        ("3-x", None),
        (2.5, 2.5),
        (Spread(3.0, 1.0), 3.0),
    ],
)
def test_what_a_table_is_sorted_by(value, expected):
    assert sort_key(value) == expected


@pytest.mark.parametrize("package", ["smolora.report", "smolora.demo"])
def test_text_is_escaped_and_printable(package):
    template = environment(package).from_string("{% import 'macros.html' as draw %}{{ value }}")
    assert template.render(value="<b>\x1b") == "&lt;b&gt;\ufffd"
