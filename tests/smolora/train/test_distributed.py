"""Two processes do what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smolora.recipe import load_recipe
from smolora.train.run import TrainingRun

ROOT = Path(__file__).parents[3]
SAME = (
    "adapter.lora_dropout=0",
    "training.epochs=1",
    "training.batch_size=4",
    "training.logging_steps=1",
    "training.save_steps=2",
)


def launch(recipe: Path, *overrides: str) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(ROOT / "tests/lib/support/two_ranks.py"),
            str(recipe),
            *overrides,
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONSAFEPATH": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def run_of(folder: Path) -> tuple[dict, list[float], dict[str, torch.Tensor]]:
    results = json.loads((folder / "results.json").read_text())
    losses, adapters = [], {}
    for stage in results["stages"]:
        lines = json.loads((folder / stage / "log.json").read_text())
        losses += [line["loss"] for line in lines if "loss" in line]
        tensors = load_file(folder / stage / "adapter/adapter_model.safetensors")
        adapters.update({f"{stage}.{name}": tensor for name, tensor in tensors.items()})
    return results, losses, adapters


FSDP2 = (
    "training.arguments.fsdp=true",
    "training.arguments.fsdp_config={version: 2, auto_wrap_policy: TRANSFORMER_BASED_WRAP, "
    "transformer_layer_cls_to_wrap: [LlamaDecoderLayer], state_dict_type: FULL_STATE_DICT, "
    "cpu_ram_efficient_loading: false}",
)
ZERO3 = (
    "training.arguments.deepspeed={zero_optimization: {stage: 3}, "
    "train_micro_batch_size_per_gpu: auto, gradient_accumulation_steps: auto, gradient_clipping: auto}",
)


@pytest.mark.parametrize(
    ("method", "sharded"),
    [
        pytest.param("smolora", (), id="smolora-ddp"),  # what several GPUs run first
        *(
            pytest.param(method, sharded, id=f"{method}-{name}", marks=pytest.mark.slow)
            for method in ("smolora", "seqlora", "dora")
            for name, sharded in (("ddp", ()), ("fsdp2", FSDP2), ("zero3", ZERO3))
            if (method, name) != ("smolora", "ddp")
        ),
        *(
            pytest.param(method, (), id=f"{method}-ddp", marks=pytest.mark.slow)
            for method in (
                "moelora",
                "branchlora",
                "dmole",
                "lilora",
                "moecl",
                "replay",
                "ewc",
                "ewc-tir",
                "smolora-ridge",
                "smolora-prototype",
                "routed",
            )
        ),
    ],
)
def test_two_ranks_equal_one(world, tmp_path, method, sharded):
    """Without dropout, whose masks differ from process to process: losses, adapters, answers and scores."""
    if sharded == ZERO3:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    overrides = [*SAME, f"method={method}", "training.learning_rate=1e-3", "downstream={}"]
    launch(world, *overrides, *sharded, f"output={tmp_path / 'two'}")
    TrainingRun(load_recipe(world, [*overrides, f"output={tmp_path / 'one'}"]))()
    (two, losses, adapters), (one, expected, wanted) = run_of(tmp_path / "two"), run_of(tmp_path / "one")
    assert len(losses) == len(expected) == 6
    assert losses == pytest.approx(expected, rel=1e-5)
    assert adapters.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            adapters[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert {key: two[key] for key in ("matrix", "mif", "training")} == {
        key: one[key] for key in ("matrix", "mif", "training")
    }
    for stage in one["stages"]:
        for answers in (tmp_path / "one" / stage / "answers").glob("*.jsonl"):
            assert (tmp_path / "two" / stage / "answers" / answers.name).read_bytes() == answers.read_bytes()
