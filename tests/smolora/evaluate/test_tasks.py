"""Test sets answered and scored: what is checked before the first answer, and how images are padded."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import pytest

from smolora.evaluate import tasks
from smolora.evaluate.tasks import Task, check_tasks, evaluate_tasks

GOLDEN = Path(__file__).parents[2] / "golden" / "eval"


def test_released_padding(model, backbone, tmp_path):
    """Without padding four tasks' images are cut; the others' are not touched."""
    squares = {}

    def answer(model, backbone, job, **options):
        squares[job.dataset] = backbone.transform.square
        shutil.copy(GOLDEN / job.dataset / "answers.jsonl", job.output)

    names = ["ScienceQA", "TextVQA", "Flickr30k", "ImageNet", "GQA", "VQAv2", "Places365"]
    (tmp_path / "answers").mkdir()
    (tmp_path / "ScienceQA").mkdir()
    (tmp_path / "ScienceQA" / "test.json").write_text("[]")
    benchmark = [Task.of_benchmark(name, [GOLDEN, tmp_path], tmp_path) for name in names]
    for padding, cut in (("released", {"ScienceQA", "ImageNet", "VQAv2", "Places365"}), ("all", set())):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tasks, "generate_answers", answer)
            scores = evaluate_tasks(model, backbone, benchmark, output=tmp_path, model_id="m", padding=padding)
        assert {task for task, square in squares.items() if not square} == cut
        assert list(scores) == names


def test_all_is_checked_before_anything_is_asked(released, tmp_path):
    """What the second of two tasks lacks: its own file, a record's text, an image."""
    (tmp_path / "TextVQA").mkdir()
    shutil.copy(GOLDEN / "TextVQA" / "val.json", tmp_path / "TextVQA")
    benchmark = [Task.of_benchmark(name, [released, tmp_path], released) for name in ("VQAv2", "TextVQA")]
    with pytest.raises(ValueError, match=r"TextVQA/val\.json: record 0: there is no image .*\.jpg"):
        check_tasks(benchmark, "smolora")
    with pytest.raises(ValueError, match=r"TextVQA needs TextVQA_0\.5\.1_val\.json"):
        check_tasks(benchmark, "smolora", skip_broken=True)
    shutil.copy(GOLDEN / "TextVQA" / "TextVQA_0.5.1_val.json", tmp_path / "TextVQA")
    check_tasks(benchmark, "smolora", skip_broken=True)
    (tmp_path / "TextVQA" / "val.json").write_text('[{"question_id": 1}]')
    with pytest.raises(ValueError, match="record 0: text must be a string, got None"):
        check_tasks(benchmark, "smolora")
    with pytest.raises(ValueError, match="protocol must be one of 'smolora', 'standard', 'coin', got 'official'"):
        check_tasks(benchmark, "official")


def test_unknown_padding(model, backbone, tmp_path):
    with pytest.raises(ValueError, match="padding must be one of 'all', 'released', got 'none'"):
        evaluate_tasks(model, backbone, [], output=tmp_path, model_id="m", padding="none")


def test_tasks_are_checked(released, model, backbone, tmp_path):
    questions = released / "VQAv2" / "val.json"
    with pytest.raises(ValueError, match=r"mine: the questions of ImageNet must be in a file named test\.json.*got .*"):
        Task("mine", "ImageNet", questions, released, [released])
    with pytest.raises(ValueError, match=r"dataset must be one of .*got 'vqav2'; did you mean VQAv2"):
        Task("mine", "vqav2", questions, released, [released])
    with pytest.raises(ValueError, match=r"mine: there is no question file .*elsewhere/val\.json"):
        Task("mine", "VQAv2", tmp_path / "elsewhere" / "val.json", released, [released])
    task = Task("mine", "VQAv2", questions, released, [released])
    with pytest.raises(ValueError, match=r"tasks must have different names, got \['mine', 'mine'\]"):
        evaluate_tasks(model, backbone, [task, task], output=tmp_path, model_id="m")


def test_two_that_ask_different_tasks_at_once_keep_both_scores(model, backbone, tmp_path):
    """One on each GPU, into one folder: the scores of one are not lost to the other's."""

    def answer(model, backbone, job, **options):
        shutil.copy(GOLDEN / job.dataset / "answers.jsonl", job.output)

    names = ["TextVQA", "Flickr30k", "GQA", "VQAv2", "OCRVQA", "Places365"]
    (tmp_path / "answers").mkdir()
    read = json.loads

    def slowly(text):
        content = read(text)
        if content.keys() <= set(names):
            time.sleep(0.05)  # between reading and writing
        return content

    def ask(name):
        benchmark = [Task.of_benchmark(name, [GOLDEN], tmp_path)]
        evaluate_tasks(model, backbone, benchmark, output=tmp_path, model_id="m")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "generate_answers", answer)
        patch.setattr(tasks.json, "loads", slowly)
        threads = [threading.Thread(target=ask, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert read((tmp_path / "scores.json").read_text()).keys() == set(names)
