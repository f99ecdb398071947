"""Methods: their parameters, and runs of each."""

from __future__ import annotations

import json

import pytest
import torch
from peft import AutoPeftModel

from small_llava import small_llava
from smolora.train.methods import METHODS, Method
from smolora.train.methods.lora import LoRA
from smolora.train.methods.method import ADAPTERS, Parts
from smolora.train.run import TrainingRun

EXPERTS = ("smolora", "smolora-vu", "smolora-if", "smolora-mean")


def trained(model: torch.nn.Module) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def numbers(short):
    """Trained parameters of a method's fresh model."""

    def count(method: str, *overrides: str) -> int:
        model = Method(short(f"method={method}", *overrides)).adapter.start(small_llava().requires_grad_(False), None)
        return sum(trained(model).values())

    return count


@pytest.mark.parametrize("method", ["seqlora", "dirlora", "multitask"])
def test_baselines_have_as_many_parameters(numbers, method):
    importances = 2 * (96 * 4 + 32 * 2 + 32 * 2)  # what SMoLoRA has besides its experts
    assert numbers(method) == numbers("smolora") - importances
    assert numbers(method, "baseline.rank=8") * 2 == numbers(method)


def test_moelora_has_as_many_parameters_and_its_routers(numbers):
    routers = 4 * (32 * 4 + 96 * 2 + 32 * 2)
    assert numbers("moelora") == numbers("seqlora") + routers


def test_ablations_train_what_they_use(numbers):
    importances = 2 * (96 * 4 + 32 * 2 + 32 * 2)
    assert numbers("smolora-mean") == numbers("smolora") - importances
    assert 2 * numbers("smolora-vu") == 2 * numbers("smolora-if") == numbers("smolora-mean")


def test_all_methods_adapt_the_same_layers(short):
    layers = {}
    others = {"dmole", "moecl", "eproj"}  # D-MoLE has the attention's, MoE-CL whole blocks, Eproj the projector
    for name in set(METHODS) - {"zeroshot"} - others:
        model = Method(short(f"method={name}")).adapter.start(small_llava(), None)
        layers[name] = sorted(model.targeted_module_names)
    assert len(layers["smolora"]) == 8 and not [name for name in layers["smolora"] if "vision_tower" in name]
    assert all(found == layers["smolora"] for found in layers.values())


@pytest.mark.parametrize("method", ["seqlora", "dirlora", "moelora", "multitask", "zeroshot", "smolora-if"])
def test_runs(short, method, tmp_path):
    results = TrainingRun(short(f"method={method}"))()
    folders = {"multitask": ["stage-1-multitask"], "zeroshot": ["stage-0-zeroshot"]}
    assert results["stages"] == folders.get(method, ["stage-1-ImageNet", "stage-2-Flickr30k"])
    assert [len(row) for row in results["matrix"]] == ([2] if method in folders else [1, 2])
    if method == "dirlora":
        assert results["matrix"][1][0] == results["matrix"][0][0] and results["BWT"] == [None, 0.0]
        assert not (tmp_path / "run/stage-2-Flickr30k/answers/ImageNet.jsonl").exists()
    assert results["training"].keys() == (set() if method == "zeroshot" else set(results["stages"]))
    for content in results["training"].values():
        assert content["steps"] == (2 if method == "multitask" else 1)
        assert content["stored"] == content["trainable"] or method == "smolora-if"  # which stores what it does not use
    for stage in results["training"]:
        loaded = AutoPeftModel.from_pretrained(tmp_path / "run" / stage / "adapter")  # finds the base by itself
        assert loaded.get_base_model().config.model_type == "llava"


def test_room_for_other_methods(short, tmp_path, monkeypatch):
    """Replay and a penalty in one: extra samples, an extra loss, and what is kept between stages."""

    class Both(LoRA):
        name = "both"
        seen: list = []  # noqa: RUF012

        def extra_samples(self, stage, kept):
            self.seen.append((stage.name, [folder.parent.name for folder in kept]))
            return [(self.recipe.tasks[0], index) for index in json.loads((kept[0] / "x").read_text())] if kept else []

        def before_stage(self, model, work):
            self.start_values = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

        def loss_term(self, model, batch, outputs):
            return 1e4 * sum(
                (p - self.start_values[n]).square().sum() for n, p in model.named_parameters() if p.requires_grad
            )

        def after_stage(self, model, work, folder):
            (folder / "x").write_text("[3, 5]")

    monkeypatch.setitem(METHODS, "both", Parts("both"))
    monkeypatch.setitem(ADAPTERS, "both", Both)
    results = TrainingRun(
        short("method=both", "training.batch_size=4", "training.per_device_batch_size=4", "training.logging_steps=1")
    )()
    first, second = results["training"].values()
    assert (first["samples"], second["samples"], second["steps"]) == (12, 14, 4)
    assert Both.seen == [("stage-1-ImageNet", []), ("stage-2-Flickr30k", ["stage-1-ImageNet"])]
    log = [
        line["loss"] for line in json.loads((tmp_path / "run/stage-1-ImageNet/log.json").read_text()) if "loss" in line
    ]
    assert log[0] < 10 < log[-1], "the penalty is zero at first and in the loss afterwards"
