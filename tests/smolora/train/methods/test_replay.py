"""Replay: a uniform draw that a kill does not change, and samples that stay those of their tasks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from smolora.cli.train import summary
from smolora.recipe import load_recipe
from smolora.train.data import GlobalBatches
from smolora.train.methods import Method
from smolora.train.plan import make_plan
from smolora.train.run import TrainingRun
from support.train_world import OBJECT, SENTENCE

STAGES = ("stage-1-ImageNet", "stage-2-Flickr30k")


def replay(short, *overrides: str):
    recipe = short("method=replay", *overrides)
    return recipe, Method(recipe).hooks[1]


def test_the_draw_is_uniform(short):
    """Chi-squared over the indices, and over pairs of neighbours, of 4000 seeds: 12 samples, 3 of them drawn."""
    seeds, size, count = 4000, 12, 3
    single, pairs = Counter(), Counter()
    recipe, hooks = replay(short, f"methods.replay.per_task={count}")
    for seed in range(seeds):
        object.__setattr__(recipe, "seed", seed)
        drawn = hooks.draw(recipe.tasks[0], size)
        assert len(set(drawn)) == count and drawn == sorted(drawn)
        single.update(drawn)
        pairs.update((a, b) for a in drawn for b in drawn if a < b)
    # without replacement: the indices' variance is smaller by (size - count) / (size - 1)
    expected = seeds * count / size
    statistic = sum((single[i] - expected) ** 2 for i in range(size)) / expected * (size - 1) / (size - count)
    assert 3 < statistic < 31, "chi-squared with 11 degrees of freedom, 0.1 % at either side is 1.8 and 31.3"
    expected = seeds * count * (count - 1) / (size * (size - 1))
    statistic = sum((pairs[a, b] - expected) ** 2 for a in range(size) for b in range(a + 1, size)) / expected
    assert len(pairs) == 66 and statistic < 110, "chi-squared with 65 degrees of freedom, 0.1 % is above 105"


def test_the_draw_depends_on_seed_and_task_alone(short):
    recipe, hooks = replay(short, "methods.replay.per_task=5", "seed=3")
    first, second = (hooks.draw(task, 1000) for task in recipe.tasks)
    assert first != second
    assert replay(short, "methods.replay.per_task=5", "seed=3")[1].draw(recipe.tasks[0], 1000) == first
    assert replay(short, "methods.replay.per_task=5", "seed=4")[1].draw(recipe.tasks[0], 1000) != first


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ("{}", {20: 20, 3000: 500}),
        ("{per_task: 7}", {20: 7, 3: 3}),
        ("{fraction: 0.01}", {20: 1, 1000: 10, 1001: 11}),
        ("{fraction: 1}", {20: 20}),
    ],
)
def test_how_many_are_kept(short, options, sizes):
    recipe, hooks = replay(short, f"methods.replay={options}")
    assert {size: len(hooks.draw(recipe.tasks[0], size)) for size in sizes} == sizes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["methods.replay={per_task: 5, fraction: 0.5}"], "must have per_task or fraction, got per_task 5 and frac"),
        (["methods.replay.fraction=1.5"], "methods.replay.fraction"),
        (["methods.replay.mode=mixed"], "methods.replay.mode must be one of 'concat', 'joint', got 'mixed'"),
        (["methods.replay.per_tsk=5"], "did you mean 'methods.replay.per_task'"),
        (
            ["methods.replay.mode=joint", "training.batch_size=3", "training.per_device_batch_size=1"],
            "training.batch_size must be even with methods.replay.mode 'joint', got 3",
        ),
        (["methods.replay.mode=joint", "tasks.1.batch_size=3"], "Flickr30k.batch_size must be even"),
        (["method={adapter: lora, schedule: [replay, joint]}"], "sequential' for the add-on 'replay', .*got 'joint'"),
        (["method={adapter: lora, schedule: [replay, one-per-task]}"], "for the add-on 'replay', .* 'one-per-task'"),
        (["method={adapter: none, schedule: [replay, none]}"], "for the add-on 'replay', .* got 'none'"),
        (["method={adapter: dmole, schedule: [replay]}"], "must not have 'replay' for the adapter 'dmole': a stage"),
    ],
)
def test_what_is_refused(short, overrides, message):
    with pytest.raises(ValueError, match=message):
        replay(short, *overrides)


def test_options_as_they_are_used(short):
    for options, used in (("{}", (500, None)), ("{fraction: 0.5}", (None, 0.5))):
        recipe = short("method={adapter: lilora, schedule: [replay]}", f"methods.replay={options}")
        sections = Method(recipe).settings()["methods"]
        assert sections.keys() == {"lilora", "replay"}
        assert (sections["replay"]["per_task"], sections["replay"]["fraction"]) == used


@pytest.mark.parametrize("adapter", ["smolora", "branchlora"])
def test_samples_stay_those_of_their_task(world, tmp_path, adapter):
    """Text, answer, image, embedding and task id of a replayed sample are what its own stage trained on."""
    overrides = [f"method={{adapter: {adapter}, schedule: [replay]}}", f"output={tmp_path / 'run'}"]
    run = TrainingRun(load_recipe(world, [*overrides, "methods.replay.per_task=3"]))
    run.load_processors()
    first, second = run.method.course.stages()
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "replay.json").write_text(json.dumps({"ImageNet": [1, 4, 10]}))
    before, samples = run.stage_samples(first, ()), run.stage_samples(second, (kept,))
    assert (before.own, len(before), samples.own, len(samples)) == (12, 12, 12, 15)
    for place, index in enumerate([1, 4, 10], start=12):
        old, new = before[index], samples[place]
        assert torch.equal(old.instruction, new.instruction) and old._replace(instruction=None) == new._replace(
            instruction=None
        )
    if adapter == "smolora":
        encode = run.texts["ImageNet"].encoder.encode
        assert torch.equal(samples[12].instruction, encode(OBJECT))
        assert torch.equal(samples[0].instruction, encode(SENTENCE))
    else:
        assert [samples[place].task_id for place in (0, 11, 12, 14)] == [1, 1, 0, 0]


def test_steps_that_are_half_memory():
    """10 own samples, 3 kept ones, 4 a step: each step has as many of both, and each kept one comes in turn."""
    order = GlobalBatches([9] * 13, 4, seed=1, own=10)
    indices = list(order)
    assert len(order) == len(indices) == 20 and list(order) == indices
    steps = [indices[start : start + 4] for start in range(0, 20, 4)]
    assert all(sum(index < 10 for index in step) == 2 for step in steps)
    assert sorted(index for index in indices if index < 10) == list(range(10))
    assert sorted(Counter(index for index in indices if index >= 10).values()) == [3, 3, 4]
    order.set_epoch(1)
    assert list(order) != indices


@pytest.mark.parametrize(
    ("mode", "extra", "samples", "steps"),
    [("concat", [0, 3], [12, 15], [3, 4]), ("joint", [0, 3], [12, 24], [3, 6])],
)
def test_runs_as_planned(short, tmp_path, mode, extra, samples, steps):
    batch = ["training.batch_size=4", "training.per_device_batch_size=2"]
    recipe = short("method=replay", f"methods.replay={{per_task: 3, mode: {mode}}}", *batch)
    plan = make_plan(recipe)
    assert [stage["extra"] for stage in plan["stages"]] == extra
    assert [stage["steps"] for stage in plan["stages"]] == steps and plan["memory"]["method_gib"] == 0
    results = TrainingRun(recipe)()
    assert [content["samples"] for content in results["training"].values()] == samples
    assert [content["steps"] for content in results["training"].values()] == steps
    assert summary(results).startswith("small (replay): AP ")
    folder = tmp_path / "run" / STAGES[0]
    drawn = Method(recipe).hooks[1].draw(recipe.tasks[0], 12)
    assert json.loads((folder / "kept/replay.json").read_text()) == {"ImageNet": drawn}
    assert "kept/replay.json" in json.loads((folder / "checksums.json").read_text())


def test_downstream_stages_do_not_replay(world):
    recipe = load_recipe(world, ["method=replay"])
    plan = make_plan(recipe)
    assert [stage["extra"] for stage in plan["stages"]] == [0, 12]
    assert [stage["extra"] for stage in plan["downstream"]] == [0, 0]
    method = Method(recipe)
    assert all(method.hooks[1].extra_samples(stage, (Path("no/such"),)) == [] for stage in method.course.downstream())
