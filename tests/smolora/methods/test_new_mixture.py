"""A mixture that the package does not know: the file of docs/add_a_method.md, registered as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import smolora
from smolora.tuner.model import register
from support.project import ROOT
from support.tiny_llava import batch, tiny_llava

PAGE = ROOT / "docs/add_a_method.md"
source, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
module = {"__name__": "smolora.methods.gatedlora", "__package__": "smolora.methods"}
exec(compile(source, PAGE, "exec", dont_inherit=True), module)
FusedGatedLoRA, GatedLoRAConfig, GATEDLORA = (module[n] for n in ("FusedGatedLoRA", "GatedLoRAConfig", "GATEDLORA"))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_layer(backend: str):
    """Outputs and gradients of every parameter, router included, are those of the equation."""
    if backend == "triton" and not smolora.backend_info()["backends"]["triton"]["available"]:
        pytest.skip("Triton's kernels are for a GPU here")
    torch.manual_seed(0)
    layer = FusedGatedLoRA(nn.Linear(20, 24), GatedLoRAConfig(r=4, lora_dropout=0.0, num_experts=3))
    with torch.no_grad():
        layer.B.normal_()
        layer.A.normal_(std=0.3)
    x, g = torch.randn(2, 9, 20, requires_grad=True), torch.randn(2, 9, 24)
    with smolora.use_backend(backend):
        y = layer(x)
        got = torch.autograd.grad(y, [x, layer.A, layer.B, layer.router], g)
    gate = torch.sigmoid(x @ layer.router.T)
    experts = torch.stack([x @ layer.A[e].T @ layer.B[e].T for e in range(3)], -2)
    written = layer.base_layer(x) + layer.config.scaling * (gate[..., None] * experts).sum(-2)
    torch.testing.assert_close(y, written, rtol=1e-4, atol=1e-4)
    for one, other in zip(got, torch.autograd.grad(written, [x, layer.A, layer.B, layer.router], g), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_whole_model(tmp_path: Path):
    """The one registration gives PEFT the method: it trains, saves and loads."""
    register(GATEDLORA)
    model = get_peft_model(tiny_llava(), GatedLoRAConfig(r=2, num_experts=2, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**batch((5, 9), answer=2)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch((5, 9))).logits, model(**batch((5, 9))).logits)
