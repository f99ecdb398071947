"""DoRA: PEFT's, started without rounding, carried on from stage to stage, its m without weight decay."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from small_llava import small_llava
from smolora.train.methods import Method
from smolora.train.run import TrainingRun

MAGNITUDE = "lora_magnitude_vector"


def new(short, *overrides: str, dtype: torch.dtype = torch.float32):
    """A new adapter on a model."""
    adapter = Method(short("method=dora", *overrides)).adapter
    return adapter.start(small_llava(dtype=dtype).requires_grad_(False), None)


def layers_of(model) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def batch(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.cat([torch.full((2, 4), 3), torch.randint(4, 400, (2, 6))], 1)
    pixels = torch.randn(2, 3, 28, 28).to(dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_equals_the_base_bit_for_bit(short, dtype, training):
    """With dropout in training too: (m / n - 1) is zero."""
    mixed = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
    with torch.no_grad(), mixed:
        expected = small_llava(dtype=dtype)(**batch(dtype)).logits
        model = new(short, dtype=dtype).train(training)
        assert {p.dtype for n, p in model.named_parameters() if MAGNITUDE in n} == {torch.float32}
        assert torch.equal(model(**batch(dtype)).logits, expected)
        if dtype != torch.float32:  # PEFT's own start has m in the base's type
            config = Method(short("method=dora")).adapter.config(small_llava())
            stock = get_peft_model(small_llava(dtype=dtype), config).train(training)
            assert not torch.equal(stock(**batch(dtype)).logits, expected)


def rank_space_norm(W, A, B, s):
    """n of each row of W + s B A in float64, from products with r columns."""
    W, A, B = W.double(), A.double(), B.double()
    square = W.square().sum(1) + 2 * s * ((W @ A.T) * B).sum(1) + s**2 * ((B @ (A @ A.T)) * B).sum(1)
    return square.clamp(min=0).sqrt()


def test_layers_compute_the_papers_equation(short):
    """With any A, B and m, n from rank space; and n gets no gradient."""
    model = new(short, "adapter.lora_dropout=0").train()
    torch.manual_seed(0)
    layers = layers_of(model)
    assert len(layers) == 8
    for layer in layers.values():
        A, B, m = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B", MAGNITUDE))
        with torch.no_grad():
            B.normal_(std=0.3)
            m.mul_(1 + 0.2 * torch.randn_like(m))
        s, base = layer.scaling["default"], layer.get_base_layer()
        n = rank_space_norm(base.weight, A, B, s).detach()
        x = torch.randn(5, base.in_features)
        W = base.weight.double()
        A2, B2, m2 = (p.detach().double().requires_grad_() for p in (A, B, m))
        expected = (m2 / n) * (x.double() @ (W + s * B2 @ A2).T)
        expected = expected if base.bias is None else expected + base.bias.double()
        y = layer(x)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
        g = torch.randn_like(y)
        found = torch.autograd.grad(y, (A, B, m), g)
        for gradient, wanted in zip(found, torch.autograd.grad(expected, (A2, B2, m2), g.double()), strict=True):
            torch.testing.assert_close(gradient.double(), wanted, rtol=1e-3, atol=1e-3)


def test_dropout_costs_a_second_product_with_the_base_weight(short):
    """And no dropout, or eval mode, does not: the base's output is used again."""
    counts = {}
    for dropout in (0.0, 0.5):
        for training in (True, False):
            model = new(short, f"adapter.lora_dropout={dropout}").train(training)
            rows = {}
            for name, layer in layers_of(model).items():
                x = torch.randn(7, layer.in_features)
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    layer(x)
                rows[name] = counter.get_total_flops()
            counts[dropout, training] = rows
    assert counts[0.0, True] == counts[0.0, False] == counts[0.5, False]
    for name, layer in layers_of(model).items():
        second = 2 * 7 * layer.in_features * layer.out_features
        assert counts[0.5, True][name] - counts[0.0, True][name] == second


def test_the_plan_counts_the_copies_that_the_second_product_keeps(short):
    """Measured as what a forward in 16 bits saves for the backward, of a weight's shape and not the weight."""
    for options in (("adapter.lora_dropout=0.1",), ("adapter.lora_dropout=0",)):
        recipe = short("method=dora", "model.dtype=bfloat16", *options)
        adapter = Method(recipe).adapter
        model = adapter.start(small_llava(dtype=torch.bfloat16).requires_grad_(False), None).train()
        weights = [layer.get_base_layer().weight for layer in layers_of(model).values()]
        known, copies = {w.data_ptr() for w in weights}, {}

        def note(tensor, weights=weights, known=known, copies=copies):
            copied = any(torch.equal(tensor, each) for weight in weights for each in (weight, weight.mT))
            if copied and tensor.data_ptr() not in known:
                copies[tensor.data_ptr()] = tensor
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            model(**batch(torch.bfloat16))
        held = sum(2 * tensor.numel() for tensor in copies.values())
        unneeded = 2 * small_llava().model.multi_modal_projector.linear_1.weight.numel()  # its input has no gradient
        assert adapter.memory(model) == (held + unneeded if held else 0)
        assert (held > 0) == (options == ("adapter.lora_dropout=0.1",))
    assert Method(short("method=dora")).adapter.memory(model) == 0  # float32 needs no copy


def magnitudes(folder) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if MAGNITUDE in name}


def test_m_goes_on_and_is_not_decayed(short, tmp_path):
    """Two stages of one step. Weight decay of 10 would take 30% off m in each; AdamW's step is at most the rate."""
    recipe = short("method=dora", "training.weight_decay=10", "training.warmup_ratio=0")
    TrainingRun(recipe)()
    folders = [tmp_path / "run" / stage / "adapter" for stage in ("stage-1-ImageNet", "stage-2-Flickr30k")]
    first, second = map(magnitudes, folders)
    fresh = {n.removesuffix(".weight"): layer for n, layer in layers_of(new(short)).items()}
    assert len(first) == len(fresh) == 8
    for name, m in first.items():
        layer = fresh[name.partition(f".{MAGNITUDE}")[0]]
        before = torch.linalg.norm(layer.get_base_layer().weight, dim=1)
        for one, other in ((before, m), (m, second[name])):
            step = (one - other).abs()
            assert 0.02 < float(step.max()) < 0.04 < 0.3 * float(one.max()), name
    decayed = {  # A starts away from 0, and loses 30% to decay
        name: tensor for name, tensor in load_file(folders[0] / "adapter_model.safetensors").items() if "lora_A" in name
    }
    assert all(float(tensor.abs().max()) < 0.75 * tensor.shape[1] ** -0.5 for tensor in decayed.values())


def test_it_answers_outside_the_trainer(short, tmp_path):
    """Stock PEFT loads the adapter, and it does something."""
    recipe = short("method=dora", one_task=True)
    TrainingRun(recipe)()
    with torch.no_grad():
        model = PeftModel.from_pretrained(small_llava(), tmp_path / "run/stage-1-ImageNet/adapter").eval()
        changed = functional.mse_loss(model(**batch()).logits, small_llava()(**batch()).logits)
    assert model.peft_config["default"].use_dora and float(changed) > 1e-4
