"""Answers are those of the evaluation, whoever else asks at the same time."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from smolora.demo.answers import ask, num_replies
from smolora.demo.questions import TaskQuestions
from smolora.demo.runs import StageModels
from smolora.evaluate.routing import summary, tally
from smolora.evaluate.score import judge
from support.train_world import OBJECT


@pytest.fixture(scope="module")
def models() -> StageModels:
    return StageModels()


def queries(runs, task: str) -> list:
    test = TaskQuestions(runs[0].recipe, runs[0].task(task))
    return [(question, test.query(question, *test.split(question))) for question in test.questions]


def test_answers_and_routes_are_the_evaluations(runs, models):
    """Of each question of the first task, after both stages of both runs: text, score, form, experts and shares."""
    replies = {}
    for question, query in queries(runs, "ImageNet"):
        of_question = list(ask(runs, models, query))
        assert len(of_question) == num_replies(runs, query) == 4
        for reply in of_question:
            replies.setdefault((reply.run, f"stage-{reply.stage}"), {})[str(question.question_id)] = reply
    assert len(replies) == 4
    texts = set()
    for run in runs:
        test = run.folder.tests["ImageNet"]
        for place, stage in enumerate(run.folder.stages):
            given = replies[run.name, stage]
            file = run.folder.answers_file(place, "ImageNet")
            judged = judge("ImageNet", [run.folder.folder / path for path in test["annotations"]], file)
            assert given.keys() == judged.keys() and len(judged) == 3
            for name, expected in judged.items():
                reply = given[name]
                texts.add(reply.text)
                assert reply.text == expected.text
                assert (reply.score, reply.follows) == (expected.score, expected.follows_format)
            info = json.loads(file.with_suffix(".info.json").read_text())
            found = summary(tally([reply.layers], reply.experts) for reply in given.values())
            assert [entry["layer"] for entry in found] == [entry["layer"] for entry in info["routing"]]
            for one, other in zip(found, info["routing"], strict=True):
                assert (one["vu"], one["if"], one["samples"]) == (other["vu"], other["if"], other["samples"])
                assert one["alpha"] == pytest.approx(other["alpha"], abs=1e-6)
            assert bool(found) == (run.name == "smolora")
    assert len(texts) > 2  # stages and methods do differ


def test_people_who_ask_at_once_get_their_own(runs, models):
    ((_, first), *_), ((_, second), *_) = queries(runs, "ImageNet"), queries(runs, "Flickr30k")
    alone = [list(ask(runs, models, query)) for query in (first, second)]
    assert [reply.text for reply in alone[0]] != [reply.text for reply in alone[1]]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda query: list(ask(runs, models, query)), [first, second] * 4))
    assert together == alone * 4


def test_another_instruction_is_routed_and_judged_by_itself(runs, models):
    test = TaskQuestions(runs[0].recipe, runs[0].task("Flickr30k"))
    question = test.questions[0]
    reply = next(iter(ask(runs[:1], models, test.query(question, "", OBJECT))))
    assert reply.score is None and reply.follows == (len(reply.text.split()) <= 2)
    assert next(iter(ask(runs[:1], models, test.query(question, "", "Sing it.")))).follows is None


def test_a_run_without_the_task_is_left_out(runs, models):
    ((_, query), *_) = queries(runs, "ImageNet")
    query = query._replace(task="GQA")
    assert num_replies(runs, query) == 0 and list(ask(runs, models, query)) == []
