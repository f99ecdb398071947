"""The command `smolora metrics`."""

from __future__ import annotations

import json

import pytest

from smolora import cli
from smolora.evaluate import paper

TASKS = ["one", "two", "three"]
MATRIX = [[80.0], [70.0, 60.0], [50.0, 40.0, 90.0]]


def test_command(tmp_path, capsys):
    path = tmp_path / "matrix.json"
    path.write_text(json.dumps({"tasks": list(paper.UPSTREAM), "matrix": paper.TABLE_6["multi"]}))
    assert cli.main(["metrics", str(path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [round(figures[name][-1], 2) for name in ("AP", "MAP", "BWT")] == [83.02, 85.05, -6.5]
    assert figures["BWT"][0] is None
    assert cli.main(["metrics", str(path)]) == 0
    assert "83.02" in capsys.readouterr().out
    path.write_text(json.dumps({"tasks": TASKS, "matrix": MATRIX[:2]}))
    assert cli.main(["metrics", str(path), "--json"]) == 1
    assert "matrix.json: matrix: 3 cells are missing" in capsys.readouterr().err
    assert cli.main(["metrics", str(path), "--json", "--allow-missing"]) == 0
    assert json.loads(capsys.readouterr().out)["AP"] == [80, 65, None]
    path.write_text("[]")
    assert cli.main(["metrics", str(path)]) == 1
    assert "must hold an object" in capsys.readouterr().err


def test_command_by_coins_convention(tmp_path, capsys):
    path = tmp_path / "matrix.json"
    path.write_text(json.dumps({"tasks": TASKS, "matrix": MATRIX, "mif": None}))
    assert cli.main(["metrics", str(path), "--convention", "coin", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["BWT"] == [0, -5, pytest.approx(-50 / 3)] and list(figures) == ["ACC", "MAA", "BWT"]
    assert cli.main(["metrics", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["BWT"] == [None, -10, -25]
    assert cli.main(["metrics", str(path), "--convention", "coin"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["stage", "ACC", "MAA", "BWT"] and rows[-1].split() == ["three", "60.00", "68.33", "-16.67"]
    path.write_text(json.dumps({"tasks": list(paper.UPSTREAM), "matrix": paper.TABLE_5["single"]}))
    assert cli.main(["metrics", str(path), "--convention", "coin"]) == 0
    assert "disagree" not in capsys.readouterr().out


def test_command_by_mllm_cls_convention(tmp_path, capsys):
    path = tmp_path / "matrix.json"
    path.write_text(json.dumps({"tasks": TASKS, "matrix": MATRIX}))
    assert cli.main(["metrics", str(path), "--convention", "mllm-cl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "MFT": [80, 70, pytest.approx(230 / 3)],
        "MFN": [80, 65, 60],
        "MAA": [80, 72.5, pytest.approx(205 / 3)],
        "BWT": [None, -10, -25],
    }
    for content, mft in [({"matrix": [[1.0, 2.0, 3.0]]}, [None]), ({"matrix": MATRIX, "method": "dirlora"}, 230 / 3)]:
        path.write_text(json.dumps({"tasks": TASKS, **content}))
        assert cli.main(["metrics", str(path), "--convention", "mllm-cl", "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["MFT"] == mft or figures["MFT"][-1] == figures["MFN"][-1] == pytest.approx(mft)


@pytest.mark.parametrize(("table", "expected"), [(paper.TABLE_5, ["VQAv2: 64.61", "AP: 46.21"]), (paper.TABLE_6, [])])
def test_command_lists_where_the_papers_tables_disagree(tmp_path, capsys, table, expected):
    path = tmp_path / "matrix.json"
    path.write_text(json.dumps({"tasks": list(paper.UPSTREAM), "matrix": table["single"]}))
    assert cli.main(["metrics", str(path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "disagree" in line]
    assert len(lines) == len(expected)
    for line, words in zip(lines, expected, strict=True):
        assert line.startswith(f"the paper's tables disagree: Table 1, single-type, SeqLoRA, {words}, but ")


def test_command_for_an_adapter_a_task(tmp_path, capsys):
    """With the matrix's form, or the run's results, whose method says it."""
    path = tmp_path / "results.json"
    for method in ("dirlora", "DirLoRA"):
        path.write_text(json.dumps({"tasks": TASKS, "matrix": [[80, 60, 90]], "method": method}))
        assert cli.main(["metrics", str(path), "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["AP"][:2] == [80, 70] and figures["MAP"] == [None] * 3 and figures["BWT"] == [None, 0, 0]


def test_a_name_of_several_lines_keeps_its_row(tmp_path, capsys):
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"tasks": ["a\nb\u001b[31m", "\ud800"], "matrix": [[1], [2, 3]]}))
    assert cli.main(["metrics", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith("a b\N{REPLACEMENT CHARACTER}[31m ")
