"""The benchmark of passes: it counts the bytes that it says, and refuses what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import passes
from passes import allocated, check_pass, in_float64, main, operand_bytes, partial_bytes, training_calls
from recorded import RESULTS, named_results
from shapes import PRESETS
from smolora.engine import torch_passes
from smolora.engine.ops import BACKENDS

CPU = torch.device("cpu")
TINY = replace(PRESETS["small"][0], d=96, k=160, r=8, batch=4, seq=64, dropout=0.0)
TILES = replace(TINY, d=24, k=32, vu=2, if_=2, batch=2, seq=40)
GATE = PRESETS["llava-7b"][0]
FLAGS = ["--preset", "small", "--rounds", "2", "--device", "cpu"]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", (TINY,))


@pytest.fixture
def broken(monkeypatch):
    """The backend "triton" is torch's, but for a wrong and a failing pass."""

    def wrong(*arguments):
        dh, dB, *rest = torch_passes.grad_output(*arguments)
        return dh, [dB[0] * 1.01, *dB[1:]], *rest

    def failing(*_):
        raise RuntimeError("does not compile")

    functions = {name: getattr(torch_passes, name) for name in RESULTS}
    module = SimpleNamespace(**functions | {"grad_output": wrong, "fuse_expand": failing})
    monkeypatch.setitem(BACKENDS, "triton", lambda: module)
    monkeypatch.setattr(passes, "unavailable", lambda *_: None)


def result(folder):
    return json.loads((folder / "passes_small.json").read_text())


def test_operands_by_hand():
    """gate/up: 8192 tokens in bfloat16, two branches of rank 16, eight experts of which every one is chosen."""
    T, d, k, experts = 8192, 4096, 11008, 8 * 16
    h, dh = T * 32 * 4, T * 32 * 2
    assert operand_bytes(GATE, "route_shrink") == T * d * 2 + (4 * 16 + 4 + 16) * d * 2 + h
    assert operand_bytes(GATE, "fuse_expand") == h + T * 4 + experts * k * 2 + T * k * 2
    assert operand_bytes(GATE, "grad_output") == T * k * 2 + h + T * 4 + experts * k * 2 + dh + experts * k * 4
    assert operand_bytes(GATE, "grad_input") == T * d * 2 + dh + experts * d * 2 + T * d * 2 + experts * d * 4


def print_triton_counts():
    """Partial bytes of every pass, checked first; for a process in which Triton's interpreter is on."""
    counts = {}
    for name, arguments in training_calls(TILES, CPU).items():
        results, buffers = allocated(getattr(BACKENDS["triton"](), name), arguments)
        check_pass(name, named_results(name, results), in_float64(name, arguments), "float32")
        counts[name] = partial_bytes(TILES, name, buffers)
    print(json.dumps(counts))


def test_partial_buffers_of_triton_by_hand():
    """Two instances of two tiles of 32 tokens, on the four processors that stand in for a CPU's."""
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", "import test_passes; test_passes.print_triton_counts()"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    T, d, tiles = 80, 24, 4
    columns, chosen = T * (2 * 8 + 8) * 4, T * (8 + 8) * 4  # written; read
    sums, mean, logits, tokens, w = tiles * d * 4, 2 * d * 4, 2 * 4 * 4, 2 * 2 * 8, 4 * 8 * 4
    assert counted["route_shrink"] == columns + chosen + 2 * (sums + mean + logits + tokens + w)
    assert counted["fuse_expand"] == 0  # h, w and B go straight into y
    dA, owner = tiles * 2 * 8 * d * 4, tiles * 4
    assert counted["grad_input"] == 2 * (dA + owner)
    assert counted["grad_output"] > 2 * T * 2 * 8 * 4  # p at least


def test_allocations_are_what_does_not_come_back():
    x = torch.ones(6, 5)

    def function(x):
        room = torch.empty(3, 4)
        x.view(5, 6).mul_(2)
        room.view(torch.int32).zero_()
        gone = x.new_zeros(7)
        del gone  # a later buffer may take its place
        return x.new_empty(0), torch.zeros_like(x), x.new_empty(7, dtype=torch.int64)[2:], x.new_ones(7)

    results, buffers = allocated(function, (x,))
    assert len(results) == 4
    assert sorted(tuple(buffer.shape) for buffer in buffers) == [(3, 4), (7,)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_passes_agree_with_float64(dtype):
    calls = training_calls(replace(TINY, dtype=dtype), CPU)
    for name, arguments in calls.items():
        results = named_results(name, getattr(torch_passes, name)(*arguments))
        expected = in_float64(name, arguments)
        assert all(t.dtype == torch.float64 for t in expected.values() if t.is_floating_point() and t.numel())
        assert check_pass(name, results, expected, dtype) > 0
        for label, result in results.items():
            if result.numel():
                other = 1 - result if label == "ids" else result * 1.02
                with pytest.raises(passes.WrongResult, match=label):
                    check_pass(name, results | {label: other}, expected, dtype)


def test_a_pass_is_timed_without_the_base_with_every_gradient():
    calls = training_calls(TINY, CPU)
    assert calls["fuse_expand"][-3:] == (None, None, None)  # x, base_weight, base_bias
    assert calls["grad_input"][-2:] == (None, None)  # g, base_weight
    for name in ("grad_output", "grad_input"):
        results = named_results(name, getattr(torch_passes, name)(*calls[name]))
        empty = [label for label, result in results.items() if not len(result)]
        assert empty == (["dslot_weights", "dscores"] if name == "grad_output" else ["dtoken_router"])


def test_a_run_leaves_a_row_for_each_pass(tiny, tmp_path, capsys):
    copied = set()

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default:
                copied.add(args[0].nbytes + args[1].nbytes)
            return func(*args, **(kwargs or {}))

    with Copies():
        main([*FLAGS, "--output", str(tmp_path)])
    content = result(tmp_path)
    assert [(row["pass"], row["backend"]) for row in content["rows"]] == [(name, "torch") for name in RESULTS]
    for row in content["rows"]:
        assert row["partial_bytes"] is None
        assert row["bytes"] == operand_bytes(TINY, row["pass"])
        assert row["bytes"] in copied
        assert row["ms"]["rounds"] == row["copy_ms"]["rounds"] == 2
        assert row["share"] > 0 and row["shape"]["dropout"] == 0 and row["device"] and row["torch"]
    assert content["not_measured"].keys() == {"triton", "cuda"}
    printed = capsys.readouterr().out
    assert "route_shrink  torch" in printed and "say nothing about a GPU" in printed


def test_wrong_and_failing_passes_are_refused_and_the_others_timed(tiny, broken, tmp_path):
    with pytest.raises(SystemExit, match=r"refused.*does not compile.*relative error of dB0 .* is 1\.00e-02"):
        main([*FLAGS, "--backends", "torch,triton", "--output", str(tmp_path)])
    content = result(tmp_path)
    timed = {(row["pass"], row["backend"]) for row in content["rows"]}
    assert timed == {(name, "torch") for name in RESULTS} | {("route_shrink", "triton"), ("grad_input", "triton")}
    assert content["not_measured"].keys() == {"fuse_expand of triton, small", "grad_output of triton, small"}
    for row in content["rows"]:
        assert row["bytes"] == operand_bytes(TINY, row["pass"]) + (row["partial_bytes"] or 0)


def test_an_unknown_backend_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--backends", "triton,official"])
    assert "official unknown; known: torch, triton, cuda" in capsys.readouterr().err
