"""Where a run's files are, and which adapter answers a stage's questions."""

from __future__ import annotations

from pathlib import Path

from smolora.train.methods import Method
from smolora.train.paths import RunPaths, read_if_exists


def test_the_stage_that_trained_last_answers(short):
    """Two upstream stages, a zero-shot table from the last adapter, and a few-shot task with its own."""
    tables = "downstream={z: [{name: OCRVQA, test: t}], f: [{name: Places365, test: t, train: u}]}"
    method = Method(short(tables)).course
    paths = RunPaths(Path("run"))
    first, second = method.stages()
    asked, tuned = method.downstream()
    assert paths.evaluated_adapter(first) == Path("run/stage-1-ImageNet/adapter")
    assert paths.evaluated_adapter(second) == paths.evaluated_adapter(asked) == Path("run/stage-2-Flickr30k/adapter")
    assert paths.evaluated_adapter(tuned) == Path("run/downstream-f/Places365/adapter")
    assert [stage.lineage for stage in (first, second, tuned)] == [[], [first], [first, second]]
    assert [stage.number for stage in (first, second, tuned)] == [0, 1, 2]
    assert paths.evaluation(second) == paths.stage(second) == Path("run/stage-2-Flickr30k")
    assert paths.evaluation(asked) == Path("run/downstream-z") and paths.evaluation(tuned) == Path("run/downstream-f")


def test_without_training_the_base_model_answers(short):
    (stage,) = Method(short("method=zeroshot")).course.stages()
    assert RunPaths(Path("run")).evaluated_adapter(stage) is None


def test_scores_that_are_not_there_yet_are_empty(tmp_path):
    assert read_if_exists(tmp_path / "scores.json") == {}
