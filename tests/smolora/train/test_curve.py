"""The fused layer and the paper's equations as written train alike: the same losses, with the same dropout masks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import smolora.methods.base
from smolora.recipe import load_recipe
from smolora.reference import smolora_forward
from smolora.spec import Bank, Dropout, Mixed, Router, Slots, Tokens
from smolora.train.run import TrainingRun

ROOT = Path(__file__).parents[3]


def reference_linear(
    x: Tensor,
    banks: list[Bank],
    *,
    tokens: Tokens,
    scaling: float,
    dropout: Dropout,
    weight: Tensor,
    bias: Tensor | None,
    mix: str,
    slots: Slots | None = None,
    routers: tuple[Router, ...] = (),
    instruction: Tensor | None = None,
    **options,
) -> Mixed:
    """The oracle in the place of `mixture_linear`, for a plain linear layer and top-1 routes."""
    assert mix == "smolora"
    n = tokens.num_seqs
    vu, other = banks
    vu_router, if_router = (r.weight for r in routers) if routers else (None, None)
    out, routing = smolora_forward(
        x.view(n, -1, x.shape[1]),
        weight,
        bias,
        vu.A,
        vu.B,
        other.A,
        other.B,
        vu_router,
        if_router,
        vu.importance,
        other.importance,
        instruction,
        scaling=scaling,
        dropout=dropout.threshold / 256,
        seed=None if dropout.seed is None else int(dropout.seed),
        return_routing=True,
        route_mask=None if tokens.route_mask is None else tokens.route_mask.view(n, -1),
        routes=None if slots is None else [slots.ids[:, bank] for bank in range(2)],
    )
    chosen, gates = (torch.stack(pair, 1) for pair in (routing.routes, routing.gates))
    logits = None if routing.logits[0] is None else torch.cat(routing.logits, 1)
    return Mixed(out.reshape(len(x), -1), chosen.int(), gates, logits, torch.logit(routing.alpha))


def losses_and_results(recipe, output) -> tuple[list[float], dict]:
    run = TrainingRun(dataclasses.replace(recipe, output=str(output)))
    results = run()
    log = []
    for stage in results["stages"]:
        lines = json.loads((output / stage / "log.json").read_text())
        log += [line["loss"] for line in lines if "loss" in line]
    return log, {key: results[key] for key in ("matrix", "mif", "AP", "MAP", "BWT", "MIF")}


def assert_same_curve(recipe, folder, monkeypatch, steps: int) -> None:
    fused, fused_results = losses_and_results(recipe, folder / "fused")
    calls = []

    def counted(*args, **kwargs):
        calls.append(None)
        return reference_linear(*args, **kwargs)

    monkeypatch.setattr(smolora.methods.base, "mixture_linear", counted)
    written, written_results = losses_and_results(recipe, folder / "reference")
    assert len(calls) > 8 * steps, "the reference ran in every layer"
    assert len(fused) == len(written) == steps
    assert max(abs(a - b) for a, b in zip(fused, written, strict=True)) < 1e-3
    assert fused[-1] < fused[0] - 0.5, "it learns"
    assert fused_results == written_results


QUICK = (
    "training.logging_steps=1",
    "training.per_device_batch_size=6",
    "training.batch_size=6",
    "training.save_steps=999",
)


def test_same_curve(short, tmp_path, monkeypatch):
    recipe = short(*QUICK, "training.epochs=3", one_task=True)
    assert_same_curve(recipe, tmp_path, monkeypatch, 6)


@pytest.mark.slow
def test_same_curve_over_200_steps(short, tmp_path, monkeypatch):
    recipe = short(*QUICK, "training.epochs=50", "training.learning_rate=3e-3")
    assert_same_curve(recipe, tmp_path, monkeypatch, 200)


@pytest.mark.slow
def test_same_curve_on_minicvit(tmp_path, monkeypatch):
    """The first stage as `make run` trains it: 200 steps, then ScienceQA's 100 questions."""
    made = (ROOT / "data/minicvit-base/model.safetensors").is_file()
    monkeypatch.chdir(ROOT if made else tmp_path)  # else both are made there, which takes minutes
    recipe = load_recipe(ROOT / "recipes/minicvit_run.yaml", ["training.logging_steps=1", "training.save_steps=999"])
    recipe = dataclasses.replace(recipe, tasks=recipe.tasks[:1])
    assert_same_curve(recipe, tmp_path, monkeypatch, 200)
