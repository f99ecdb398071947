"""C-LoRA: the penalty and its gradient, the sum of frozen tasks, and one LoRA of all ranks for PEFT."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from small_llava import small_llava
from smolora.cli import main
from smolora.recipe import load_recipe
from smolora.train.methods import Method, clora
from smolora.train.run import TrainingRun

STAGES = ("stage-1-ImageNet", "stage-2-Flickr30k")


def factors(R: int, r: int, k: int, d: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """A and B of earlier tasks and of a new one."""
    torch.manual_seed(0)
    shapes = [(R, d), (k, R), (r, d), (k, r)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def dense(past_A, past_B, A, B, s):
    """The penalty as the paper writes it."""
    return ((s * past_B @ past_A).abs() * (s * B @ A)).square().sum()


def in_rank_space(past_A, past_B, A, B, s):
    """The same: P o D = U V^T with Khatri-Rao products of the factors, of R r columns."""
    U = (past_B[:, :, None] * B[:, None, :]).flatten(1)
    V = (past_A.T[:, :, None] * A.T[:, None, :]).flatten(1)
    return s**4 * torch.trace((U.T @ U) @ (V.T @ V))


@pytest.mark.parametrize("chunk", [1, 3 * 7, 10**6], ids=["row by row", "three rows", "whole"])
@pytest.mark.parametrize("sizes", [(4, 4, 11, 7), (6, 2, 5, 7), (1, 3, 1, 7)], ids=str)
def test_the_gradient_is_that_of_the_papers_penalty(monkeypatch, chunk, sizes):
    """By autograd of the dense formula; the value is that in rank space, too."""
    monkeypatch.setattr(clora, "CHUNK", chunk)
    *past, A, B = factors(*sizes)
    A.requires_grad_()
    B.requires_grad_()
    expected = dense(*past, A, B, 1.7)
    gradients = torch.autograd.grad(expected, (A, B))
    with torch.no_grad():
        found = clora.penalty(*past, A, B, 1.7)
        torch.testing.assert_close(found.value, expected)
        torch.testing.assert_close(found.value, in_rank_space(*past, A, B, 1.7))
    for gradient, wanted in zip(found[1:], gradients, strict=True):
        assert wanted.any()
        torch.testing.assert_close(gradient, wanted)


def test_no_drift_no_penalty():
    past_A, past_B, A, B = factors(4, 4, 6, 5)
    assert [float(part.abs().sum()) for part in clora.penalty(past_A, past_B, A, B * 0, 2.0)] == [0, 0, 0]


def test_nothing_of_the_weights_size_is_made(monkeypatch):
    """Every tensor of the computation has fewer elements than the weight."""

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
            return result

    monkeypatch.setattr(clora, "CHUNK", 640)
    with Sizes() as sizes:
        clora.penalty(*factors(4, 4, 80, 64, torch.float32), 1.0)
    assert sizes.largest == 640 < 80 * 64


def test_in_16_bits_it_is_computed_in_float32():
    halves = [factor.bfloat16() for factor in factors(4, 4, 20, 30)]
    found = clora.penalty(*halves, 0.5)
    torch.testing.assert_close(found.value, dense(*(f.double() for f in halves), 0.5), rtol=1e-5, atol=0)
    assert found.A.dtype == found.B.dtype == torch.float32


def adapter_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def lora_layers(model) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.cat([torch.full((2, 4), 3), torch.randint(4, 400, (2, 6))], 1)
    pixels = torch.randn(2, 3, 28, 28)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Runs of two stages and a downstream one, by name."""
    folder = tmp_path_factory.mktemp("clora")
    quick = ["training.epochs=2", "training.per_device_batch_size=4", "training.learning_rate=0.01"]
    quick += ["evaluation.max_new_tokens=4", "downstream.zero-shot=[]"]
    for name, options in {
        "seqlora": ["method=seqlora", "downstream={}"],
        "some": ["method=clora", "methods.clora.weight=1e4"],
    }.items():
        recipe = load_recipe(world, [*quick, *options, f"output={folder / name}"])
        TrainingRun(dataclasses.replace(recipe, tasks=recipe.tasks[:1]) if name == "seqlora" else recipe)()
    return folder


def test_the_first_stage_is_seqloras_bit_for_bit(runs):
    expected = adapter_of(runs / "seqlora" / STAGES[0])
    found = adapter_of(runs / "some" / STAGES[0])
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_each_stage_saves_one_lora_that_has_the_earlier_ones(runs):
    """Of rank 16, 32 and 48, the first rows bit for bit; the configuration keeps the scaling."""
    folders = [runs / "some" / stage for stage in (*STAGES, "downstream-few-shot/Places365, 2-shot")]
    tensors = [adapter_of(folder) for folder in folders]
    for number, (folder, own) in enumerate(zip(folders, tensors, strict=True), 1):
        config = LoraConfig.from_pretrained(folder / "adapter")
        assert config.r == 16 * number and config.lora_alpha / config.r == 2
        for name, factor in own.items():
            axis = 0 if "lora_A" in name else 1
            assert factor.shape[axis] == 16 * number
            if number > 1:
                before = tensors[number - 2][name]
                assert torch.equal(factor.narrow(axis, 0, before.shape[axis]), before)
                new = factor.narrow(axis, before.shape[axis], 16)
                assert new.any() and not torch.equal(new, before.narrow(axis, 0, 16))


def test_stock_peft_loads_it_as_the_trainer_had_it(runs, short, tmp_path):
    """Before the join: P beside a LoRA of the stage's rank. After it: one LoRA, and no hook left."""
    adapter = Method(short("method=clora")).adapter
    previous = runs / "some" / STAGES[0] / "adapter"
    model = adapter.start(small_llava().requires_grad_(False), previous).eval()
    layers = lora_layers(model)
    assert {layer.r["default"] for layer in layers} == {16} == {model.peft_config["default"].r}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(layers) == 16
    first = PeftModel.from_pretrained(small_llava(), previous).eval()
    base = small_llava()
    with torch.no_grad():
        began = model(**batch()).logits
        torch.testing.assert_close(began, first(**batch()).logits)  # D = 0
        assert (began - base(**batch()).logits).abs().max() > 0.01
        for layer in layers:
            layer.lora_B["default"].weight.normal_(std=0.1)
        expected = model(**batch()).logits
        adapter.after_stage(model, SimpleNamespace(), tmp_path)
        torch.testing.assert_close(model(**batch()).logits, expected)
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(small_llava(), tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(**batch()).logits, expected)
    assert (expected - began).abs().max() > 0.01
    assert not any(layer.get_base_layer()._forward_hooks for layer in layers)


def test_p_is_part_of_the_weight_and_has_no_dropout(runs, short):
    """A training forward without any D is the same each time, and the earlier factors get no gradient."""
    adapter = Method(short("method=clora", "adapter.lora_dropout=0.5")).adapter
    model = adapter.start(small_llava().requires_grad_(False), runs / "some" / STAGES[0] / "adapter").train()
    outputs = [model(**batch()).logits for _ in range(2)]
    assert torch.equal(*outputs)
    outputs[0].sum().backward()
    assert all(past.A.grad is None and not past.A.requires_grad for past in adapter._past)


def test_the_step_term_is_the_weighted_gradient(runs, short):
    """Over the layers in their order, beside a gradient that is there; none in the first stage."""
    adapter = Method(short("method=clora", "methods.clora.weight=3")).adapter
    model = adapter.start(small_llava().requires_grad_(False), None)
    adapter.step_term(model, 1.0)
    assert all(p.grad is None for p in model.parameters()) and adapter.figures() == {}
    previous = runs / "some" / STAGES[0] / "adapter"
    tensors = load_file(previous / "adapter_model.safetensors")
    model = adapter.start(small_llava().requires_grad_(False), previous)
    torch.manual_seed(0)
    names = {id(module): name for name, module in model.named_modules()}
    total = 0.0
    expected = []
    for layer in lora_layers(model):
        A, B = (getattr(layer, f"lora_{letter}")["default"].weight for letter in "AB")
        with torch.no_grad():
            B.normal_(std=0.5)
        past = [tensors[f"{names[id(layer)]}.lora_{letter}.weight"].double() for letter in "AB"]
        own = [p.detach().double().requires_grad_() for p in (A, B)]
        value = 3 * dense(*past, *own, 2.0)
        total += value.item()
        expected += [(p, g) for p, g in zip((A, B), torch.autograd.grad(value, own), strict=True)]
        A.grad = torch.ones_like(A)
    adapter.step_term(model, 8.0)
    assert adapter.figures()["penalty"] == pytest.approx(total, rel=1e-4) and total > 0
    for parameter, gradient in expected:
        there = 1.0 if parameter.shape[0] == 16 else 0.0
        assert gradient.any()
        torch.testing.assert_close(parameter.grad.double(), 8 * gradient + there, rtol=1e-3, atol=1e-3)


def test_the_weight_goes_from_no_effect_to_learning_nothing(runs, short):
    """A layer learns other outputs under the penalty: the larger its weight, the less it leaves the first task's."""
    previous = runs / "some" / STAGES[0] / "adapter"
    drifts = []
    for weight in (0, 1, 1e12):
        adapter = Method(short("method=clora", f"methods.clora.weight={weight}", "adapter.lora_dropout=0")).adapter
        torch.manual_seed(0)
        model = adapter.start(small_llava().requires_grad_(False), previous)
        layer = lora_layers(model)[0]
        x, target = torch.randn(50, layer.in_features), torch.randn(50, layer.out_features)
        before = layer(x).detach()
        optimizer = torch.optim.Adam([layer.lora_A["default"].weight, layer.lora_B["default"].weight], lr=0.03)
        anneal = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        for _ in range(100):
            optimizer.zero_grad()
            (layer(x) - target).square().sum(1).mean().backward()
            adapter.step_term(model, 1.0)
            optimizer.step()
            anneal.step()
        drift = (layer(x) - before).detach().square().mean() / before.square().mean()
        drifts.append(float(drift.sqrt()))
    assert drifts[0] > drifts[1] > drifts[2], drifts
    assert drifts[0] > 0.5 and drifts[2] < 0.05, drifts


def test_the_log_has_the_penalty(runs):
    lines = json.loads((runs / "some" / STAGES[1] / "log.json").read_text())
    values = [line["penalty"] for line in lines if "loss" in line]
    assert len(values) == 6 and values[0] == 0 < values[-1]


def test_the_plan_counts_the_frozen_sum(world, capsys):
    """The factors of two earlier stages, those of the downstream one's past."""
    plans = []
    for method in ("seqlora", "clora"):
        assert main(["train", str(world), "--dry-run", "--json", "--method", method]) == 0
        plans.append(json.loads(capsys.readouterr().out)["memory"])
    assert plans[0]["trainable_parameters"] == plans[1]["trainable_parameters"]
    assert plans[1]["method_gib"] * 2**30 == 2 * 4 * plans[0]["trainable_parameters"] and plans[0]["method_gib"] == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("methods.clora.weight=-1", r"methods\.clora\.weight must be .*-1"),
        ("methods.clora.weight=true", r"methods\.clora\.weight must be .*"),
        ("methods.clora.lambda=1", r"methods\.clora\.lambda"),
        (
            "training.arguments.deepspeed=zero3.json",
            r"arguments\.deepspeed must be left out for the adapter 'clora', which adds .*, got 'zero3\.json'",
        ),
        ("method={adapter: clora, schedule: [ewc]}", r"must not have 'ewc' for the adapter 'clora': each stage trains"),
        ("method={adapter: clora, schedule: [joint]}", r"must be 'sequential' for the .*'clora', .*got 'joint'"),
        (
            "method={adapter: clora, schedule: [one-per-task]}",
            r"must be 'sequential' for the .*'clora'.*'one-per-task'",
        ),
    ],
)
def test_what_is_refused(short, override, message):
    with pytest.raises(ValueError, match=message):
        Method(short("method=clora", override))
