"""The ten datasets: their files, annotators, and what is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from smolora.evaluate.datasets import ACCURACY, DATASETS, Dataset, Scoring, one_answer
from smolora.evaluate.score import score
from support.scoring import GOLDEN, golden, vqa_files

EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


def test_every_golden_dataset_is_in_the_table():
    assert set(EXPECTED) == set(DATASETS)


def test_vqa_accuracy_over_ten_annotators(tmp_path):
    answers = vqa_files(tmp_path, ["dog", "two"], ["The dog.", "2"])
    annotations = [
        {"question_id": 0, "answers": [{"answer": "dog"}] * 3 + [{"answer": "cat"}] * 7},
        {"question_id": 1, "answers": [{"answer": "two"}] * 10},
    ]
    assert score("VQAv2", [tmp_path], answers, "standard").metric == "accuracy"
    (tmp_path / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}))
    result = score("VQAv2", [tmp_path], answers, "standard")
    assert (result.metric, result.score) == ("vqa_accuracy", pytest.approx(95))
    assert score("VQAv2", [tmp_path], answers).score == 0  # as released: the one answer, to the letter


def test_vizwiz_annotators_are_found_by_image(tmp_path):
    answers = vqa_files(tmp_path, ["dog"], ["puppy"])
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "val.json").write_text(json.dumps([{"image": "x.jpg", "answers": ["puppy"] * 10}]))
    assert score("VizWiz", [tmp_path], answers, "standard").score == 100


def test_two_trees_and_subfolders(tmp_path):
    """The benchmark's question file lies in one tree and the dataset's own file in another."""
    ours, theirs = tmp_path / "Instructions_Single", tmp_path / "datasets"
    for tree, name in ((ours, "val.json"), (theirs, "TextVQA_0.5.1_val.json")):
        (tree / "TextVQA").mkdir(parents=True)
        shutil.copy(GOLDEN / "TextVQA" / name, tree / "TextVQA")
    answers = GOLDEN / "TextVQA" / "answers.jsonl"
    for folders in ([ours, theirs], [ours / "TextVQA", theirs / "TextVQA"], [ours, ours, theirs]):
        assert score("TextVQA", folders, answers) == golden("TextVQA")
    with pytest.raises(ValueError, match=r"TextVQA needs TextVQA_0.5.1_val.json, .*name its folder too"):
        score("TextVQA", [ours], answers)
    shutil.copytree(ours, tmp_path / "Instructions_Multi")
    with pytest.raises(ValueError, match=r"val\.json is found more than once"):
        score("TextVQA", [ours, tmp_path / "Instructions_Multi", theirs], answers)


@pytest.mark.parametrize(
    ("dataset", "file", "content", "match"),
    [
        ("VQAv2", "val.json", "{}", "must hold a list"),
        ("VQAv2", "val.json", "[", "not JSON"),
        ("VQAv2", "val.json", '[{"question_id": 0, "text": "q"}]', "record 0: answer is missing"),
        ("VQAv2", "val.json", '[{"question_id": 0, "text": "q", "answer": NaN}]', "NaN is no JSON number"),
        ("VQAv2", "val.json", '[{"question_id": 0, "text": "q", "answer": ["a"]}]', "record 0: answer must be one"),
        ("VQAv2", "val.json", '[{"question_id": 0, "text": 1, "answer": "a"}]', "record 0: text must be a string"),
        ("GQA", "testdev_balanced_questions.json", "[]", "must hold an object"),
        ("GQA", "testdev_balanced_questions.json", "{}", "question 20000: "),
        ("ScienceQA", "pid_splits.json", "{}", "must hold the list of ids 'test'"),
        ("ScienceQA", "problems.json", '{"0": {"choices": ["a"], "answer": 1}}', "problem 0: .*answer 1 of 1"),
        ("TextVQA", "TextVQA_0.5.1_val.json", '{"data": [{"question_id": 0}]}', "record 0: missing or malformed"),
        ("TextVQA", "TextVQA_0.5.1_val.json", '{"data": []}', "no answers for 120 questions"),
    ],
)
def test_broken_annotations_are_named(tmp_path, dataset, file, content, match):
    for path in (GOLDEN / dataset).iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=match) as error:
        score(dataset, [tmp_path], tmp_path / "answers.jsonl")
    assert file in str(error.value)


def test_unknown_dataset_and_protocol():
    with pytest.raises(ValueError, match="got 'textvqa'; did you mean TextVQA"):
        score("textvqa", [GOLDEN], "x")
    with pytest.raises(ValueError, match="protocol must be one of 'smolora', 'standard', 'coin', got 'official'"):
        score("TextVQA", [GOLDEN], "x", "official")
    with pytest.raises(ValueError, match=r"annotations must be existing folders, got .*nowhere"):
        score("TextVQA", [Path("nowhere")], "x")


def test_a_new_dataset_is_one_entry(tmp_path, monkeypatch):
    entry = Dataset("val.json", one_answer, ACCURACY, Scoring("length", lambda items, texts: [1.0], lambda i, t: True))
    monkeypatch.setitem(DATASETS, "Mine", entry)
    answers = vqa_files(tmp_path, ["dog"], ["Dog."])
    assert score("Mine", [tmp_path], answers).as_dict() == {
        "dataset": "Mine",
        "protocol": "smolora",
        "metric": "accuracy",
        "score": 100,
        "mif": 100,
        "count": 1,
    }
    assert score("Mine", [tmp_path], answers, "standard").metric == "length"
