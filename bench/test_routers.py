"""The benchmark of computed routers: what it times is right, and it refuses what is wrong."""

from __future__ import annotations

import json

import pytest
import torch

import routers
import whole_model
from routers import ROUTERS, check, main
from train_step import AGREEMENT

CPU = torch.device("cpu")
ARGUMENTS = ["--preset", "check", "--seconds", "0.1", "--device", "cpu"]


@pytest.mark.parametrize("kind", ROUTERS)
def test_the_peers_are_right(kind):
    assert check(kind, CPU) <= AGREEMENT / 10


@pytest.mark.parametrize("weight", ["vu_B", "if_importance"])
def test_a_wrong_result_is_refused(monkeypatch, tmp_path, weight):
    """And what is right is measured all the same."""
    right, tune = whole_model.draw_adapter, routers.with_routers

    def wrong(kind, *args):
        if kind == "prototype":
            monkeypatch.setattr(
                whole_model,
                "draw_adapter",
                lambda *a: {n: v * (1 + 0.05 * (n == weight)) for n, v in right(*a).items()},
            )
        made = tune(kind, *args)
        monkeypatch.setattr(whole_model, "draw_adapter", right)
        return made

    monkeypatch.setattr(routers, "with_routers", wrong)
    with pytest.raises(SystemExit, match=r"refused to time what is wrong.*prototype is .* from the released algorithm"):
        main([*ARGUMENTS, "--peers", "random,prototype", "--output", str(tmp_path)])
    content = json.loads((tmp_path / "routers_check.json").read_text())
    assert {row["peer"] for row in content["rows"]} == {"random"} and "prototype" in content["not_measured"]


def test_a_run_leaves_a_row_for_each_peer_and_step(tmp_path, capsys):
    main([*ARGUMENTS, "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "routers_check.json").read_text())["rows"]
    assert {(row["peer"], row["step"]) for row in rows} == {
        (kind, step) for kind in ROUTERS for step in ("train", "decode")
    }
    for row in rows:
        assert row["step_ms"]["median"] > 0 and row["of_random"] > 0 and row["device"] and row["torch"]
        assert row["of_random"] == 1 or row["peer"] != "random"
    assert "of random" in capsys.readouterr().out


def test_an_unknown_peer_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--peers", "trained"])
    assert "unknown; known: random, prototype, ridge" in capsys.readouterr().err
