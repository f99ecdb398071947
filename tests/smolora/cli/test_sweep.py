"""`smolora sweep` from its first start to its last."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smolora import cli
from support.train_world import make_world

ROOT = Path(__file__).parents[3]
QUICK = [
    "downstream={}",
    "training.batch_size=12",
    "training.per_device_batch_size=12",
    "training.epochs=1",
    "evaluation.max_new_tokens=2",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("sweep"), ask=2)


@pytest.fixture
def environment(monkeypatch):
    """What processes that are started need."""
    for name, value in {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)


def test_a_dry_run(recipe, tmp_path, capsys):
    command = ["sweep", str(recipe), *QUICK, "seed=0,1", "--method", "ewc", "--output", str(tmp_path / "out")]
    assert cli.main([*command, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"2 runs, into {tmp_path / 'out'}" and lines[1].startswith("seed=0: 2 steps, 0.0")
    assert cli.main([*command, "--dry-run", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert [run["values"] for run in plans["runs"]] == [{"seed": 0}, {"seed": 1}]
    assert plans["runs"][0]["plan"]["method"] == "ewc" and plans["output"] == str(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed=0,1", "--jobs", "0"], "--jobs must be 1 or more, got 0"),
        (["seed=0"], "a sweep needs a key with several values"),
        (["seed=0,1", "tasks.0.train=nothing.json"], "nothing.json"),
    ],
)
def test_what_is_refused(recipe, tmp_path, capsys, arguments, message):
    assert cli.main(["sweep", str(recipe), *arguments, "--output", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_launcher_is_refused(recipe, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["sweep", str(recipe), "seed=0,1"]) == 1
    assert "smolora sweep must be started without a launcher" in capsys.readouterr().err


def test_a_sweep_that_is_killed_goes_on(recipe, tmp_path, environment, capfd):
    """Killed once its first run is done: that one is not repeated, and table, data and plot are of both."""
    out = tmp_path / "out"
    command = ["sweep", str(recipe), *QUICK, "methods.ewc.weight=0,5", "--method", "ewc", "--output", str(out)]
    begun = subprocess.Popen([sys.executable, "-m", "smolora.cli", *command, "--quiet"], start_new_session=True)
    first = out / "weight=0/results.json"
    deadline = time.monotonic() + 300
    while not (out / "weight=5/stage-1-ImageNet").exists() and time.monotonic() < deadline and begun.poll() is None:
        time.sleep(0.05)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.wait()
    assert first.is_file() and not (out / "sweep.md").exists()
    before = first.stat().st_mtime_ns
    assert cli.main([*command, "--json"]) == 0
    printed, progress = capfd.readouterr()
    content = json.loads(printed)
    assert "1 of 2 runs are finished" in progress and "weight=5: done (1 of 1)" in progress
    assert first.stat().st_mtime_ns == before
    assert [run["values"]["methods.ewc.weight"] for run in content["runs"]] == [0, 5]
    results = [json.loads((Path(run["folder"]) / "results.json").read_text()) for run in content["runs"]]
    assert [run["figures"]["AP"] for run in content["runs"]] == [result["AP"][-1] for result in results]
    assert [result["config"]["methods"]["ewc"]["weight"] for result in results] == [0, 5]
    assert "| weight | ImageNet | Flickr30k | AP | MAP | BWT | MIF |" in Path(content["markdown"]).read_text()
    assert all(Path(content[kind]).is_file() for kind in ("plot", "csv"))
    # a run that fails is told, the table has the other one, and the next start goes on with it
    (out / "weight=5/results.json").unlink()
    (out / "weight=5/stage-2-Flickr30k/scores.json").unlink()
    adapter = out / "weight=5/stage-2-Flickr30k/adapter/adapter_model.safetensors"
    content, broken = adapter.read_bytes(), adapter.with_suffix(".aside")
    broken.write_bytes(content)
    adapter.write_bytes(content[:100])
    assert cli.main(command) == 1
    printed, errors = capfd.readouterr()
    assert "weight=5: failed with status 1 (1 of 1)" in printed
    assert "weight=5: not finished; the same command goes on with them" in errors
    assert "Not finished: weight=5." in (out / "sweep.md").read_text()
