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


RESULTS = {
    **{"name": "small", "method": "ewc", "benchmark": "small", "setting": "single", "protocol": "smolora"},
    **{"task_source": None, "tasks": ["ImageNet", "Flickr30k"], "stages": ["stage-1-ImageNet", "stage-2-Flickr30k"]},
    **{"matrix": [[80.0], [60.0, 70.0]], "mif": [[100.0], [100.0, 90.0]], "downstream": {}},
    **{"AP": [80.0, 65.0], "MAP": [80.0, 72.5], "BWT": [None, -20.0], "MIF": [100.0, 95.0]},
}


def test_runs_that_fail_are_told_and_done_again(recipe, tmp_path, capsys, monkeypatch):
    """With a program in place of training, which leaves results, and at first not for one of the runs."""
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    program = tmp_path / "program"
    monkeypatch.setattr(sys, "executable", str(program))

    def stand_in(line: str) -> None:
        folder = """folder=$(printf '%s\\n' "$@" | sed -n 's/^output="\\(.*\\)"$/\\1/p'); mkdir -p "$folder" """
        program.write_text(f'#!/bin/sh\n{line}\n{folder}\ncp {tmp_path}/results.json "$folder"\n')
        program.chmod(0o755)

    out = tmp_path / "out"
    command = ["sweep", str(recipe), *QUICK, "seed=0,1", "--method", "ewc", "--output", str(out)]
    stand_in('case "$*" in *seed=1*) exit 3;; esac')
    assert cli.main(command) == 1
    printed, errors = capsys.readouterr()
    assert "seed=1: failed with status 3 (2 of 2)" in printed and "seed=0: done (1 of 2)" in printed
    assert "seed=1: not finished; the same command goes on with them" in errors
    assert "Not finished: seed=1." in (out / "sweep.md").read_text()
    stand_in("")
    assert cli.main([*command, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [run["figures"]["AP"] for run in content["runs"]] == [65.0, 65.0]
    assert [run["folder"] for run in content["runs"]] == [str(out / "seed=0"), str(out / "seed=1")]
    assert cli.main([*command, "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("| seed | ImageNet | Flickr30k | AP | MAP | BWT | MIF |")


@pytest.mark.slow
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
