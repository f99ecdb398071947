"""The benchmark of the methods besides SMoLoRA: what is measured agrees with float64, and what is wrong is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import fused_vs_naive
import roofline
import smolora
from accuracy import LIMITS, WrongResult, check, check_step, expect
from fused_vs_naive import of_method
from methods import LAYERS, PEERS
from shapes import METHODS, PRESETS
from workload import draw_batch, draw_layer

CPU = torch.device("cpu")
TINY = replace(PRESETS["small"][0], d=96, k=160, r=8, batch=4, seq=64)
FLAGS = ["--d", "96", "--k", "160", "--r", "8", "--batch", "4", "--seq", "64", "--rounds", "2", "--device", "cpu"]
RUNS_HERE = ("linear", "official", "peft_lora", "peft_lora_fp32", "torch")


def draw(method, dtype="float32", **numbers):
    case = of_method(replace(TINY, dtype=dtype, bias=True), method, METHODS[method] | numbers)
    layer = draw_layer(case, CPU, kind=LAYERS[method])
    return layer, draw_batch(layer, TINY.batch, TINY.seq)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("method", LAYERS)
def test_peers_agree_with_float64(method, dtype):
    layer, batch = draw(method, dtype)
    step = draw_batch(layer, 3, 1)
    for name in RUNS_HERE:
        peer = PEERS[name](layer)
        check(name, peer, batch, expect(peer.formula, layer, batch))
        peer.train(False)
        with torch.no_grad(), peer.scope():
            y = peer.step(step)
        check_step(name, peer, y, expect(peer.formula, layer, step).y)


@pytest.mark.parametrize(
    ("method", "numbers"),
    [
        ("moelora", {"experts": 1}),
        ("branchlora", {"experts": 3, "active": 3, "tasks": 1}),
        ("branchlora", {"active": 1}),
        ("lilora", {"tasks": 1}),
        ("routedlora", {"experts": 2, "active": 1}),
    ],
)
def test_other_numbers_of_experts(method, numbers):
    layer, batch = draw(method, **numbers)
    for name in ("official", "peft_lora", "torch"):
        peer = PEERS[name](layer)
        check(name, peer, batch, expect(peer.formula, layer, batch))


# What a careless form of each method would compute; `right` is the released form.
def first_expert_missing(right, x, base, adapter, call, dropout):
    B = adapter["B"] * (torch.arange(len(adapter["B"]))[:, None, None] > 0)
    return right(x, base, adapter | {"B": B}, call, dropout)


def no_router(right, x, base, adapter, call, dropout):
    return right(x, base, adapter | {"router": 0 * adapter["router"]}, call, dropout)


def one_more(right, x, base, adapter, call, dropout):
    return right(x, base, adapter, call | {"top_k": call["top_k"] + 1}, dropout)


def first_task(right, x, base, adapter, call, dropout):
    return right(x, base, adapter, call | {"task": 0}, dropout)


def share_forgotten(right, x, base, adapter, call, dropout):
    return right(x, base, adapter | {"task_logit": 0 * adapter["task_logit"]}, call, dropout)


def without_dropout(right, x, base, adapter, call, dropout):
    return right(x, base, adapter, call, lambda x: x)


def scaled(right, x, base, adapter, call, dropout):
    return base + 1.01 * (right(x, base.clone(), adapter, call, dropout) - base)


MUTANTS = {
    "moelora": (first_expert_missing, no_router, without_dropout, scaled),
    "branchlora": (first_expert_missing, no_router, one_more, first_task, without_dropout, scaled),
    "lilora": (first_task, share_forgotten, without_dropout, scaled),
    "routedlora": (first_expert_missing, without_dropout, scaled),
}


@pytest.mark.parametrize(("method", "mutant"), [(name, each) for name, all_of in MUTANTS.items() for each in all_of])
def test_wrong_forms_are_refused(method, mutant):
    layer, batch = draw(method)
    peer = PEERS["official"](layer)
    right = peer.algorithm
    peer.algorithm = lambda *arguments: mutant(right, *arguments)
    with pytest.raises(WrongResult, match="mutant"):
        check("mutant", peer, batch, expect("method", layer, batch))


@pytest.mark.parametrize("method", LAYERS)
def test_command(method, tmp_path, capsys):
    fused_vs_naive.main([*FLAGS, "--method", method, "--output", str(tmp_path)])
    assert f"{method} torch" in capsys.readouterr().out
    result = json.loads((tmp_path / f"{method}_custom.json").read_text())
    assert (tmp_path / f"{method}_custom.png").stat().st_size > 10_000
    names = ["linear", "official", "peft_lora", "torch"]
    layers, decoded = ([row for row in result["rows"] if row["kind"] == kind] for kind in ("layer", "decode"))
    assert [row["peer"] for row in layers] == [row["peer"] for row in decoded] == names
    for row in result["rows"]:
        assert row["method"] == row["shape"]["method"] == method
        assert {name: value for name, value in row["shape"].items() if name in METHODS[method]} == METHODS[method]
    for row in layers[1:]:
        assert row["own_ms"]["both"]["median"] == pytest.approx(
            row["both"]["median"] - layers[0]["both"]["median"], abs=1e-9
        )
        assert row["kept_bytes"] > 0
    assert layers[-1]["of_floor"]["both"] > 0
    assert set(result["not_measured"]) == {"peft_lora_fp32", "triton", "cuda"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--experts", "4"], "--experts means nothing to --method smolora"),
        (["--method", "moelora", "--vu", "4"], "--vu means nothing to --method moelora"),
        (["--method", "moelora", "--active", "2"], "--active means nothing to --method moelora"),
        (["--method", "lilora", "--experts", "2"], "--experts means nothing to --method lilora"),
        (["--method", "routedlora", "--active", "9"], "--active must be at most --experts, 8, got 9"),
        (["--method", "nonesuch"], "invalid choice: 'nonesuch'"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        fused_vs_naive.main(flags)
    assert message in capsys.readouterr().err


def test_peers_of_smolora_alone_are_refused():
    with pytest.raises(SystemExit, match="gathered unknown; known: linear, official"):
        fused_vs_naive.main(["--method", "moelora", "--peers", "gathered"])


def test_cuda_is_not_measured_where_its_kernels_lack_the_mix(monkeypatch):
    """On a GPU too, where nothing else keeps the backend from running."""
    monkeypatch.setattr(fused_vs_naive, "unavailable", lambda name, *_: None)
    for method, lacking in {"moelora": "'softmax'", "branchlora": None, "lilora": None, "routedlora": None}.items():
        args = fused_vs_naive.parse(["--method", method])
        case = of_method(PRESETS["llava-7b"][0], method, args.numbers)
        names, skipped = fused_vs_naive.choose_peers(args, torch.device("cuda"), case)
        assert ("cuda" in names) == (lacking is None)
        assert lacking is None or lacking in skipped["cuda"]


def test_lora_of_equal_active_rank():
    """MoELoRA has all experts at work, RoutedLoRA the active ones; BranchLoRA and LiLoRA have one A."""
    ranks = {"moelora": 8 * 8, "branchlora": 8, "lilora": 8, "routedlora": 2 * 8}
    for method, rank in ranks.items():
        layer, _ = draw(method)
        A, B = layer.lora(layer.adapter, layer.case)
        assert (A.shape, B.shape) == ((rank, 96), (160, rank))


def test_a_lora_of_all_active_experts_is_their_sum():
    """So PEFT's LoRA does the work of RoutedLoRA, number for number."""
    layer, batch = draw("routedlora")
    torch.testing.assert_close(expect("lora", layer, batch).y, expect("method", layer, batch).y, rtol=1e-12, atol=1e-12)


def test_floors_by_hand():
    """gate/up, bfloat16: T 8192, d 4096, k 11008; bytes of the four passes, and operations of the largest."""
    T, d, k, r = 8192, 4096, 11008, 16
    x, y = T * d * 2, T * k * 2
    gate = PRESETS["llava-7b"][0]
    passes = {name: roofline.adapter(of_method(gate, name, METHODS[name])) for name in LAYERS}
    lora = passes["lilora"]
    h, dh, A, B = T * r * 4, T * r * 2, r * d, r * k
    assert [work.bytes for work in lora.values()] == [
        x + 2 * A + h,
        h + 2 * B + y,
        y + h + dh + B * (2 + 4),
        2 * x + dh + A * (2 + 4),
    ]
    assert [work.flops for work in lora.values()] == [2 * T * d * r, 2 * T * k * r, 4 * T * k * r, 4 * T * d * r]
    assert passes["routedlora"]["fuse_expand"].flops == passes["branchlora"]["fuse_expand"].flops == 2 * T * k * 2 * r
    assert passes["branchlora"]["route_shrink"] == lora["route_shrink"]
    assert passes["moelora"]["route_shrink"].flops == 2 * T * d * (8 * r + 8)
    assert passes["moelora"]["fuse_expand"].bytes == 8 * h + T * 8 * 4 + 8 * 2 * B + y


def test_methods_are_those_of_the_package():
    assert set(METHODS) == set(fused_vs_naive.KINDS) <= set(smolora.MIXTURES)
