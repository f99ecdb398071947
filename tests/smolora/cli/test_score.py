"""The command `smolora score`."""

from __future__ import annotations

import json
import shutil

import pytest

from smolora import cli
from smolora.evaluate.datasets import DATASETS
from support.scoring import GOLDEN, golden


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("protocol", ["smolora", "standard"])
def test_json_has_these_keys_and_no_others(dataset, protocol, capsys):
    command = ["score", "--dataset", dataset, "--annotations", str(GOLDEN), "--protocol", protocol, "--json"]
    assert cli.main([*command, "--answers", str(GOLDEN / dataset / "answers.jsonl")]) == 0
    result = json.loads(capsys.readouterr().out)
    groups = ["binary", "open"] if dataset == "GQA" else []
    assert list(result) == ["dataset", "protocol", "metric", "score", "mif", "count", *groups]
    assert (result["dataset"], result["protocol"]) == (dataset, protocol)


def test_command_with_two_trees(tmp_path, capsys):
    """The question file in one, the dataset's own file in the other; captions' second metric is printed too."""
    for tree, name in (("ours", "test.json"), ("theirs", "testdev_balanced_questions.json")):
        (tmp_path / tree / "GQA").mkdir(parents=True)
        shutil.copy(GOLDEN / "GQA" / name, tmp_path / tree / "GQA")
    command = ["score", "--dataset", "GQA", "--answers", str(GOLDEN / "GQA" / "answers.jsonl"), "--json"]
    trees = ["--annotations", str(tmp_path / "ours"), "--annotations", str(tmp_path / "theirs")]
    assert cli.main([*command, *trees]) == 0
    assert json.loads(capsys.readouterr().out) == golden("GQA").as_dict()
    assert cli.main([*command, *trees[:2]]) == 1
    assert "GQA needs testdev_balanced_questions.json" in capsys.readouterr().err


def test_captions_have_both_metrics(capsys):
    answers = str(GOLDEN / "TextCaps" / "answers.jsonl")
    command = ["score", "--dataset", "TextCaps", "--annotations", str(GOLDEN), "--answers", answers]
    assert cli.main([*command, "--protocol", "standard"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("TextCaps (protocol standard): cider_d 301.94, cider ")
    assert f"cider {golden('TextCaps', 'standard').extra_metrics['cider']:.2f}," in printed


def test_command_prints_json(capsys):
    folder = GOLDEN / "GQA"
    answers = str(folder / "answers.jsonl")
    arguments = ["score", "--dataset", "GQA", "--annotations", str(folder), "--answers", answers]
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == golden("GQA").as_dict()
    assert set(result) == {"dataset", "protocol", "metric", "score", "mif", "count", "binary", "open"}
    assert cli.main([*arguments, "--protocol", "standard"]) == 0
    assert "GQA (protocol standard): accuracy" in capsys.readouterr().out


def test_command_names_what_is_wrong(capsys):
    assert cli.main(["score", "--dataset", "GQA", "--annotations", str(GOLDEN), "--answers", "none.jsonl"]) == 1
    assert "none.jsonl" in capsys.readouterr().err
