"""CoIN's MoELoRA adapters in and out: tensor for tensor, and with the released layer's meaning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from smolora import cli
from smolora.official.convert_moelora import convert_official, convert_to_official
from support.tiny_llava import batch, tiny_llava

E, R, ALPHA = 4, 8, 16


def released(folder: Path, projector: bool = True, **changes) -> dict[str, torch.Tensor]:
    """An adapter as CoIN's code saves it, over the tiny LLaVA: two targets in every layer."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    model = tiny_llava().model.language_model
    for i, layer in enumerate(model.layers):
        for name, linear in (("self_attn.q_proj", layer.self_attn.q_proj), ("mlp.down_proj", layer.mlp.down_proj)):
            k, d = linear.weight.shape
            at = f"base_model.model.model.layers.{i}.{name}"
            state[f"{at}.lora_router.weight"] = torch.randn(E, d, generator=generator)
            for e in range(E):
                A, B = torch.randn(R // E, d, generator=generator), torch.randn(k, R // E, generator=generator)
                for suffix in ("weight", "mlp.weight"):
                    state[f"{at}.lora_A.loraA.{e}.{suffix}"] = A.clone()
                    state[f"{at}.lora_B.loraB.{e}.{suffix}"] = B.clone()
    folder.mkdir()
    torch.save(state, folder / "adapter_model.bin")
    config = {
        "peft_type": "MOE_LORA_CoIN",
        "task_type": "CAUSAL_LM_CoIN",
        "r": R,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "expert_num": E,
        "target_modules": ["q_proj", "down_proj"],
        **changes,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if projector:
        layers = tiny_llava().model.multi_modal_projector
        trained = {}
        for number, layer in ((0, layers.linear_1), (2, layers.linear_2)):
            for kind, value in layer.named_parameters():
                name = f"base_model.model.model.mm_projector.{number}.{kind}"
                trained[name] = torch.randn(value.shape, generator=generator) * 0.1
        torch.save(trained, folder / "non_lora_trainables.bin")
    return state


def test_in_and_out_again(tmp_path: Path):
    state = released(tmp_path / "coin")
    assert cli.main(["convert-official", "--adapter", str(tmp_path / "coin"), "--output", str(tmp_path / "ours")]) == 0
    arguments = ["--adapter", str(tmp_path / "ours"), "--output", str(tmp_path / "back"), "--to-official"]
    assert cli.main(["convert-official", *arguments]) == 0
    again = torch.load(tmp_path / "back/adapter_model.bin")
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    before, after = (torch.load(tmp_path / name / "non_lora_trainables.bin") for name in ("coin", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    config = json.loads((tmp_path / "back/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["expert_num"]) == (R, ALPHA, E)
    assert config["target_modules"] == ["down_proj", "q_proj"]


def test_computes_what_the_released_layer_does(tmp_path: Path):
    """In a whole model loaded by stock PEFT: each adapted layer gives W x + s sum softmax(R x)_e B_e A_e x, with
    s = alpha / r of all experts together, and the projector is the trained one."""
    state = released(tmp_path / "coin")
    convert_official(tmp_path / "coin", tmp_path / "ours")
    model = PeftModel.from_pretrained(tiny_llava(), tmp_path / "ours").eval()
    layer = model.base_model.model.model.language_model.layers[0].mlp.down_proj
    seen = {}
    layer.register_forward_hook(lambda m, a, y: seen.update(x=a[0], y=y))
    with torch.no_grad():
        model(**batch((5, 9)))
    x, at = seen["x"], "base_model.model.model.layers.0.mlp.down_proj"
    gate = torch.softmax(x @ state[f"{at}.lora_router.weight"].T, -1)
    expected = layer.base_layer(x)
    for e in range(E):
        A, B = state[f"{at}.lora_A.loraA.{e}.weight"], state[f"{at}.lora_B.loraB.{e}.weight"]
        expected = expected + ALPHA / R * gate[..., e, None] * (x @ A.T @ B.T)
    torch.testing.assert_close(seen["y"], expected, rtol=1e-4, atol=1e-4)
    trained = torch.load(tmp_path / "coin/non_lora_trainables.bin")
    projector = model.base_model.model.model.multi_modal_projector
    got = dict(projector.named_parameters())
    weight = next(v for n, v in got.items() if "modules_to_save" in n and n.endswith("linear_1.weight"))
    assert torch.equal(weight, trained["base_model.model.model.mm_projector.0.weight"])


def test_broken_adapters_are_refused(tmp_path: Path):
    released(tmp_path / "r", r=7)
    with pytest.raises(ValueError, match="expert_num must divide r"):
        convert_official(tmp_path / "r", tmp_path / "out")
    state = released(tmp_path / "twice")
    key = next(key for key in state if key.endswith("loraA.0.mlp.weight"))
    torch.save({**state, key: state[key] + 1}, tmp_path / "twice/adapter_model.bin")
    with pytest.raises(ValueError, match="differs from another tensor of the same expert"):
        convert_official(tmp_path / "twice", tmp_path / "out")
    state = released(tmp_path / "less")
    gone = [key for key in state if ".layers.1.mlp.down_proj.lora_B.loraB.3." in key]
    torch.save({key: value for key, value in state.items() if key not in gone}, tmp_path / "less/adapter_model.bin")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj lacks \['lora_B\.3'\]"):
        convert_official(tmp_path / "less", tmp_path / "out")
    state = released(tmp_path / "tower")
    torch.save({**state, "base_model.model.model.vision_tower.x": torch.ones(1)}, tmp_path / "tower/adapter_model.bin")
    with pytest.raises(ValueError, match="has a tensor that no MoELoRA adapter"):
        convert_official(tmp_path / "tower", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_released_code_cannot_do_is_refused(tmp_path: Path):
    released(tmp_path / "coin", projector=False)
    convert_official(tmp_path / "coin", tmp_path / "ours")
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    (tmp_path / "ours/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 0.3}))
    with pytest.raises(ValueError, match="lora_alpha \\* num_experts must be whole"):
        convert_to_official(tmp_path / "ours", tmp_path / "out")
