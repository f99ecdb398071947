"""MiniCVIT-20: the same bytes everywhere, parts that share no question, and a recipe that names its tasks."""

import json
from pathlib import Path

import pytest

from smolora.data.format import read_conversations, read_questions
from smolora.evaluate.score import score
from smolora.minicvit import tasks
from smolora.minicvit.scenes import StableRandom
from smolora.minicvit.twenty import MINICVIT_20, PARTS
from smolora.recipe import load_recipe

from .test_tasks import digest_of

SMALL = 12
DIGEST = "32d63f64e65dc66b99321932b606b3471cdfcdbd5b5753b2132d8351bb3ea877"
RECIPE = Path(__file__).parents[3] / "recipes/minicvit_20.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All twenty tasks with few samples each."""
    small = {name: task._replace(train=SMALL, test=SMALL) for name, task in MINICVIT_20.tasks.items()}
    return MINICVIT_20._replace(tasks=small).make(tmp_path_factory.mktemp("minicvit-20"))


def test_the_bytes_are_those_of_every_machine(folder):
    """A change of this hash is a change of the benchmark: MINICVIT_20's seed must change with it."""
    assert digest_of(folder) == DIGEST


@pytest.mark.parametrize("dataset", PARTS)
def test_a_sample_is_of_one_part(dataset):
    """All that MiniCVIT draws belongs to exactly one: the one that does not draw again."""
    draw = {"ScienceQA": tasks.science_qa, "TextVQA": tasks.text_vqa, "ImageNet": tasks.image_net, "GQA": tasks.gqa}
    whole = draw.get(dataset, tasks.vqa)
    counts = dict.fromkeys(PARTS[dataset], 0)
    for index in range(200):
        sample = whole(StableRandom(str(index)), False)
        own = [name for name, part in PARTS[dataset].items() if same(part(StableRandom(str(index)), False), sample)]
        assert len(own) == 1, sample
        counts[own[0]] += 1
    assert min(counts.values()) > 10, counts


def same(one, other) -> bool:
    return (one.question, one.answer) == (other.question, other.answer)


def test_the_recipes_tasks_score_perfect_answers_in_full(folder, tmp_path):
    recipe = load_recipe(RECIPE, [f"data.root={folder / 'Instructions_Single'}", f"data.images={folder / 'images'}"])
    assert [task.name for task in recipe.tasks] == list(MINICVIT_20.tasks)
    for task in recipe.tasks:
        questions = read_questions(recipe.test_file(task))
        assert len(read_conversations(recipe.train_file(task))) == len(questions) == SMALL
        assert all(question.text.endswith(task.instructions[0]) for question in questions)
        answers = tmp_path / f"{task.name}.jsonl"
        lines = [{"question_id": question.question_id, "text": question.answer} for question in questions]
        answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
        perfect = score(task.benchmark_name, recipe.annotations(task), answers, questions="test.json")
        assert (perfect.score, perfect.mif, perfect.count) == (100, 100, SMALL)
