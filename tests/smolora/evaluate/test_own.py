"""Metrics and formats of tasks of one's own, against known values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smolora.data.own import own_name, own_parts
from smolora.evaluate.benchmarks import find_dataset, question_files
from smolora.evaluate.overlap import edit_distance, longest_common_subsequence
from smolora.evaluate.own import FORMATS, METRICS, format_of, metric_of
from smolora.evaluate.rules import Item
from smolora.evaluate.score import judge, score

ANSWERS = [  # metric, answer, references, score
    ("exact", " Red. ", ["red"], 1),
    ("exact", "red", ["blue", "Red"], 1),
    ("exact", "", ["red"], 0),
    ("exact", "dark red", ["red"], 0),
    ("contains", "It is a red car.", ["Red car."], 1),
    ("contains", "another", ["no"], 0),
    ("contains", "", ["no"], 0),
    ("contains", "no", [""], 0),
    ("letter", "B", ["b"], 1),
    ("letter", "(B)", ["B"], 1),
    ("letter", "B. a cat", ["B. a cat"], 1),
    ("letter", "The answer is (B).", ["B"], 1),
    ("letter", "the answer is C", ["B"], 0),
    ("letter", "A cat", ["A"], 0),
    ("letter", "Between them", ["B"], 0),
    ("letter", "The answer is A or the answer is B", ["B"], 0),
    ("vqa", "2", ["two"] * 10, 1),
    ("vqa", "cat", ["cat", "cat", *["dog"] * 8], 0.6),  # 2 annotators: (2 * 1/3 + 8 * 2/3) / 10
    ("vqa", "a cat", ["cat"], 1),
    # the example of the rouge-score package: precision 5/8, recall 5/9
    ("rougeL", "The quick brown dog jumps on the log.", ["The quick brown fox jumps over the lazy dog"], 10 / 17),
    ("rougeL", "nothing", ["something"], 0),
    ("rougeL", "", [""], 0),
    ("anls", "Coca Cola", ["coca-cola"], 8 / 9),
    ("anls", "coca cola", ["pepsi", "coca cola"], 1),
    ("anls", "ab", ["cd"], 0),
    ("anls", "abcd", ["abef"], 0),  # half is no longer similar
    ("relaxed", "104.9", ["100"], 1),
    ("relaxed", "105", ["100"], 1),
    ("relaxed", "105.1", ["100"], 0),
    ("relaxed", "95,000", ["100000"], 1),
    ("relaxed", "12%", ["0.12"], 1),
    ("relaxed", "0.001", ["0"], 0),
    ("relaxed", "-10", ["10"], 0),
    ("relaxed", "Sweden", ["sweden"], 1),
    ("iou", "[0, 0, 10, 10]", ["5 0 15 10"], 1 / 3),
    ("iou", "[0.0, 0.0, 0.5, 0.5]", ["[0.0, 0.0, 0.5, 0.5]"], 1),
    ("iou", "[10, 0, 0, 10]", ["[0, 0, 10, 10]"], 0),
    ("iou", "no box", ["[0, 0, 10, 10]"], 0),
    ("iou@0.5", "[0, 0, 10, 10]", ["5 0 15 10"], 0),
    ("iou@0.5", "[0, 0, 10, 10]", ["1 0 10 10"], 1),
]


def item(*references: str) -> Item:
    return Item("0", references, references)


@pytest.mark.parametrize(("metric", "text", "references", "expected"), ANSWERS)
def test_metrics_have_their_known_values(metric, text, references, expected):
    assert metric_of(metric)([item(*references)], [text]) == [pytest.approx(expected)]


def test_every_metric_has_a_known_value():
    assert {metric for metric, *_ in ANSWERS} | {"cider"} == set(METRICS)


def test_cider_is_that_of_the_caption_evaluation():
    folder = Path(__file__).parents[2] / "golden" / "eval" / "TextCaps"
    mine = score(own_name(["cider"]), [folder], folder / "answers.jsonl")
    theirs = score("TextCaps", [folder], folder / "answers.jsonl", "standard")
    assert mine.score == theirs.score > 0


@pytest.mark.parametrize(
    ("a", "b", "distance", "common"),
    [("kitten", "sitting", 3, 4), ("", "abc", 3, 0), ("flaw", "lawn", 2, 3), ("same", "same", 0, 4)],
)
def test_distances(a, b, distance, common):
    assert edit_distance(a, b) == edit_distance(b, a) == distance
    assert longest_common_subsequence(a, b) == longest_common_subsequence(b, a) == common


FORMS = [  # format, answers that follow it, answers that do not
    ("words 2", ["red", "dark red"], ["", "a dark red"]),
    ("letter", ["B", " b "], ["BB", "B.", ""]),
    ("sentence", ["It is a red wall.", "right."], ["red", "A dog.", "It is a red wall"]),
    ("number", ["3", "-1.5", "12%", "1,000"], ["three", "", "3 cats"]),
    ("box", ["[0.1, 0.2, 0.3, 0.4]", "1 2 3 4"], ["box [1, 2, 3, 4]", "[1, 2, 3]", "[3, 2, 1, 4]"]),
    ("json", ["[1]", '{"a": null}', "null"], ["{", "", "[NaN]"]),
    (r"regex:\d{4}-\d{2}", ["2024-05", " 2024-05\n"], ["2024-05-01", "x"]),
]


@pytest.mark.parametrize(("form", "right", "wrong"), FORMS)
def test_formats(form, right, wrong):
    follows = format_of(form)
    assert [follows(item("Right"), text) for text in [*right, *wrong]] == [True] * len(right) + [False] * len(wrong)


def test_every_format_is_tested():
    assert set(FORMATS) <= {form for form, *_ in FORMS}


def test_a_json_schema_is_a_format(tmp_path):
    pytest.importorskip("jsonschema")
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"type": "object", "required": ["colour"], "additionalProperties": False}))
    with pytest.raises(ValueError, match=r"nowhere.json: No such file"):
        format_of(f"json:{tmp_path / 'nowhere.json'}")
    follows = format_of(f"json:{path}")
    assert not follows(item("x"), '{"colour": 1}')  # additional: no property is named
    path.write_text(json.dumps({"properties": {"colour": {"enum": ["red"]}}, "required": ["colour"]}))
    follows = format_of(f"json:{path}")
    assert follows(item("x"), '{"colour": "red"}')
    assert not follows(item("x"), '{"colour": "blue"}') and not follows(item("x"), "red")
    path.write_text('{"type": "colour"}')
    with pytest.raises(ValueError, match="JSON Schema"):
        format_of(f"json:{path}")


FUNCTIONS = """
def half(answer, references):
    return 0.5 if answer in references else 0

def text(answer, references):
    return "1"

def short(answer):
    return len(answer) < 4

def fails():
    pass
"""


def test_functions_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    assert metric_of(f"python:{path}:half")([item("a", "b"), item("c")], ["b", "b"]) == [0.5, 0]
    assert [format_of(f"python:{path}:short")(item("a"), text) for text in ("abc", "abcd")] == [True, False]
    with pytest.raises(ValueError, match="must return a number, got '1' for the answer 'x'"):
        metric_of(f"python:{path}:text")([item("a")], ["x"])
    with pytest.raises(ValueError, match=r"must return True or False, got 0.5"):
        path.write_text(FUNCTIONS + "def half(answer):\n    return 0.5\n")
        format_of(f"python:{path}:half")(item("a"), "x")
    for name, message in [
        (f"python:{path}:none", "has no function 'none'"),
        (f"python:{path}:fails", r"must take 2 argument"),
        (f"python:{tmp_path}/other.py:half", "there is no file"),
        ("python:half", "there is no file ''"),
    ]:
        with pytest.raises(ValueError, match=message):
            metric_of(name)
    path.write_text("1 / 0")
    with pytest.raises(ValueError, match="cannot be run: ZeroDivisionError"):
        metric_of(f"python:{path}:half")


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"metric must be one of exact, contains.*got 'accuracy'"):
        find_dataset(own_name(["accuracy"]))
    with pytest.raises(ValueError, match=r"format must be one of words N, letter.*got 'words 0'"):
        find_dataset(own_name(["exact"], "words 0"))
    with pytest.raises(ValueError, match=r"format must be regex:PATTERN, got '\('"):
        find_dataset(own_name(["exact"], "regex:("))
    with pytest.raises(ValueError, match="different entries, got exact, exact"):
        find_dataset(own_name(["exact", "exact"]))


def test_names_are_read_back():
    for metrics, form in [(["exact"], None), (["exact", "python:x.py:f"], "regex:a + b, format c")]:
        assert own_parts(own_name(metrics, form)) == (metrics, form)
    assert own_parts("GQA") is None and question_files(own_name(["exact"])) is None


def test_a_task_of_ones_own_is_scored(tmp_path):
    questions = [
        {"question_id": 0, "text": "What?", "answer": "red"},
        {"question_id": 1, "text": "What?", "answer": ["blue wall", "wall"]},
    ]
    (tmp_path / "mine.json").write_text(json.dumps(questions))
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"question_id": 1, "text": "a blue wall"}\n{"question_id": 0, "text": "Red"}\n')
    name = own_name(["exact", "rougeL"], "words 2")
    result = score(name, [tmp_path], answers, questions="mine.json")
    assert (result.metric, result.score, result.mif, result.count) == ("exact", 50, 50, 2)
    assert result.as_dict()["rougeL"] == result.extra_metrics["rougeL"] == pytest.approx(100 * (1 + 0.8) / 2)
    assert score(own_name(["exact"]), [tmp_path], answers, "standard", "mine.json").mif is None
    assert judge(name, [tmp_path], answers, questions="mine.json")["1"].follows_format is False
