"""`--quiet` and `--json` of the commands that work for long."""

from __future__ import annotations

import json

import pytest

from smolora import cli
from support.train_world import make_world

QUICK = ["downstream={}", "training.batch_size=12", "training.per_device_batch_size=12", "training.epochs=1"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("output"), ask=2)


def test_train_evaluate_and_report_for_programs_and_in_silence(recipe, tmp_path, capfd):
    """In a pipe nothing is drawn; with --json stdout is one object, with --quiet the result alone."""
    command = ["train", str(recipe), *QUICK, "--output", str(tmp_path / "run")]
    assert cli.main([*command, "--json"]) == 0
    out, err = capfd.readouterr()
    figures = json.loads(out)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert figures["AP"] == results["AP"][-1] and figures["accuracy"] == results["matrix"][-1]
    assert "== small: stage-1-ImageNet (1 of 2)" in err and "\r" not in err and "%|" not in err
    assert cli.main([*command, "--quiet"]) == 0  # of a finished run
    out, err = capfd.readouterr()
    assert out.startswith("small (smolora): AP ") and len(out.splitlines()) == 1 and err == ""
    asked = ["evaluate", "--recipe", str(recipe), "--task", "ImageNet", *QUICK, "--output", str(tmp_path / "answers")]
    assert cli.main([*asked, "--adapter", str(tmp_path / "run/stage-1-ImageNet/adapter"), "--json"]) == 0
    scores = json.loads(capfd.readouterr().out)
    assert scores["ImageNet"]["score"] == results["matrix"][0][0] and scores["ImageNet"]["count"] == 2
    assert cli.main(["report", str(tmp_path / "run"), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["figures"]["smolora"]["AP"] == results["AP"][-1]
    assert report["page"] == str(tmp_path / "run/report/report.html")
    assert cli.main(["report", str(tmp_path / "run"), "--quiet"]) == 0
    assert capfd.readouterr().out.splitlines() == [report["page"], report["markdown"]]
