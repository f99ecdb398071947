"""Whole runs that are compared: on two processes and on one, killed and not."""

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


def assert_ranks_agree(
    recipe: Path, folder: Path, *overrides: str, sharded: tuple[str, ...] = (), steps: int = 6
) -> None:
    """Run a recipe on two processes and on one: losses, adapters, answers and scores are the same.

    Args:
        recipe: the recipe.
        folder: of the two runs.
        overrides: of both.
        sharded: further ones of the two processes.
        steps: how many the runs have.
    """
    launch(recipe, *overrides, *sharded, f"output={folder / 'two'}")
    TrainingRun(load_recipe(recipe, [*overrides, f"output={folder / 'one'}"]))()
    (two, losses, adapters), (one, expected, wanted) = run_of(folder / "two"), run_of(folder / "one")
    assert len(losses) == len(expected) == steps
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
        for answers in (folder / "one" / stage / "answers").glob("*.jsonl"):
            assert (folder / "two" / stage / "answers" / answers.name).read_bytes() == answers.read_bytes()


def killed_runs(recipe: Path, seed: int, kills: int) -> list[dict]:
    """Run `killed.py`; the folders `run-whole` and `run-<n>` are beside the recipe then."""
    paths = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests/lib")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/lib/support/killed.py"), str(recipe), str(seed), str(kills)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"run"')]


def contents(run: Path) -> dict[str, object]:
    """All that a run leaves and that may not depend on kills, by path."""
    found: dict[str, object] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if not path.is_file() or path.name == "evaluation.json":  # which is timing alone
            continue
        if path.name in ("results.json", "training.json"):
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if key != "timing"}
        elif path.suffix == ".safetensors":  # whose metadata come in any order
            found[name] = {key: tensor.numpy().tobytes() for key, tensor in load_file(path).items()}
        elif path.name == "checksums.json":  # of those
            found[name] = list(json.loads(path.read_text()))
        elif path.name == "log.json":
            found[name] = [line for line in json.loads(path.read_text()) if "loss" in line]
        else:
            found[name] = path.read_bytes()
    return found


def assert_same(run: Path, whole: Path) -> None:
    one, other = contents(run), contents(whole)
    assert "results.json" in other and one.keys() == other.keys()
    for name in other:
        assert one[name] == other[name], name
