"""The preparation of data and base models: what is planned is made, and options that do not fit are refused."""

import json

import pytest

from smolora.minicvit import prepare as module
from smolora.minicvit.prepare import minicoin, minicvit


def test_what_is_planned_is_made(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(module, "make_base", lambda folder, *what: made.append(what) or folder.mkdir(exist_ok=True))
    for kept, tasks in ((minicvit, ["GQA", "Places365"]), (minicoin, ["Grounding", "OCRVQA"])):
        small = {name: task._replace(train=min(task.train, 3), test=2) for name, task in kept.benchmark.tasks.items()}
        preparation = kept._replace(benchmark=kept.benchmark._replace(tasks=small))
        root = tmp_path / kept.name
        options = {"data": str(root / "data"), "base": str(root / "base"), "tasks": tasks}
        paths = preparation.planned(options)
        assert not any(path.exists() for path in paths)
        preparation.prepare(options)
        for path, count in paths.items():
            assert path.exists()
            if count is not None:
                assert len(json.loads(path.read_text())) == count
        preparation.prepare(options)
        assert made == [(kept.base, kept.curriculum)] * 2
        made.clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "b"}, "prepare.minicvit.data must be a folder, got None"),
        ({"data": "d", "base": 3}, "prepare.minicvit.base must be a folder, got 3"),
        ({"data": "d", "base": "b", "task": []}, "has data, base, tasks and backbone, got task too"),
        ({"data": "d", "base": "b", "backbone": "opt"}, "prepare.minicvit.backbone must be one of llava, .* got 'opt'"),
        ({"data": "d", "base": "b", "tasks": ["GQB"]}, r"tasks must be a list of ScienceQA, .* got \['GQB'\]"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        minicvit.planned(options)


def test_each_benchmark_has_its_own_tasks():
    options = {"data": "d", "base": "b", "tasks": ["Flickr30k"]}
    assert minicvit.planned(options)
    with pytest.raises(ValueError, match=r"prepare.minicoin.tasks must be a list of ScienceQA, .* got \['Flickr30k'\]"):
        minicoin.planned(options)
