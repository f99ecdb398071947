"""Layers against the outputs and gradients of released codes."""

import json
from functools import partial
from itertools import product

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import smolora
from support.oracle import agree
from support.project import GOLDEN


class Golden:
    """A file: its tensors, and what its metadata says as numbers."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"methods/{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.facts = {
                key: json.loads(value) if value[:1] in "[-0123456789" else value
                for key, value in file.metadata().items()
            }
        self.dtype = self.tensors["x"].dtype

    def parameter(self, name: str) -> Tensor:
        return self.tensors[f"param.{name}"]

    def linear(self) -> nn.Linear:
        prefix = "" if "param.weight" in self.tensors else "base_layer."
        k, d = self.parameter(f"{prefix}weight").shape
        linear = nn.Linear(d, k, bias=f"param.{prefix}bias" in self.tensors, dtype=self.dtype)
        with torch.no_grad():
            linear.weight.copy_(self.parameter(f"{prefix}weight"))
            if linear.bias is not None:
                linear.bias.copy_(self.parameter(f"{prefix}bias"))
        return linear

    def check(self, layer: nn.Module, gradients: dict[str, Tensor], **call) -> None:
        """Hold y, dx and named gradients; `gradients`: ours by the released name."""
        x = self.tensors["x"].clone().requires_grad_()
        y = layer(x, **call)
        y.backward(self.tensors["dy"])
        got = {"y": y.detach(), "dx": x.grad, **gradients_of(gradients)}
        expected = {"y": self.tensors["y"], "dx": self.tensors["dx"]}
        expected |= {name: self.tensors[f"grad.{name}"] for name in gradients}
        agree(got, expected, 1e-12 if self.dtype == torch.float64 else 2e-6)


def gradient_of(layer: nn.Module, name: str, expert: int) -> Tensor:
    return layer.get_parameter(name).grad[expert]


def gradients_of(places: dict) -> dict[str, Tensor]:
    return {name: pick() for name, pick in places.items()}


@pytest.mark.parametrize("name", ["moelora_fp64_e4", "moelora_fp32_e8"])
def test_moelora(name: str):
    golden = Golden(name)
    E, r = golden.facts["expert_num"], golden.facts["lora_r_total"] // golden.facts["expert_num"]
    config = smolora.MoELoRAConfig(r=r, lora_alpha=golden.facts["scaling"] * r, lora_dropout=0.0, num_experts=E)
    layer = smolora.FusedMoELoRA(golden.linear(), config)
    released = {k.removeprefix("param."): v for k, v in golden.tensors.items() if k.startswith("param.lora")}
    layer.load_official_state_dict(released)
    again = layer.official_state_dict()
    assert all(torch.equal(again[key], value.to(again[key].dtype)) for key, value in released.items())
    places = {"lora_router.default.weight": lambda: layer.router.grad}
    for letter, e in product("AB", range(E)):
        places[f"lora_{letter}.default.lora{letter}.{e}.weight"] = partial(gradient_of, layer, letter, e)
    golden.check(layer, places)


@pytest.mark.parametrize("name", ["lilora_fp64_task0", "lilora_fp64_task2", "lilora_fp32_task0", "lilora_fp32_task2"])
@pytest.mark.parametrize("each", [False, True], ids=["task", "task of each"])
def test_lilora(name: str, each: bool):
    golden = Golden(name)
    task, r = golden.facts["task_id"], golden.facts["r"]
    config = smolora.LiLoRAConfig(
        r=r, lora_alpha=golden.facts["scaling"] * r, lora_dropout=0.0, task_r=golden.facts["sub_rank"], num_tasks=3
    )
    layer = smolora.FusedLiLoRA(golden.linear(), config)
    ours = {"lora_share_A.default.weight": layer.A, "lora_share_B.default.weight": layer.B}
    for t in range(3):
        ours[f"lora_specific_A.default.{t}.weight"] = layer.task_A[t]
        ours[f"lora_specific_B.default.{t}.weight"] = layer.task_B[t]
        ours[f"lora_specific_B.default.{t}.fusion"] = layer.task_logit[t : t + 1]
    with torch.no_grad():
        for key, value in golden.tensors.items():
            if key.startswith("param.lora"):
                ours[key.removeprefix("param.")].copy_(value)
    layer.B.requires_grad_("grad.lora_share_B.default.weight" in golden.tensors)
    places = {
        "lora_share_A.default.weight": lambda: layer.A.grad,
        f"lora_specific_A.default.{task}.weight": lambda: layer.task_A.grad[task],
        f"lora_specific_B.default.{task}.weight": lambda: layer.task_B.grad[task],
        f"lora_specific_B.default.{task}.fusion": lambda: layer.task_logit.grad[task : task + 1],
    }
    if layer.B.requires_grad:
        places["lora_share_B.default.weight"] = lambda: layer.B.grad
    n = golden.facts["B"]
    golden.check(layer, places, task=torch.full((n,), task) if each else task)
    others = [t for t in range(3) if t != task]
    assert not layer.task_B.grad[others].any() and not layer.task_logit.grad[others].any()


@pytest.mark.parametrize("name", ["dmole_fp64_all", "dmole_fp64_frozen", "dmole_fp64_absent"])
def test_routed_lora_is_the_sum_of_d_mole(name: str):
    """The layer has experts of some tasks only; that of a task without one adds nothing ("absent")."""
    golden = Golden(name)
    placed, asked, r = (golden.facts[key] for key in ("expert_ids", "active_task_ids", "r"))
    config = smolora.RoutedLoRAConfig(
        r=r, lora_alpha=golden.facts["scaling"] * r, lora_dropout=0.0, num_experts=6, placement=placed
    )
    layer = smolora.FusedRoutedLoRA(golden.linear(), config)
    slots = range(len(placed))
    with torch.no_grad():
        for letter, slot in product("AB", slots):
            layer.get_parameter(letter)[slot].copy_(golden.parameter(f"lora_{letter}.default.{slot}.weight"))
    places = {
        f"lora_{letter}.default.{slot}.weight": partial(gradient_of, layer, letter, slot)
        for letter, slot in product("AB", slots)
        if f"grad.lora_{letter}.default.{slot}.weight" in golden.tensors
    }
    assert places
    n = golden.facts["B"]
    golden.check(layer, places, experts=torch.tensor([[*asked, -1]]).expand(n, -1))
    idle = [slot for slot in slots if placed[slot] not in asked]
    assert not layer.A.grad[idle].any() and not layer.B.grad[idle].any()
    assert set(layer.last_routing().ids.flatten().tolist()) == set(asked) & set(placed)
