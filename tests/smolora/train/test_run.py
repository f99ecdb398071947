"""Whole runs: what they leave, killed or not."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import smolora.train.run
from smolora import cli
from smolora.recipe import load_recipe
from smolora.report import write_report
from smolora.report.forgetting import Judge
from smolora.report.layout import read_runs
from smolora.train.methods import METHODS
from smolora.train.run import TrainingRun
from support.runs import assert_same, killed_runs
from support.train_world import make_world

ROOT = Path(__file__).parents[3]
LOSSES = {  # stage: the loss of every step, recorded; test_curve.py holds such a curve to the paper's equations
    "stage-1-ImageNet": [5.931, 5.917, 5.931, 5.459, 5.346, 4.953],
    "stage-2-Flickr30k": [5.404, 5.474, 5.093, 4.790, 4.626, 4.583],
    "downstream-few-shot/Places365, 2-shot": [5.111, 4.756],
}
STAGES = tuple(LOSSES)
TRAINED = sorted(set(METHODS) - {"zeroshot"})
DRAWN = random.Random(15).sample(sorted(set(TRAINED) - {"smolora"}), 2)  # the others' kills are slow tests


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with a run that was never disturbed, `run-whole`, and one that was killed three times."""
    recipe = make_world(tmp_path_factory.mktemp("killed"))
    kills = killed_runs(recipe, seed=1, kills=3)
    assert [kill["killed at"][0] for kill in kills] == ["step", "save", "ask"]
    return recipe.parent


def test_killed_three_times_and_continued(killed):
    assert_same(killed / "run-0", killed / "run-whole")


@pytest.mark.parametrize(
    "method",
    [
        *(pytest.param(name, marks=() if name in DRAWN else pytest.mark.slow) for name in TRAINED),
        pytest.param(
            {"adapter": "branchlora", "schedule": ["replay", "ewc"]}, id="branchlora-replay-ewc", marks=pytest.mark.slow
        ),
    ],
)
def test_every_method_ends_as_if_it_had_not_been_killed(method, tmp_path):
    """Killed in training, while it saves, and, in the second stage, among its answers."""
    path = make_world(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**recipe, "method": method, "downstream": {}}))
    killed_runs(path, seed=3, kills=3)
    assert_same(tmp_path / "run-0", tmp_path / "run-whole")


@pytest.mark.slow
def test_killed_twenty_times(tmp_path):
    recipe = make_world(tmp_path)
    kills = killed_runs(recipe, seed=2, kills=20)
    assert len(kills) == 20
    for number in {kill["run"] for kill in kills}:
        assert_same(tmp_path / f"run-{number}", tmp_path / "run-whole")


def test_what_a_run_leaves(killed):
    run = killed / "run-whole"
    results = json.loads((run / "results.json").read_text())
    assert results["tasks"] == ["ImageNet", "Flickr30k"] and results["method"] == "smolora"
    assert results["stages"] == list(STAGES[:2])
    assert [len(row) for row in results["matrix"]] == [1, 2] == [len(row) for row in results["mif"]]
    assert results["AP"][1] == sum(results["matrix"][1]) / 2
    assert results["BWT"] == [None, results["matrix"][1][0] - results["matrix"][0][0]]
    assert results["downstream"]["few-shot"]["tasks"] == ["Places365, 2-shot"]
    assert results["downstream"]["zero-shot"]["AP"] == results["downstream"]["zero-shot"]["accuracy"][0]
    assert results["config"]["training"]["learning_rate"] == 0.03
    assert results["timing"]["stage-1-ImageNet"]["training"]["tokens_per_second"] > 0
    for stage in STAGES:
        assert (run / stage / "adapter/adapter_model.safetensors").is_file()
        assert not (run / stage / "checkpoints").exists() and not (run / stage / "kept").exists()
        log = [line["loss"] for line in json.loads((run / stage / "log.json").read_text()) if "loss" in line]
        assert log == pytest.approx(LOSSES[stage], abs=0.05)
    assert results["training"]["stage-1-ImageNet"]["steps"] == 6
    assert len((run / "stage-2-Flickr30k/answers/ImageNet.jsonl").read_text().splitlines()) == 4
    assert json.loads((run / "stage-2-Flickr30k/answers/ImageNet.info.json").read_text())["routing"]


def test_report_reads_a_run(killed, tmp_path):
    text = write_report([killed / "run-whole"], tmp_path).read_text()
    assert "ImageNet" in text and "few-shot" in text


def test_a_runs_answers_can_be_judged_one_by_one(killed):
    """By the files for scoring that results.json names; they average to its matrix."""
    (run,) = read_runs([killed / "run-whole"])
    judge = Judge(run)
    for stage, row in enumerate(run.matrix):
        for task, score in zip(run.tasks, row, strict=False):
            scores = [judged.score for judged in judge.answers(stage, task).values() if judged.score is not None]
            assert 100 * sum(scores) / len(scores) == pytest.approx(score)


def test_the_evaluator_gives_a_runs_answers_by_its_recipe(killed, tmp_path):
    """`smolora evaluate --recipe` on the last stage's adapter: what the run answered after that stage."""
    stage = killed / "run-whole/stage-2-Flickr30k"
    command = ["evaluate", "--recipe", str(killed / "recipe.yaml"), "--adapter", str(stage / "adapter")]
    tasks = ["--task", "ImageNet", "--task", "Flickr30k", "--task", "OCRVQA"]
    model = ["--model-id", "small/stage-2-Flickr30k", "--device", "cpu"]
    assert cli.main([*command, *tasks, *model, "--output", str(tmp_path)]) == 0
    for name in ("ImageNet", "Flickr30k"):
        assert (tmp_path / f"answers/{name}.jsonl").read_bytes() == (stage / f"answers/{name}.jsonl").read_bytes()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores.items() >= json.loads((stage / "scores.json").read_text()).items()
    zero_shot = json.loads((killed / "run-whole/downstream-zero-shot/scores.json").read_text())
    assert scores["OCRVQA"] == zero_shot["OCRVQA"]


def test_a_finished_run_is_not_redone(killed, capsys):
    recipe = load_recipe(killed / "recipe.yaml", [f"output={killed / 'run-whole'}"])
    left = killed / "run-whole/stage-1-ImageNet/checkpoints/checkpoint-6"  # killed just before it was removed
    left.mkdir(parents=True)
    before = {path: path.stat().st_mtime_ns for path in (killed / "run-whole").rglob("adapter*")}
    answers = (killed / "run-whole/stage-1-ImageNet/answers/ImageNet.jsonl").stat().st_mtime_ns
    run = TrainingRun(recipe)
    assert run.is_finished and not TrainingRun(load_recipe(killed / "recipe.yaml", [f"output={killed}"])).is_finished
    run()
    assert not left.parent.exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (killed / "run-whole/stage-1-ImageNet/answers/ImageNet.jsonl").stat().st_mtime_ns == answers


def test_another_recipe_is_refused(killed):
    overrides = [f"output={killed / 'run-whole'}", "training.learning_rate=0.5", "training.workers=1"]
    with pytest.raises(ValueError, match=r"another recipe \(training.learning_rate was 0.03, is 0.5\)"):
        TrainingRun(load_recipe(killed / "recipe.yaml", overrides))


@pytest.mark.parametrize("method", ["lilora", "moecl", "branchlora", "dmole", "smolora"])
def test_downstream_tasks_that_adapters_have_no_room_for(world, tmp_path, method):
    """The first few-shot task of a run adds a task to the adapters that tell tasks apart, and the last one takes it."""
    options = [f"method={method}", f"output={tmp_path}"]
    without, whole = (load_recipe(world, [*options, *more]) for more in (["downstream={}"], []))
    zero_shot = load_recipe(world, [*options, "downstream.few-shot=[]"])
    for old, new, numbers in ((without, whole, (2, 3)), (whole, without, (3, 2)), (without, zero_shot, None)):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(old.as_dict(), sort_keys=False))
        if numbers is None or method == "smolora":
            TrainingRun(new)
        else:
            message = rf"downstream must leave the {numbers[0]} tasks .* got {numbers[1]}: name another output"
            with pytest.raises(ValueError, match=message):
                TrainingRun(new)
        (tmp_path / "recipe.yaml").unlink()


def test_each_stage_starts_from_the_last_adapter_and_moves_it(killed):
    adapters = [load_file(killed / "run-whole" / stage / "adapter/adapter_model.safetensors") for stage in STAGES]
    for one, other in pairwise(adapters):
        assert one.keys() == other.keys()
        fixed = [name for name in one if torch.equal(one[name], other[name])]
        assert [name for name in one if name.endswith("_router")] == [n for n in fixed if n.endswith("_router")]
        moved = [name for name in one if name.endswith("if_A") and name not in fixed]
        assert len(moved) == 8, "every layer's experts have moved"
        # far less than a new adapter would differ: two draws of A ~ N(0, 0.01^2)
        name = moved[0]
        assert (one[name] - other[name]).abs().median() < 0.01


def test_a_second_start_is_refused(short, tmp_path, monkeypatch):
    """A job that is queued again, or another terminal: the run that is going on is left alone, and ends well."""
    recipe = short(one_task=True)
    evaluate, refused = TrainingRun.evaluate_stage, []

    def evaluated(self, stage):
        with pytest.raises(BlockingIOError, match=rf"{recipe.folder} is in use by process {os.getpid()} on .*: wait"):
            TrainingRun(recipe)()
        refused.append(stage.name)
        evaluate(self, stage)

    monkeypatch.setattr(TrainingRun, "evaluate_stage", evaluated)
    results = TrainingRun(recipe)()
    assert refused == ["stage-1-ImageNet"] and results["stages"] == refused
    assert not list(recipe.folder.rglob("*.lock"))


def test_the_whole_run_is_checked_before_its_first_stage(short, tmp_path):
    """The last task's samples are too long; nothing is trained before that is said."""
    with pytest.raises(ValueError, match=r"Flickr30k/train.json: record 0: training.max_length 95 cuts off"):
        TrainingRun(short("training.max_length=95"))()
    assert not list((tmp_path / "run").glob("stage-*"))


def test_several_devices_in_one_process_are_told(short, monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(TrainingRun, "evaluate_stage", lambda self, stage: None)
    monkeypatch.setattr(TrainingRun, "train_stage", lambda self, stage: None)
    monkeypatch.setattr(smolora.train.run, "collect_results", lambda *parts: {})
    TrainingRun(short(one_task=True))()
    assert (
        "found 4 devices, using one; to use all of them: torchrun --nproc-per-node 4 -m smolora.cli train RECIPE"
        in capsys.readouterr().out
    )


def test_a_run_under_coins_protocol(short, capsys):
    """It has no MIF, and its report and its figures by CoIN's convention are there all the same."""
    zero_shot = "downstream.zero-shot=[{name: unseen, dataset: ImageNet, test: ImageNet/test.json}]"
    recipe = short("evaluation.protocol=coin", zero_shot, one_task=True)
    results = TrainingRun(recipe)()
    assert (results["mif"], results["MIF"]) == (None, [None])
    assert results["downstream"]["zero-shot"]["MIF"] is None
    assert "MIF" in write_report([recipe.folder]).read_text()
    assert cli.main(["metrics", str(recipe.folder / "results.json"), "--convention", "coin", "--json"]) == 0
    accuracy = results["matrix"][0][0]
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures == {"ACC": [accuracy], "MAA": [accuracy], "BWT": [0]}


def test_a_locale_without_unicode(tmp_path):
    """Training, asking and the report in an ASCII locale: every file is UTF-8, and no output ends the run."""
    recipe = make_world(tmp_path)
    test = tmp_path / "data/ImageNet/test.json"
    records = json.loads(test.read_text())
    for record in records:
        record["answer"] = "café \U0001f600 →"
    test.write_bytes(json.dumps(records, ensure_ascii=False).encode())
    overrides = [
        "downstream={}",
        "training.epochs=1",
        "training.batch_size=12",
        "training.per_device_batch_size=12",
        "evaluation.max_new_tokens=2",
        r'tasks.1.instructions=["D\u00e9cris l\u2019image"]',
    ]
    run = ["train", str(recipe), *overrides]
    report = [
        "report",
        str(tmp_path / "run"),
        str(tmp_path / "run"),
        "--cases",
        "2",
        "--output",
        str(tmp_path / "report"),
    ]
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    code = f"from smolora.cli import main\nfor command in {[run, report]}: assert not main(command)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "café \U0001f600 →" in (tmp_path / "report/report.md").read_text("utf-8")
    assert "café \U0001f600 →" in (tmp_path / "report/cases.csv").read_text("utf-8")
