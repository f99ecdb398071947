"""The benchmark itself: does it count what it says, and does it refuse what is wrong?"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fused_vs_naive
import roofline
from accuracy import LIMITS, WrongResult, check, expect
from peers import PEERS, Written, gathered, official, rank_space
from shapes import PRESETS
from timing import CpuClock, Job, Timing, interleave, kept_for_backward
from workload import SCALING, TRAINED, draw_batch, draw_layer

TINY = replace(PRESETS["small"][0], d=96, k=160, r=8, batch=4, seq=64)
FLAGS = ["--d", "96", "--k", "160", "--r", "8", "--batch", "4", "--seq", "64", "--rounds", "2", "--device", "cpu"]


def draw(dtype):
    layer = draw_layer(replace(TINY, dtype=dtype), torch.device("cpu"))
    return layer, draw_batch(layer, TINY.batch, TINY.seq)


def scaled(x, base, *rest):
    return base + 1.01 * (gathered(x, base, *rest) - base)


def swapped(x, base, adapter, *rest):
    other = {"vu": "if", "if": "vu"}
    return gathered(x, base, adapter | {f"{b}_importance": adapter[f"{other[b]}_importance"] for b in other}, *rest)


def mean_fusion(x, base, adapter, *rest):
    return gathered(x, base, adapter | {f"{b}_importance": 0 * adapter[f"{b}_importance"] for b in ("vu", "if")}, *rest)


def one_branch_missing(x, base, adapter, *rest):
    return gathered(x, base, adapter | {"if_B": 0 * adapter["if_B"]}, *rest)


def first_expert_always(x, base, adapter, instruction, routes, dropout):
    first = torch.zeros(len(x), dtype=torch.int32)
    return gathered(x, base, adapter, instruction, (first, first), dropout)


def without_adapter(x, base, adapter, *rest):
    return base + 0 * gathered(x, base, adapter, *rest)


def not_finite(x, base, *rest):
    return gathered(x, base, *rest) * torch.nan


def without_dropout(x, base, adapter, instruction, routes, dropout):
    return gathered(x, base, adapter, instruction, routes, None)


MUTANTS = (
    scaled,
    swapped,
    mean_fusion,
    one_branch_missing,
    first_expert_always,
    without_adapter,
    not_finite,
    without_dropout,
)


@pytest.mark.parametrize("dtype", LIMITS)
def test_peers_agree_with_float64(dtype):
    layer, batch = draw(dtype)
    for name in ("linear", "official", "gathered", "peft_lora", "peft_lora_fp32", "torch"):
        peer = PEERS[name](layer)
        check(name, peer, batch, expect(peer.formula, layer, batch))
    check("rank_space", Written(layer, rank_space), batch, expect("method", layer, batch))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_wrong_peers_are_refused(mutant, dtype):
    layer, batch = draw(dtype)
    with pytest.raises(WrongResult, match="mutant"):
        check("mutant", Written(layer, mutant), batch, expect("method", layer, batch))


def test_expected_gradients_are_those_of_the_whole_batch():
    """The reference runs instance by instance: its sum must be autograd's over the batch."""
    layer, batch = draw("float32")
    expected = expect("method", layer, batch)
    adapter = {name: tensor.double() for name, tensor in layer.adapter.items()}
    leaves = [adapter[name].requires_grad_() for name in TRAINED]
    x = batch.x.double()
    y = official(x, F.linear(x, layer.weight.double()), adapter, batch.instruction.double(), None, None)
    for name, grad in zip(TRAINED, torch.autograd.grad(y, leaves, batch.dy.double()), strict=True):
        torch.testing.assert_close(grad, expected.grads[name], rtol=1e-9, atol=1e-12)


def test_command_writes_tables_json_and_plot(tmp_path, capsys):
    names = ["linear", "official", "gathered", "peft_lora", "torch"]
    fused_vs_naive.main([*FLAGS, "--peers", ",".join(names), "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "say nothing about a GPU" in printed
    assert "smolora torch" in printed
    assert (tmp_path / "custom.png").stat().st_size > 10_000
    result = json.loads((tmp_path / "custom.json").read_text())
    rows = [row for row in result["rows"] if row["kind"] == "layer"]
    assert [row["peer"] for row in rows] == names
    for row in rows:
        assert {"device", "python", "torch", "triton", "peft", "dtype", "shape"} <= set(row)
        assert row["both"]["median"] > 0
        assert row["both"]["rounds"] == 2
        assert row["error"]["y"] <= LIMITS["float32"]["y"]
    assert rows[0]["kept_bytes"] == 0  # a frozen linear layer keeps nothing
    assert rows[0]["own_ms"]["both"] is None
    assert rows[1]["own_ms"]["both"]["median"] == pytest.approx(rows[1]["both"]["median"] - rows[0]["both"]["median"])
    assert {row["tokens"] for row in result["rows"] if row["kind"] == "sweep"} == {16, 64, 256, 512}
    assert [row["peer"] for row in result["rows"] if row["kind"] == "decode"] == names


def test_without_matplotlib_a_run_has_no_plot(tmp_path, monkeypatch, capsys):
    """It says what to install, and succeeds."""
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    fused_vs_naive.main([*FLAGS, "--peers", "linear,torch", "--decode", "none", "--output", str(tmp_path)])
    assert "pip install 'smolora[report]'" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["custom.json"]


def test_command_refuses_to_time_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setitem(PEERS, "gathered", lambda layer: Written(layer, scaled))
    with pytest.raises(SystemExit, match=r"refused.*gathered: relative error of y .* is \d\.\d\de-03"):
        fused_vs_naive.main([*FLAGS, "--peers", "linear,gathered", "--output", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())  # of the others, and why one is missing
    assert {row["peer"] for row in result["rows"]} == {"linear"}
    assert all("relative error of y" in reason for what, reason in result["not_measured"].items() if "gathered" in what)


def test_interleave_times_every_job_in_every_round():
    seen = []
    jobs = [Job(name, (lambda _, name=name: seen.append(name), lambda _: None)) for name in "abc"]
    timings = interleave(jobs, CpuClock(), seconds=0, rounds=6)
    assert all(len(stages) == 3 and len(stages[-1].samples) == 6 for stages in timings.values())
    assert seen[::2] == seen[1::2]  # twice in a row, of which the second counts
    seen = seen[::2]
    rounds = [seen[i : i + 3] for i in range(3, len(seen), 3)]
    assert [sorted(r) for r in rounds] == [["a", "b", "c"]] * 6
    assert len({tuple(r) for r in rounds}) > 1


def test_summary():
    timing = Timing((5.0, 1.0, 2.0, 3.0, 4.0, 6.0))
    assert timing.summary() == {"median": 3.5, "p20": 2.0, "p80": 5.0, "rounds": 6}


def test_own_share_is_compared_within_a_round():
    """Rounds that something else slowed down say nothing about the difference of two jobs."""
    linear, peer = Timing((10.0, 30.0, 30.0)), Timing((15.0, 15.0, 35.0))
    assert peer.minus(linear).median == 5.0
    assert peer.over(linear) == pytest.approx(35 / 30)


def test_kept_bytes_count_each_storage_once_and_no_parameters():
    weight = nn.Parameter(torch.randn(5, 7))
    x = torch.randn(3, 7, requires_grad=True)
    z = torch.randn(3, 7)
    assert kept_for_backward(lambda: x @ weight.T, [weight]) == 3 * 7 * 4
    assert kept_for_backward(lambda: (x @ weight.T) + (x[:1] @ weight.T), [weight]) == 3 * 7 * 4
    assert kept_for_backward(lambda: (x * z) @ weight.T, [weight]) == 2 * 3 * 7 * 4


def test_floors_of_the_example_shape():
    """Megabytes and microseconds at 4.3 TB/s of the four passes over x (67 MB) and y (180 MB), small operands aside."""
    gate = PRESETS["llava-7b"][0]
    expected = {"route_shrink": (67, 16), "fuse_expand": (180, 42), "grad_output": (180, 42), "grad_input": (135, 31)}
    for name, work in roofline.adapter(gate).items():
        megabytes, microseconds = expected[name]
        assert megabytes < work.bytes / 1e6 < 1.07 * megabytes
        assert work.seconds(roofline.H200_MEASURED) * 1e6 == pytest.approx(microseconds, rel=0.07)
    linear = sum(work.seconds(roofline.H200_MEASURED) for work in roofline.base(gate).values())
    assert linear == pytest.approx(2 * 0.95e-3, rel=0.01)


def test_floor_table_has_every_pass_and_card():
    text = roofline.table(PRESETS["llava-7b"][1], roofline.CARDS)
    for word in ("route_shrink", "fuse_expand", "grad_output", "grad_input", "base dx", "A100", "H100", "H200", "B200"):
        assert re.search(rf"\b{word}\b", text)


def test_the_scaling_is_the_papers():
    assert SCALING == 256 / 128
