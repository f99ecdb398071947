"""SMoLoRA with computed routers, and a LoRA for each task, in the trainer."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from small_llava import small_llava
from smolora.train.methods import Method
from smolora.train.plan import make_plan, print_plan
from smolora.train.run import TrainingRun

METHODS = ("smolora-ridge", "smolora-prototype", "routed")


@pytest.mark.parametrize("method", METHODS)
def test_a_task_keeps_its_experts_to_the_bit(short, tmp_path, method):
    """Each of two tasks gets experts of its own; training the second changes no tensor of the first one's."""
    results = TrainingRun(short(f"method={method}"))()
    assert results["task_source"] == "selector" and len(results["selected"][1]["ImageNet"]) == 3
    assert results["matrix"][1][0] == results["matrix"][0][0] or results["selected"][1]["ImageNet"][0] < 4
    first, second = (
        load_file(tmp_path / f"run/stage-{stage}/adapter/adapter_model.safetensors")
        for stage in ("1-ImageNet", "2-Flickr30k")
    )
    grown = [name for name in first if name.endswith("vu_B")]
    assert len(grown) == 8
    for name in grown:
        assert first[name].shape[0] == 1 and second[name].shape[0] == 2
        assert torch.equal(first[name][0], second[name][0]) and second[name][1].abs().max() > 0
    config = json.loads((tmp_path / "run/stage-2-Flickr30k/adapter/adapter_config.json").read_text())
    assert (config["num_tasks"], config["num_vu_experts"]) == (2, 2)
    table = json.loads((tmp_path / "run/stage-2-Flickr30k/kept/routers.json").read_text())
    assert table["tasks"] == [0, 1] and table["vu"]["experts"] == [0, 1]
    assert ("if" in table) == (method != "routed")
    trained = [results["training"][stage]["trainable"] for stage in results["stages"]]
    assert trained[0] == trained[1]  # an expert of each branch, whatever is there already
    model = PeftModel.from_pretrained(small_llava(), tmp_path / "run/stage-2-Flickr30k/adapter")
    assert model.base_model.selector().num_tasks == 2


def test_options(short):
    o = "methods.smolora-ridge"
    recipe = short("method=smolora-ridge", f"{o}.features=hidden", f"{o}.importance=shared", f"{o}.max_experts=3")
    config = Method(recipe).adapter.config(small_llava())
    assert (config.router_features, config.importance, config.max_experts) == ("hidden", "shared", 3)
    assert (config.vu_router_kind, config.experts, config.num_vu_experts) == ("ridge", "grow", 1)
    routed = Method(short("method=routed", "methods.routed.router=prototype")).adapter.config(small_llava())
    assert (routed.vu_router_kind, routed.fusion, routed.r) == ("prototype", "vu", 16)


@pytest.mark.parametrize("method", ["smolora-ridge", "smolora-prototype"])
@pytest.mark.parametrize(
    ("adapter", "rank", "alpha"),
    [
        ({"r": 8, "lora_alpha": 16, "num_vu_experts": 4, "num_if_experts": 4}, 28, 56),  # MiniCVIT's
        ({"r": 16, "lora_alpha": 32, "num_vu_experts": 4, "num_if_experts": 4}, 60, 120),  # CVIT's
        ({"r": 16, "lora_alpha": 32, "num_vu_experts": 16, "num_if_experts": 16}, 128, 256),  # above the largest rank
        ({"r": 4, "lora_alpha": 2, "num_vu_experts": 3, "num_if_experts": 2}, 8, 4),  # 10 - 1, rounded
        ({"r": 1, "lora_alpha": 1, "num_vu_experts": 3, "num_if_experts": 3}, 2, 2),  # below 4, not rounded
        ({"r": 1, "lora_alpha": 1, "num_vu_experts": 1, "num_if_experts": 1}, 1, 1),  # no less than 1
        (
            {"r": 8, "lora_alpha": 8, "num_vu_experts": 2, "num_if_experts": 2, "fusion": "mean"},
            16,
            16,
        ),  # no vectors
        ({"r": 8, "lora_alpha": 8, "num_vu_experts": 3, "num_if_experts": 2, "fusion": "if"}, 16, 16),  # one branch
    ],
)
def test_experts_have_the_rank_of_smoloras_cost(short, method, adapter, rank, alpha):
    """A stage trains no more numbers than SMoLoRA's experts have, where a rank of at least 1 allows it."""
    recipe = dataclasses.replace(short(f"method={method}"), adapter=adapter)
    chosen = Method(recipe)
    config = chosen.adapter.config(small_llava())
    assert (config.r, config.lora_alpha) == (rank, alpha)
    settings = chosen.settings()
    assert (settings["adapter"]["r"], settings["methods"][method]["r"]) == (rank, rank)
    assert (settings["adapter"]["lora_alpha"], settings["methods"][method]["lora_alpha"]) == (alpha, alpha)
    if rank == 1:
        return
    layers = [(32, 96)] * 4 + [(96, 32)] * 2 + [(32, 32)] * 2  # of the small model, d and k
    branches = {"vu": 1, "if": 1}.get(config.fusion, 2)
    experts = {"vu": adapter["num_vu_experts"], "if": adapter["num_if_experts"]}.get(
        config.fusion, adapter["num_vu_experts"] + adapter["num_if_experts"]
    )
    model = chosen.adapter.start(small_llava(), None)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    importance = branches * (config.fusion == "adaptive")
    assert trained == sum(branches * rank * (d + k) + importance * k for d, k in layers)
    assert trained <= adapter["r"] * experts * sum(d + k for d, k in layers)


def test_a_recipe_sets_rank_and_alpha_itself(short, capsys):
    o = "methods.smolora-ridge"
    for overrides, expected in (
        ((f"{o}.r=6",), (6, 12)),
        ((f"{o}.lora_alpha=3",), (4, 3)),
        ((f"{o}.r=6", f"{o}.lora_alpha=3"), (6, 3)),
    ):
        recipe = short("method=smolora-ridge", *overrides)
        config = Method(recipe).adapter.config(small_llava())
        assert (config.r, config.lora_alpha) == expected
        plan = make_plan(recipe)
        assert (plan["config"]["adapter"]["r"], plan["config"]["adapter"]["lora_alpha"]) == expected
        print_plan(plan)
        assert "adapter: r {}, lora_alpha {:.1f}, ".format(*expected) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method={adapter: smolora-ridge, schedule: [joint]}", "must be 'sequential' for the adapter 'smolora-ridge'"),
        ("method={adapter: routed, schedule: [ewc]}", "must not have 'ewc' for the adapter 'routed'"),
        ("methods.smolora-ridge.features=text", r"methods.smolora-ridge.features must be .*got 'text'"),
        ("methods.smolora-ridge.r=129", "methods.smolora-ridge.r must be at most 128, got 129"),
        ("methods.smolora-ridge.lora_alpha=0", r"methods.smolora-ridge.lora_alpha must be .*got 0"),
        ("methods.smolora-ridge.ridge=0", r"methods.smolora-ridge.ridge must be .*got 0"),
    ],
)
def test_what_does_not_fit(short, override, message):
    with pytest.raises(ValueError, match=message):
        Method(short("method=smolora-ridge", override))


def test_passes_before_a_stage_need_whole_parameters(short):
    with pytest.raises(ValueError, match="fsdp must be left out for the adapter 'smolora-ridge', whose passes over"):
        Method(short("method=smolora-ridge", "training.arguments.fsdp=true"))
