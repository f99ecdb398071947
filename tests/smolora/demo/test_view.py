"""What the page shows of answers, by hand."""

from __future__ import annotations

from types import SimpleNamespace

from smolora.demo.answers import Reply
from smolora.demo.view import answers_table, picture_view, routing_view, style_sheet
from smolora.report import palette

RUNS = [SimpleNamespace(name=name, method=name) for name in ("smolora", "seqlora")]
LAYERS = [
    {"layer": "projector", "vu": [1], "if": [0], "alpha": 0.25, "beta": 0.75},
    {"layer": "layers.0.mlp", "vu": None, "if": [2], "alpha": 0.0, "beta": 1.0},
]
EXPERTS = {"projector": (2, 3), "layers.0.mlp": (2, 3)}
REPLIES = [
    Reply("smolora", "1-A", "<b>red</b> bus", True, 1.0, None, LAYERS, EXPERTS),
    Reply("smolora", "2-B", "<b>red</b> cat", False, None, "B", LAYERS, EXPERTS),
    Reply("seqlora", "1-A", "", None, None, None, [], {}),
]


def test_answers_side_by_side():
    table = answers_table(RUNS, REPLIES, "a <i>bus</i>")
    assert "a &lt;i&gt;bus&lt;/i&gt;" in table and "<b>" not in table
    assert "&lt;b&gt;red&lt;/b&gt; bus" in table  # the first stage has nothing to differ from
    assert "<mark>cat</mark>" in table and table.count("changed") == 1
    assert "(empty)" in table and table.count("taken for B") == 1 and "form not judged" in table
    assert table.count('class="note good"') == 2 and table.count('class="note bad"') == 1
    assert "Reference" not in answers_table(RUNS, REPLIES, None)


def test_experts_and_shares_of_each_layer():
    shown = routing_view(RUNS, REPLIES)
    assert shown.count("<h3>") == 1 and "VU 1; IF 0; α 0.25; β 0.75" in shown and "IF 2; α 0.00; β 1.00" in shown
    assert shown.count('class="cell"') == 2  # each branch has one shade: chosen
    assert "None of these runs routes" in routing_view(RUNS, REPLIES[2:])


def test_pictures_and_style(tmp_path):
    assert "no picture" in picture_view(None, "x")
    sheet = style_sheet()
    assert palette.LIGHT[0] in sheet and palette.DARK_PAGE in sheet and "</" not in sheet
