"""The benchmark of decode steps: what it times is right, and it refuses what is wrong."""

from __future__ import annotations

import json

import pytest
import torch

import decode_step
import whole_model
from decode_step import LIMITS, Decoder, Text, build, check, main
from whole_model import PRESETS, make_base

CPU = torch.device("cpu")
ARGUMENTS = ["--preset", "check", "--prompt", "6", "--seconds", "0.1", "--device", "cpu"]


def run(folder, *arguments):
    """The results of a run: rows by peer and number of sequences, and what was not measured."""
    main([*ARGUMENTS, "--output", str(folder), *arguments])
    return read(folder)


def read(folder):
    content = json.loads((folder / "decode_step_check.json").read_text())
    return {(row["peer"], row["sequences"]): row for row in content["rows"]}, content["not_measured"]


@pytest.mark.parametrize("name", ["official", "torch"])
def test_the_step_is_right(name):
    assert check(name, CPU) <= LIMITS["float32"] / 10


@pytest.mark.parametrize("wrong", ["vu_B", "if_A", "vu_importance", "decode_routing"])
def test_a_wrong_result_is_refused(monkeypatch, tmp_path, wrong):
    """And what is right is measured all the same."""
    draw, tune, drawn = whole_model.draw_adapter, decode_step.with_smolora, []

    def drawn_wrong(name, linear, shape):
        values = draw(name, linear, shape)
        drawn.append(name)
        if drawn.count(name) == 1:  # the model that is checked is made first
            values[wrong] = values[wrong] * 1.05
        return values

    def routed_wrong(shape, base, **options):
        drawn.append("model")
        return tune(shape, base, **options, **({"decode_routing": "token"} if drawn == ["model"] else {}))

    if wrong == "decode_routing":
        monkeypatch.setattr(decode_step, "with_smolora", routed_wrong)
    else:
        monkeypatch.setattr(whole_model, "draw_adapter", drawn_wrong)
    with pytest.raises(SystemExit, match=r"refused to time what is wrong.*torch.*from a forward without a cache"):
        run(tmp_path, "--peers", "torch,none", "--sequences", "2")
    rows, skipped = read(tmp_path)
    assert rows.keys() == {("none", 2)} and "from a forward without a cache" in skipped["torch"]


def test_a_backend_must_agree_at_the_measured_shape(monkeypatch, tmp_path):
    right = decode_step.prepare

    def prepare(name, decoder):
        step, logits = right(name, decoder)
        return step, logits * 1.01 if name == "torch" and len(logits) == 3 else logits

    monkeypatch.setattr(decode_step, "prepare", prepare)
    with pytest.raises(SystemExit, match=r"torch, 3 sequences: .*from torch with 3 sequences"):
        run(tmp_path, "--peers", "none,torch", "--sequences", "2,3")
    assert read(tmp_path)[0].keys() == {("none", 2), ("torch", 2), ("none", 3)}


def test_out_of_memory_is_said(monkeypatch, tmp_path):
    right = decode_step.prepare

    def prepare(name, decoder):
        if len(decoder.text.ids) == 3:
            raise torch.OutOfMemoryError("of a GPU")
        return right(name, decoder)

    monkeypatch.setattr(decode_step, "prepare", prepare)
    rows, skipped = run(tmp_path, "--peers", "none", "--sequences", "2,3")
    assert rows.keys() == {("none", 2)} and skipped == {"none, 3 sequences": "out of device memory"}


@pytest.mark.parametrize("name", ["none", "peft_lora", "official", "torch"])
@torch.no_grad()
def test_a_cache_that_was_put_back_gives_the_same_step(name):
    shape = PRESETS["check"]
    base, text = make_base(shape, CPU), Text.draw(shape, 2, 6, CPU)
    decoder = Decoder(build(name, shape, base, text.instruction), text)
    first = decoder.step()
    assert not torch.equal(decoder.step(), first)  # of the next position
    decoder.rewind()
    assert torch.equal(decoder.step(), first)
    if name != "none":
        assert {p.data_ptr() for p in base.parameters()} <= {p.data_ptr() for p in decoder.model.parameters()}


def test_a_run_leaves_a_row_for_each_peer_and_number(tmp_path, capsys):
    rows, skipped = run(tmp_path, "--sequences", "1,3")
    assert rows.keys() == {(name, n) for name in ("none", "peft_lora", "official", "torch") for n in (1, 3)}
    assert skipped.keys() == {"triton", "cuda"}
    for (name, n), row in rows.items():
        assert row["step_ms"]["median"] > 0 and row["device"] and row["torch"] and not row["graph"]
        assert row["tokens_per_second"] == pytest.approx(n / row["step_ms"]["median"] * 1e3)
        assert row["of_none"] == 1 if name == "none" else row["of_none"] > 0
    assert "no graph" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "lora"], "unknown; known: none, peft_lora"),
        (["--sequences", "4,0"], "must be positive numbers"),
        (["--prompt", "0"], "must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
