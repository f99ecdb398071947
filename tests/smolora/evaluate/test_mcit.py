"""UCIT and MLLM-DCL on small files in their format, and their recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smolora.evaluate.mcit import CAPTIONS, MCIT_DATASETS
from smolora.evaluate.score import score
from smolora.recipe import load_recipe

RECIPES = Path(__file__).parents[3] / "recipes"


def write(folder, questions, answers, name):
    """A question file, and an answers file in another order."""
    (folder / name).write_text(json.dumps(questions))
    lines = [json.dumps({"question_id": q["question_id"], "text": a}) for q, a in zip(questions, answers, strict=True)]
    (folder / "answers.jsonl").write_text("\n".join(lines[::-1]))
    return folder / "answers.jsonl"


def question(index, answer, text="What?", image="a.png"):
    return {"question_id": index, "image": image, "text": text, "answer": answer}


CASES = [  # dataset, pairs of annotated answer and answer, score as released, score as the field has it
    ("UCIT ImageNet-R", [("cat", "Cat"), ("cat", "cat."), ("cat", " cat"), ("cat", "dog")], 25, 75),
    ("DCL RS", [("No", "no, there is not"), ("No", "another"), ("No", "No Unanswerable"), ("No", "yes")], 50, 0),
    ("DCL Fin", [("A", "a"), ("A", "A."), ("A", "B"), ("A", "Unanswerable")], 25, 50),
]


@pytest.mark.parametrize(("dataset", "pairs", "released", "standard"), CASES)
def test_scores_are_the_released_ones(tmp_path, dataset, pairs, released, standard):
    questions = [question(index, truth) for index, (truth, _) in enumerate(pairs)]
    answers = write(tmp_path, questions, [text for _, text in pairs], MCIT_DATASETS[dataset].questions)
    result = score(dataset, [tmp_path], answers)
    assert (result.score, result.mif, result.metric) == (released, None, "accuracy")
    assert score(dataset, [tmp_path], answers, "standard").score == standard


def test_science_is_scored_by_its_four_sources(tmp_path):
    states = "Which states are red?"
    questions = [
        question(0, "nose", image="images/AI2D_1.png"),
        question(1, "nose", image="images/TQA_1.png"),
        question(2, "nose", image="images/MapQA_1.png"),
        question(3, "Ohio,Iowa", states, "images/MapQA_2.png"),
        question(4, "Ohio,Iowa", states, "images/VQA_2.png"),
        question(5, "nose", image="images/MapQA_3.png"),
    ]
    texts = ["Nose", "the nose", "the nose", "Iowa,Utah", "Iowa,Utah", "Unanswerable nose"]
    result = score("DCL Sci", [tmp_path], write(tmp_path, questions, texts, "test.json"))
    assert result.score == pytest.approx(100 * (1 + 0 + 1 + 0.5 + 0 + 0) / 6)


def test_captions_are_scored_by_cocos_file(tmp_path):
    """The image ids of the file number the questions from 1, and the questions' own ids do not matter."""
    captions = [["a red wall", "the wall is red"], ["two dogs play"], ["a car on a street"]]
    questions = [question(f"x{index}", "") for index in range(3)]
    annotations = [{"image_id": i, "caption": text} for i, texts in enumerate(captions, 1) for text in texts]
    (tmp_path / CAPTIONS).write_text(json.dumps({"images": [], "annotations": annotations[::-1]}))
    right = score("UCIT VizWiz", [tmp_path], write(tmp_path, questions, [c[0] for c in captions], "test_3000.json"))
    turned = [captions[index][0] for index in (1, 2, 0)]
    wrong = score("UCIT VizWiz", [tmp_path], write(tmp_path, questions, turned, "test_3000.json"))
    assert right.metric == "cider_d" and right.score > 500 and wrong.score < 10
    (tmp_path / CAPTIONS).write_text(json.dumps({"annotations": annotations[:3]}))
    with pytest.raises(ValueError, match=r"val_coco_type_3000.json: must have captions of image 3, got \(\)"):
        score("UCIT VizWiz", [tmp_path], tmp_path / "answers.jsonl")
    (tmp_path / CAPTIONS).write_text("[]")
    with pytest.raises(ValueError, match="must hold COCO's annotations"):
        score("UCIT VizWiz", [tmp_path], tmp_path / "answers.jsonl")


@pytest.mark.parametrize(("name", "prefix"), [("ucit_llava7b", "UCIT"), ("mllm_dcl_llava7b", "DCL")])
def test_recipes_have_the_benchmarks_order(name, prefix):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert [task.dataset for task in recipe.tasks] == [known for known in MCIT_DATASETS if known.startswith(prefix)]
    assert [task.dataset for task in recipe.tasks] == [f"{prefix} {task.name}" for task in recipe.tasks]
