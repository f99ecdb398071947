"""Grids: which runs a sweep has, and where they are."""

from __future__ import annotations

import os
import sys
import time

import pytest

from smolora.train.sweep import read_grid, run_points


def test_all_combinations(world, tmp_path):
    """The last key's values follow each other; other changes go to all runs."""
    arguments = ["methods.ewc.weight=0,1e-1, 10", "method=ewc", "seed=0,1", 'tasks.0.instructions=["a, b", c]']
    points = read_grid(world, arguments, str(tmp_path / "grid"))
    assert [point.name for point in points] == [f"weight={w},seed={s}" for w in ("0", "1e-1", "10") for s in (0, 1)]
    for point in points:
        recipe = point.recipe
        assert recipe.method == "ewc" and recipe.tasks[0].instructions == ["a, b", "c"]
        assert recipe.folder == tmp_path / "grid" / point.name
        assert (
            recipe.seed == point.values["seed"]
            and recipe.methods["ewc"]["weight"] == point.values["methods.ewc.weight"]
        )
    assert len({str(point.recipe) for point in points}) == 6


def test_values_are_yaml(world):
    arguments = ["training.learning_rate=1e-4,3e-3", "method={adapter: lora, schedule: [ewc]},seqlora,'smolora'"]
    points = read_grid(world, arguments)
    assert [point.recipe.training.learning_rate for point in points[::3]] == [1e-4, 3e-3]
    assert [point.recipe.method_name for point in points[:3]] == ["lora + ewc", "seqlora", "smolora"]
    assert points[0].recipe.folder.parent.name == "run-sweep"


def test_a_change_for_all_runs_is_read_as_train_reads_it(world):
    """A value with brackets of its own, such as a regular expression, is one value."""
    pattern = r".*layers\.[0,1]\..*up_proj"
    points = read_grid(world, [f"adapter.target_modules={pattern}", "seed=0,1"])
    assert [point.recipe.adapter["target_modules"] for point in points] == [pattern] * 2


def test_folder_names(world):
    """Odd or long values get a name of their own, and keys that end alike are told apart."""
    points = read_grid(world, ["benchmark=a/b,a:b,'é'", "setting=single"])
    names = [point.name for point in points]
    assert len(set(names)) == 3 and all(name.startswith("benchmark=") and "/" not in name for name in names)
    long = read_grid(world, [f"benchmark={'a' * 300},{'a' * 300}b"])
    assert len({point.name for point in long}) == 2 and all(len(point.name) < 120 for point in long)
    same = read_grid(world, ["methods.ewc.weight=1,2", "methods.ewc-tir.weight=1,2"])
    assert same[1].name == "methods.ewc.weight=1,methods.ewc-tir.weight=2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed=1"], r"a sweep needs a key with several values, key=a,b,c, got none"),
        (["seed=1,2", "seed=3"], "a sweep takes each key once, got seed twice"),
        (["seed=3", "seed=1,2"], "a sweep takes each key once, got seed twice"),
        (["seed=1,2,1"], "seed must have different values, got 1,2,1"),
        (["output=a,b"], "output must be one folder, in which each run has its own, got 'output=a,b'"),
        (["seed=1,2", "training.epoch=3"], "unknown key 'training.epoch'"),
        (["training.epoch=1,2"], "unknown key 'training.epoch'"),
        (["seed=1,x"], "seed must be an integer, got 'x'"),
        (["seed=1,2", "nothing"], "an override must be key=value, got 'nothing'"),
        (["seed=[1,2"], "not YAML"),
    ],
)
def test_what_is_refused(world, arguments, message):
    with pytest.raises(ValueError, match=message):
        read_grid(world, arguments)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A program in place of Python: it notes its arguments and its device, and runs a line of the shell."""

    def make(line: str) -> None:
        program = tmp_path / "program"
        program.write_text(f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES $@" >> {tmp_path}/calls\n{line}\n')
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return make


def test_each_run_is_a_process(world, tmp_path, stand_in):
    points = read_grid(world, ["seed=0,1,2", "method=ewc"], str(tmp_path / "grid"))
    stand_in('case "$*" in *seed=1*) exit 3;; esac')
    ends = {point.name: status for point, status in run_points(world, points, jobs=1, quiet=False)}
    assert ends == {"seed=0": 0, "seed=1": 3, "seed=2": 0}, "the others go on if one fails"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3
    assert calls[1].strip() == f'-m smolora.cli train {world} method=ewc seed=1 output="{tmp_path}/grid/seed=1" --json'


def test_several_at_a_time_have_a_device_each(world, tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    # each of the first two waits until the other has begun
    stand_in(f"for i in $(seq 200); do [ $(wc -l < {tmp_path}/calls) -ge 2 ] && exit 0; sleep 0.05; done; exit 1")
    points = read_grid(world, ["seed=0,1,2"], str(tmp_path / "grid"))
    assert [status for _, status in run_points(world, points, jobs=2, quiet=True)] == [0, 0, 0]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert {call.split()[0] for call in calls[:2]} == {"5", "7"} and all(call.endswith("--quiet") for call in calls)


def test_runs_end_with_the_sweep(world, tmp_path, stand_in):
    """The first run fails at once; who stops the sweep then stops the second, too."""
    stand_in(f'case "$*" in *seed=0*) exit 1;; esac; echo $$ > {tmp_path}/process; exec sleep 600')
    points = read_grid(world, ["seed=0,1"], str(tmp_path / "grid"))
    ends = run_points(world, points, jobs=2, quiet=True)
    assert next(ends)[0].name == "seed=0"
    note = tmp_path / "process"
    while not note.is_file() or not note.read_text().endswith("\n"):
        time.sleep(0.05)
    begun = time.monotonic()
    ends.close()
    assert time.monotonic() - begun < 300, "nobody waits for its end"
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
