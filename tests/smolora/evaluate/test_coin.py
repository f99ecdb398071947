"""CoIN's scorers, verdict by verdict, and its eight tasks asked and scored by `smolora evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import small_llava
from smolora import cli
from smolora.evaluate.benchmarks import find_dataset
from smolora.evaluate.coin import COIN_DATASETS
from smolora.evaluate.datasets import Files
from smolora.evaluate.pairing import pair_answers
from smolora.evaluate.score import score
from support.scoring import GOLDEN, write_lines

COIN = GOLDEN.parent / "coin_eval"
EXPECTED = json.loads((COIN / "expected.json").read_text())


def verdicts(dataset: str) -> list[float]:
    """Scores of the golden answers, one by one."""
    spec = find_dataset(dataset, "coin")
    items = spec.load(Files([COIN], dataset), spec.questions)
    answers = COIN / dataset / "answers.jsonl"
    paired = pair_answers(dataset, items, answers, spec.coin.pairing, missing_scores_zero=spec.missing_scores_zero)
    return spec.coin.score(paired.items, paired.texts)


@pytest.mark.parametrize("dataset", EXPECTED)
def test_released_figures(dataset):
    result, expected = score(dataset, [COIN], COIN / dataset / "answers.jsonl", "coin"), EXPECTED[dataset]
    assert result.score == pytest.approx(expected["accuracy_unrounded"], abs=1e-9)
    # OCRVQA's scorer prints that there are no samples
    assert result.count == (expected["samples_printed"] or expected["answers"])
    assert (result.metric, result.protocol, result.as_dict()["mif"]) == ("accuracy", "coin", None)


@pytest.mark.parametrize("dataset", ["Grounding", "ImageNet", "OCRVQA", "VQAv2"])
def test_released_verdicts(dataset):
    assert verdicts(dataset) == EXPECTED[dataset]["correct"]


def test_released_scores_of_textvqa():
    assert verdicts("TextVQA") == pytest.approx(EXPECTED["TextVQA"]["scores"], abs=1e-12)


def test_released_choices_of_scienceqa():
    problems = json.loads((COIN / "ScienceQA" / "problems.json").read_text())
    choices = EXPECTED["ScienceQA"]["choice"]
    split = json.loads((COIN / "ScienceQA" / "pid_splits.json").read_text())["test"]
    assert verdicts("ScienceQA") == [choices[name] == problems[name]["answer"] for name in split]


@pytest.mark.parametrize("dataset", ["GQA", "VizWiz"])
def test_these_are_scored_as_in_the_smolora_protocol(dataset):
    answers = GOLDEN / dataset / "answers.jsonl"
    ours = score(dataset, [GOLDEN], answers)
    theirs = score(dataset, [GOLDEN], answers, "coin")
    assert (theirs.score, theirs.groups, theirs.count) == (ours.score, ours.groups, ours.count)


@pytest.mark.parametrize(
    ("dataset", "match"),
    [
        ("Grounding", "line 3: Grounding has no question 1"),
        ("VQAv2", "line 3: VQAv2 has no question 1"),
        ("OCRVQA", "line 1: OCRVQA has no question 0"),
        ("ImageNet", "line 56: .* scored by their position, and it has 55 questions, got 56 answers"),
    ],
)
def test_where_the_released_scorers_raise(dataset, match):
    with pytest.raises(ValueError, match=rf"answers_bad\.jsonl: {match}"):
        score(dataset, [COIN], COIN / dataset / "answers_bad.jsonl", "coin")


def test_questions_without_an_answer_are_reported(tmp_path):
    answers = write_lines(tmp_path / "a.jsonl", [{"question_id": 5012, "text": "blue"}] * 2)
    result = score("VQAv2", [COIN], answers, "coin")
    assert (result.score, result.count) == (100, 2) and result.as_dict()["uncounted"] == result.uncounted > 0
    assert str(result).endswith(
        f"accuracy 100.00, 2 answers, {result.uncounted} questions without an answer not counted"
    )
    answers.write_text("")
    with pytest.raises(ValueError, match="VQAv2 has no question to score"):
        score("VQAv2", [COIN], answers, "coin")


def test_command(capsys):
    command = ["score", "--dataset", "Grounding", "--annotations", str(COIN), "--protocol", "coin"]
    assert cli.main([*command, "--answers", str(COIN / "Grounding" / "answers.jsonl"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["score"], result["count"]) == (EXPECTED["Grounding"]["accuracy_unrounded"], 60)
    command[2] = "TextCaps"
    assert cli.main([*command, "--answers", "none.jsonl"]) == 1
    assert "dataset must be one of ScienceQA, TextVQA, ImageNet, GQA, VizWiz, Grounding" in capsys.readouterr().err


# ---- the eight tasks in the released format


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Two questions of each task, with images, and the files of the original datasets."""
    root = tmp_path_factory.mktemp("coin")
    for name, dataset in COIN_DATASETS.items():
        without = 1 if name == "ScienceQA" else 0
        path = small_llava.write_questions(root / name, 2, name=dataset.questions, without_image=without)
        records = json.loads(path.read_text())
        for record in records:
            if "image" in record:
                record["image"] = f"{name}/{record['image']}"
            if name == "Grounding":
                record |= {"answer_bbox": "[0.10, 0.20, 0.50, 0.60]", "size": [40, 30]}
        path.write_text(json.dumps(records))
    originals = {
        "ScienceQA/pid_splits.json": {"test": ["0", "1"]},
        "ScienceQA/problems.json": {str(i): {"choices": ["a", "b"], "answer": i} for i in range(2)},
        "TextVQA/TextVQA_0.5.1_val.json": {"data": [{"question_id": i, "answers": ["a"] * 10} for i in range(2)]},
        "GQA/testdev_balanced_questions.json": {
            str(i): {"answer": "a", "isBalanced": True, "types": {"structural": "query"}} for i in range(2)
        },
    }
    for name, content in originals.items():
        (root / name).write_text(json.dumps(content))
    return root


def evaluate(base: Path, tree: Path, output: Path, *more: str) -> int:
    tasks = [argument for name in COIN_DATASETS for argument in ("--task", name)]
    places = ["--model", str(base), "--annotations", str(tree), "--images", str(tree), "--output", str(output)]
    small = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "2", "--image-workers", "0"]
    return cli.main(["evaluate", *tasks, *places, *small, "--protocol", "coin", *more])


def test_all_tasks_are_asked_and_scored(base_folder, tree, tmp_path, capsys):
    assert evaluate(base_folder, tree, tmp_path, "--padding", "released") == 0
    printed = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores) == list(COIN_DATASETS)
    for name, content in scores.items():
        answers = tmp_path / "answers" / f"{name}.jsonl"
        assert content == score(name, [tree], answers, "coin").as_dict()
        assert content["count"] == 2 and f"{name} (protocol coin): accuracy" in printed
        assert not json.loads(answers.with_suffix(".info.json").read_text())["run"]["square_images"]


def test_a_box_that_is_none_stops_it_before_anything_is_asked(base_folder, tree, tmp_path, capsys):
    path = tree / "Grounding" / "test.json"
    before = path.read_text()
    path.write_text(before.replace("[0.10, 0.20, 0.50, 0.60]", "[4, 8, 20, 24]"))
    try:
        assert evaluate(base_folder, tree, tmp_path / "out") == 1
    finally:
        path.write_text(before)
    assert "test.json: record 0: answer_bbox must be" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
