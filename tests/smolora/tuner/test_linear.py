"""Outputs that may be written to, adapters on offloaded bases and of several sizes, errors that name their layer."""

import os
import tempfile

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

import smolora
from smolora import MoELoRAConfig
from smolora.tuner import MixtureLinear
from support.gradients import assert_same_gradients, gradients
from support.tiny_llava import (
    INSTRUCTION_DIM,
    adapted,
    batch,
    embeddings,
    fill_adapters,
    logits,
    tiny_config,
    tiny_llama,
    tiny_llava,
)

# ------------------------------------------------------------------------------------------------------- in-place use

WRITES = {
    "ReLU": lambda y: nn.ReLU(inplace=True)(y),
    "add": lambda y: y.add_(1),
    "masked": lambda y: y.masked_fill_(y > 0.5, 0),
    "index": lambda y: (y.__setitem__(y > 0.5, 0), y)[1],
    "slice": lambda y: (y[1:].mul_(2), y)[1],
    "dropout": lambda y: nn.Dropout(0.0, inplace=True)(y),
    "several": lambda y: y.mul_(2).add_(1).clamp_(min=0),
}


def packed(x):
    return x.flatten(0, 1), {"cu_seqlens": torch.tensor([0, 3, 8], dtype=torch.int32)}


LAYOUTS = {"rows": lambda x: (x, {}), "packed": packed}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.25}, {"top_k": 2}, {"fusion": "vu"}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layers_output_can_be_written_to(write, layout, options, bias):
    """As nn.Linear's: the same values and gradients as of a copy that is written to."""
    found = []
    for copies in (False, True):
        torch.manual_seed(0)
        config = smolora.SMoLoRAConfig(
            **{"r": 3, "lora_dropout": 0.0, "num_vu_experts": 3, "num_if_experts": 2, "instruction_dim": 5, **options}
        )
        layer = smolora.FusedSMoLoRA(nn.Linear(7, 11, bias=bias), config)
        for name, parameter in layer.named_parameters():
            if name.endswith("_B"):
                nn.init.normal_(parameter)
        x, arguments = LAYOUTS[layout](torch.randn(2, 4, 7))
        x.requires_grad_()
        y = layer(x, instruction=torch.randn(2, 5), **arguments)
        y = WRITES[write](y.clone() if copies else y)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    for mine, theirs in zip(*found, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", ["smolora", "moelora"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_models_layers_can_be_written_to(write, kind, recompute):
    """Text layers and the projector, in training and not."""
    found = []
    for copies in (False, True):
        if kind == "smolora":
            model = adapted().train()
        else:
            torch.manual_seed(0)
            model = get_peft_model(tiny_llava(), MoELoRAConfig(r=4, num_experts=3, lora_dropout=0.0)).train()
            for name, parameter in model.named_parameters():
                if name.endswith(".B"):
                    nn.init.normal_(parameter, std=0.1)
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for name, module in model.get_base_model().named_modules():
            if name.endswith(("layers.1.mlp.up_proj", "projector.linear_1")):
                module.register_forward_hook(lambda m, a, y, copies=copies: WRITES[write](y.clone() if copies else y))
        inputs = {**batch((5, 9), answer=3), **({"instruction_embeds": embeddings(2)} if kind == "smolora" else {})}
        model(**inputs, use_cache=False).loss.backward()
        with torch.no_grad():
            found.append([model(**inputs).logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


# ----------------------------------------------------------------------------------------------------- offloaded bases


def offloaded(kind, folder):
    model = tiny_llava()
    if kind == "disk":
        disk_offload(model, folder, execution_device=torch.device("cpu"))
    else:
        cpu_offload(model, execution_device=torch.device("cpu"))
    return model


@pytest.mark.parametrize("kind", ["disk", "cpu"])
def test_an_offloaded_base(kind, tmp_path):
    """Its weights lie on meta: the adapter lies where it runs, trains, and is saved and loaded."""
    adapted().save_pretrained(tmp_path / "adapter")
    want = logits(adapted())
    model = PeftModel.from_pretrained(offloaded(kind, tmp_path / "weights"), tmp_path / "adapter").eval()
    assert {p.device.type for n, p in model.named_parameters() if "smolora" in n} == {"cpu"}
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    e, inputs = embeddings(2), batch()
    tokens = {"max_new_tokens": 4, "do_sample": False, "instruction_embeds": e}
    assert torch.equal(model.generate(**inputs, **tokens), adapted().generate(**inputs, **tokens))
    model = get_peft_model(offloaded(kind, tmp_path / "more"), tiny_config())
    model.add_adapter("second", tiny_config(r=2))
    fill_adapters(model)
    plain = get_peft_model(tiny_llava(), tiny_config())
    plain.add_adapter("second", tiny_config(r=2))
    fill_adapters(plain)
    model.load_state_dict({n: p for n, p in plain.state_dict().items() if "smolora" in n}, strict=False)
    for one in (model, plain):
        one.set_adapter("second")
        one.train()(**batch(answer=3), instruction_embeds=e).loss.backward()
    assert_same_gradients(gradients(model), gradients(plain), rtol=1e-4, atol=1e-6)


def test_a_device_map(tmp_path):
    """Of transformers: one layer of two is on the disk."""
    tiny_llama().save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    base = LlamaForCausalLM.from_pretrained(
        tmp_path,
        device_map={**places, "model.rotary_emb": "cpu", "lm_head": "cpu"},
        offload_folder=tempfile.mkdtemp(dir=tmp_path),
        dtype=torch.float32,
    )
    models = [get_peft_model(m, tiny_config()).eval() for m in (base, tiny_llama())]
    assert models[0].get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.is_meta
    for model in models:
        fill_adapters(model)
    models[0].load_state_dict({n: p for n, p in models[1].state_dict().items() if "smolora" in n}, strict=False)
    inputs = {"input_ids": torch.arange(4, 24).view(2, 10), "instruction_embeds": embeddings(2)}
    with torch.no_grad():
        torch.testing.assert_close(models[0](**inputs).logits, models[1](**inputs).logits)


def test_moelora_on_an_offloaded_base(tmp_path):
    model = get_peft_model(offloaded("disk", tmp_path), MoELoRAConfig(r=4, num_experts=3))
    assert {p.device.type for n, p in model.named_parameters() if "moelora" in n} == {"cpu"}
    model.train()(**batch(answer=3)).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith(".B"))


def test_a_base_without_values_stays_without():
    """On meta for good, as one is made to be filled later: so is the adapter."""
    with torch.device("meta"):
        base = LlamaForCausalLM(tiny_llama().config)
    model = get_peft_model(base, tiny_config())
    assert {p.device.type for p in model.parameters()} == {"meta"}


# -------------------------------------------------------------------------------------------- adapters of several sizes


def test_adapters_of_several_sizes():
    """Other ranks, experts and instructions, on other layers: each as alone, in whatever looks at it."""
    sizes = {
        "one": dict(r=4),
        "two": dict(r=2, num_vu_experts=5, num_if_experts=2, top_k=2, target_modules=["gate_proj", "linear_1"]),
        "three": dict(r=3, num_vu_experts=1, num_if_experts=4, instruction_dim=7, target_modules=["up_proj"]),
        "four": dict(r=1, fusion="vu", route_over="all", target_modules=["down_proj", "up_proj"]),
    }
    e = {name: torch.randn(2, c.get("instruction_dim", INSTRUCTION_DIM)) for name, c in sizes.items()}
    torch.manual_seed(1)
    model = get_peft_model(tiny_llava(), tiny_config(**sizes["one"]), adapter_name="one")
    for name in list(sizes)[1:]:
        model.add_adapter(name, tiny_config(**sizes[name]))
    fill_adapters(model)
    inputs, options = batch((5, 9), (2, 1)), {"max_new_tokens": 4, "do_sample": False}
    for name, size in sizes.items():
        alone = get_peft_model(tiny_llava(), tiny_config(**size)).eval()
        alone.load_state_dict(
            {n.replace(f".{name}.", ".default."): p for n, p in model.state_dict().items() if f".{name}." in n},
            strict=False,
        )
        model.set_adapter(name)
        model.eval()
        with torch.no_grad():
            got = model(**inputs, instruction_embeds=e[name]).logits
            assert torch.equal(got, alone(**inputs, instruction_embeds=e[name]).logits)
        mine, theirs = smolora.routing_report(model), smolora.routing_report(alone)
        assert mine.keys() == theirs.keys() and all(row["adapter"] == name for row in mine.values())
        for key, row in mine.items():
            assert torch.equal(row["vu_logits"], theirs[key]["vu_logits"])
            assert torch.equal(row["alpha"], theirs[key]["alpha"])
        tokens = model.generate(**inputs, instruction_embeds=e[name], **options)
        assert torch.equal(tokens, alone.generate(**inputs, instruction_embeds=e[name], **options))
    model.base_model.set_adapter(["one", "two", "four"])
    with torch.no_grad():
        model(**inputs, instruction_embeds=e["one"])
    found = {name: smolora.routing_report(model, name) for name in ("one", "two", "four")}
    gate = "model.language_model.layers.0.mlp.gate_proj"
    assert found["one"][gate]["vu_logits"].shape == (2, 3) and found["two"][gate]["vu_logits"].shape == (2, 5)
    assert gate not in found["four"] and len(found["four"]) == 4
    model.base_model.set_adapter(["one", "three"])
    with pytest.raises(ValueError, match=r"instruction_embeds must have shape \(2, 7\).*got \(2, 12\)"):
        model(**inputs, instruction_embeds=e["one"])


def test_moelora_adapters_of_several_sizes():
    torch.manual_seed(0)
    model = get_peft_model(tiny_llava(), MoELoRAConfig(r=4, num_experts=3), adapter_name="one")
    model.add_adapter("two", MoELoRAConfig(r=2, num_experts=5, target_modules=["up_proj"]))
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.1)
    model.eval()
    found = []
    with torch.no_grad():
        for names in (["one"], ["two"], ["one", "two"]):
            model.base_model.set_adapter(names)
            found.append(model(**batch()).logits)
    assert not any(torch.allclose(found[i], found[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


# ------------------------------------------------------------------------------------------------ errors name the layer


def test_an_error_within_a_model_names_the_layer():
    model, e, inputs = adapted(), embeddings(2), batch((5, 9))
    bad = torch.full_like(e, float("nan"))
    with pytest.raises(ValueError, match=r"^model\.multi_modal_projector\.linear_1: instruction must be finite"):
        model(**inputs, instruction_embeds=bad)
    layer = model.get_base_model().model.language_model.layers[1].mlp.down_proj
    layer.smolora_experts["default"].to("meta")
    with pytest.raises(ValueError, match=r"^model\.language_model\.layers\.1\.mlp\.down_proj: the layer's parameters"):
        model(**inputs, instruction_embeds=e)
    with pytest.raises(
        RuntimeError, match=r"^model\.language_model\.layers\.0\.mlp\.up_proj: an adapted layer was called"
    ):
        model.get_base_model().model.language_model.layers[0].mlp.up_proj(torch.zeros(1, 2, 64))
    with pytest.raises(RuntimeError, match=r"^model\.multi_modal_projector\.linear_1: an adapted layer was called"):
        model.get_base_model().get_image_features(inputs["pixel_values"])
    head = get_peft_model(tiny_llava(), tiny_config(target_modules=["lm_head"])).eval()
    with pytest.raises(ValueError, match=r"^lm_head: route_mask must be bool of shape \(2, 1\)"):
        head(**inputs, instruction_embeds=e, logits_to_keep=1)


def test_an_error_of_moelora_names_the_layer():
    model = get_peft_model(tiny_llava(), MoELoRAConfig(r=4, num_experts=3)).eval()
    model.get_base_model().model.language_model.layers[1].mlp.up_proj.moelora_experts["default"].half()
    layer = model.get_base_model().model.language_model.layers[1].mlp.up_proj
    layer.moelora_experts["default"].A = nn.Parameter(torch.zeros(3, 4, 5))
    with pytest.raises(RuntimeError, match=r"^model\.language_model\.layers\.1\.mlp\.up_proj: "):
        model(**batch())


def test_an_error_keeps_its_type_and_place():
    """It is the one that was raised, once named."""
    model, e = adapted(), embeddings(2)

    class Mine(ValueError):
        pass

    def fails(module, args):
        raise Mine("of a hook", 3)

    base = model.get_base_model().model.language_model.layers[1].mlp.up_proj.base_layer
    base.register_forward_pre_hook(fails)
    with pytest.raises(Mine) as found:
        model(**batch(), instruction_embeds=e)
    assert found.value.args == ("model.language_model.layers.1.mlp.up_proj: of a hook", 3)
    assert os.path.basename(str(found.traceback[-1].path)) == os.path.basename(__file__)
    assert isinstance(model.get_base_model().model.language_model.layers[1].mlp.up_proj, MixtureLinear)
