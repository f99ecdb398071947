"""The benchmark of training steps: what it times is right, and it refuses what is wrong."""

from __future__ import annotations

import json

import pytest
import torch

import train_step
import whole_model
from train_step import PEERS, check, main, make_batch
from whole_model import PRESETS, make_base, targets

CPU = torch.device("cpu")


def test_smolora_and_the_released_algorithm_agree():
    assert check(CPU) <= train_step.AGREEMENT


@pytest.mark.parametrize("kind", ["vu_B", "if_A", "vu_importance"])
def test_a_wrong_result_is_refused(monkeypatch, kind):
    right = whole_model.draw_adapter
    drawn = []

    def sometimes_wrong(name, linear, shape):
        values = right(name, linear, shape)
        drawn.append(name)
        if drawn.count(name) == 1:  # the first peer's alone
            values[kind] = values[kind] * 1.05
        return values

    monkeypatch.setattr(whole_model, "draw_adapter", sometimes_wrong)
    with pytest.raises(SystemExit, match="refused to time a wrong result"):
        check(CPU)


def test_every_peer_adapts_the_same_layers_of_one_base():
    shape = PRESETS["check"]
    base, batch = make_base(shape, CPU), make_batch(shape, CPU)
    count = 3 * shape.layers + 2
    assert len(targets(base)) == count
    for name, make in PEERS.items():
        model = make(shape, base, batch)
        before = [p.detach().clone() for p in model.trained]
        model.step()
        model.step()
        moved = sum(not torch.equal(a, b) for a, b in zip(before, model.trained, strict=True))
        expected = {"none": 0, "peft_lora": 2 * count, "peft_lora_fp32": 2 * count}.get(name, 6 * count)
        assert moved == len(model.trained) == expected
        own = {p.data_ptr() for p in model.module.parameters() if not p.requires_grad and p.dim() > 1}
        assert {p.data_ptr() for p in base.parameters() if p.dim() > 1} <= own  # shared, not copied


def test_a_run_leaves_a_row_for_each_peer_and_setting(tmp_path, capsys):
    main(["--preset", "check", "--seconds", "0.1", "--device", "cpu", "--output", str(tmp_path)])
    content = json.loads((tmp_path / "train_step_check.json").read_text())
    rows = {(row["peer"], row["checkpointing"]): row for row in content["rows"]}
    assert rows.keys() == {(peer, on) for peer in PEERS if peer != "peft_lora_fp32" for on in (False, True)}
    for row in rows.values():
        assert row["tokens_per_second"] > 0 and row["device"] and row["torch"]
    for peer in ("official", "smolora"):
        assert rows[peer, True]["kept_bytes"] < rows[peer, False]["kept_bytes"]
    assert rows["smolora", False]["kept_bytes"] < rows["official", False]["kept_bytes"]
    assert "tokens/s" in capsys.readouterr().out


def test_an_unknown_peer_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--peers", "lora"])
    assert "unknown; known: none, peft_lora" in capsys.readouterr().err
