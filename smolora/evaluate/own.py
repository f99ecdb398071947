"""Metrics and answer formats of tasks of one's own, by the names that a recipe gives.

A recipe's task with `metric` (and `format`) is scored as the dataset that `smolora.data.own.own_name` names, which
`find_dataset` takes like the name of a benchmark's dataset.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..arguments import is_number
from ..data.format import read_json
from ..extras import require_extra
from . import grounding, overlap, rules
from .datasets import Dataset, Scoring, several_answers
from .rules import Item, Metric, Rule, each

PYTHON = "python:"
OPTION = r"\(?([A-Z])\)?(?:[.:)]\s.*|[.:]?)"  # B, (B), B., B) text, (B) text
STATED_OPTION = re.compile(r"\banswer\s+is:?\s+(?:option\s+)?\(?([A-Z])\b\)?", re.IGNORECASE)
BOX_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def own_dataset(metrics: Sequence[str], form: str | None = None) -> Dataset:
    """The dataset of a task of one's own. Its question file has any name, and every protocol scores it alike.

    Args:
        metrics: names for `metric_of`. The first is the score.
        form: a name for `format_of`; None for no MIF.

    Raises:
        ValueError: a metric or the format is unknown, is given twice, or its file is missing or malformed.
        MissingExtraError: a package of the format is not installed.
    """
    if len(set(metrics)) < len(metrics):
        raise ValueError(f"metric must have different entries, got {', '.join(metrics)}")
    found = {name: metric_of(name) for name in metrics}
    first, *others = found
    rule = None if form is None else format_of(form)
    scoring = Scoring(first, found[first], rule, extra_metrics={other: found[other] for other in others})
    return Dataset(
        "test.json",
        several_answers,
        smolora=scoring,
        standard=scoring,
        coin=scoring,
        other_questions="val.json",
        any_file_name=True,
    )


def metric_of(name: str) -> Metric:
    """The metric of a name in `METRICS`, or of `python:FILE:FUNCTION`.

    The function gets the answer and the tuple of references, and returns a number; 1 is a right answer, 0 a wrong one.

    Raises:
        ValueError: there is no such metric, or no such function.
    """
    if name.startswith(PYTHON):
        return _python_metric(name)
    if name not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, python:FILE:FUNCTION, got {name!r}")
    return METRICS[name]


def format_of(form: str) -> Rule:
    """The rule of a format: whether an answer has the form that its instruction asks for.

    Args:
        form: "words N" (one to N words), "letter" (one letter), "sentence" (ends with a full stop, and has more than
            four words or is a reference), "number", "box" (four numbers), "json", "json:FILE" (a JSON Schema),
            "regex:PATTERN" (of the whole answer without surrounding space), or "python:FILE:FUNCTION" (gets the answer
            and returns a bool).

    Raises:
        ValueError: there is no such format, or its pattern, its schema or its function is missing or malformed.
        MissingExtraError: "json:FILE" without jsonschema.
    """
    words = re.fullmatch(r"words (\d+)", form)
    if words and int(words[1]) > 0:
        return _at_most(int(words[1]))
    if form in FORMATS:
        return FORMATS[form]
    kind, _, rest = form.partition(":")
    if kind == "json" and rest:
        return _by_schema(Path(rest))
    if kind == "regex" and rest:
        return _by_pattern(rest)
    if kind == "python" and rest:
        return _python_rule(form)
    known = ("words N", *FORMATS, "json:FILE", "regex:PATTERN", "python:FILE:FUNCTION")
    raise ValueError(f"format must be one of {', '.join(known)}, got {form!r}")


# ---- metrics


def best(score: Callable[[str, str], float]) -> Metric:
    """Make a metric of a score of an answer and one reference: that of its best reference."""
    return each(lambda item, text: max(float(score(text, reference)) for reference in item.references))


def exact(text: str, reference: str) -> bool:
    """Equality without case, surrounding space and full stops at the end. An empty answer is wrong."""
    return rules.exact(Item("", reference, (reference,)), text)


def contains(text: str, reference: str) -> bool:
    """Whether the reference occurs in the answer as whole words, without case."""
    reference = reference.strip().rstrip(".").strip().lower()
    return bool(reference) and re.search(rf"(?<!\w){re.escape(reference)}(?!\w)", text.lower()) is not None


def option_letter(text: str) -> str | None:
    """The letter of the one option that a text chooses: "B", "(B)", "B. red" or "... the answer is B"."""
    text = text.strip()
    alone = re.fullmatch(OPTION, text, re.DOTALL) or re.fullmatch("([a-z])[.]?", text)
    if alone:
        return alone[1].upper()
    stated = set(STATED_OPTION.findall(text))
    return stated.pop().upper() if len(stated) == 1 else None


def letter(text: str, reference: str) -> bool:
    """Whether answer and reference choose the same option."""
    chosen = option_letter(text)
    return chosen is not None and chosen == option_letter(reference)


def relaxed(text: str, reference: str) -> bool:
    """ChartQA's relaxed accuracy: a number within 5% of the reference, else equality without case.

    "12%" is read as 0.12. A reference of 0 asks for 0.
    """
    value, truth = _number(text), _number(reference)
    if value is None or truth is None:
        return exact(text, reference)
    return value == 0 if truth == 0 else abs(value - truth) / abs(truth) <= 0.05


def box_iou(text: str, reference: str) -> float:
    """IoU of the one box that is written in each, x1, y1, x2, y2 in any unit that both share; 0 without one."""
    box, truth = written_box(text), written_box(reference)
    if box is None or truth is None:
        return 0.0
    return float(grounding.iou(box, truth))


def written_box(text: str) -> tuple[float, ...] | None:
    """The four numbers of a text, if they are the corners of a box in order; None for any other text."""
    numbers = tuple(map(float, BOX_NUMBER.findall(text)))
    return numbers if len(numbers) == 4 and numbers[0] <= numbers[2] and numbers[1] <= numbers[3] else None


def _number(text: str) -> float | None:
    text = text.strip().rstrip(".").replace(",", "")
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


METRICS: dict[str, Metric] = {
    "exact": best(exact),
    "contains": best(contains),
    "letter": best(letter),
    "vqa": each(rules.soft_vqa),
    "cider": rules.cider_d,
    "rougeL": best(overlap.rouge_l),
    "anls": best(overlap.anls),
    "relaxed": best(relaxed),
    "iou": best(box_iou),
    "iou@0.5": best(lambda text, reference: box_iou(text, reference) > 0.5),
}


# ---- formats


def _at_most(number: int) -> Rule:
    return lambda item, text: 1 <= len(text.split()) <= number


def is_json(item: Item, text: str) -> bool:
    """Whether the answer is JSON and nothing else."""
    return _parsed(text) is not None


def _parsed(text: str) -> tuple[Any] | None:
    try:
        return (json.loads(text, parse_constant=_no_constant),)
    except (ValueError, RecursionError):
        return None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _by_schema(path: Path) -> Rule:
    require_extra("own", "jsonschema", user="format json:FILE")
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    try:
        schema = read_json(path)
        kind = validator_for(schema)
        kind.check_schema(schema)
    except OSError as error:
        raise ValueError(f"format must be json:FILE with a JSON Schema, got {path}: {error.strerror}") from error
    except SchemaError as error:
        raise ValueError(f"format must be json:FILE with a JSON Schema, got {path}: {error.message}") from error
    validator = kind(schema)

    def follows(item: Item, text: str) -> bool:
        content = _parsed(text)
        return content is not None and validator.is_valid(content[0])

    return follows


def _by_pattern(pattern: str) -> Rule:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"format must be regex:PATTERN, got {pattern!r}: {error}") from error
    return lambda item, text: compiled.fullmatch(text.strip()) is not None


FORMATS: dict[str, Rule] = {
    "letter": rules.follows_letter,
    "sentence": rules.follows_sentence,
    "number": lambda item, text: _number(text) is not None,
    "box": lambda item, text: re.fullmatch(r"[\s\[\](),\d.-]*", text) is not None and written_box(text) is not None,
    "json": is_json,
}


# ---- functions of one's own


def _python_metric(name: str) -> Metric:
    function = python_function("metric", name, 2)

    def score(item: Item, text: str) -> float:
        value = function(text, item.references)
        if isinstance(value, bool) or is_number(value):
            return float(value)
        raise ValueError(f"metric {name} must return a number, got {value!r} for the answer {text!r}")

    return each(score)


def _python_rule(name: str) -> Rule:
    function = python_function("format", name, 1)

    def follows(item: Item, text: str) -> bool:
        value = function(text)
        if isinstance(value, bool):
            return value
        raise ValueError(f"format {name} must return True or False, got {value!r} for the answer {text!r}")

    return follows


def python_function(key: str, name: str, arguments: int) -> Callable[..., Any]:
    """Load the function of a name `python:FILE:FUNCTION`. Its file is run, so it must be one that is trusted.

    Args:
        key: key of the recipe, for errors.
        name: the name; a relative path starts in the current folder.
        arguments: number of arguments that it is called with.

    Raises:
        ValueError: there is no such file or function, the file cannot be run, or the function takes others.
    """
    file, _, function = name.removeprefix(PYTHON).rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise ValueError(f"{key} must be python:FILE:FUNCTION, got {name!r}, and there is no file {file!r}")
    spec = importlib.util.spec_from_file_location(f"smolora_own_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{key} must be python:FILE:FUNCTION with a file of Python, got {name!r}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file may raise anything
        raise ValueError(f"{key} {name}: {path} cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"{key} must be python:FILE:FUNCTION, got {name!r}, and {path} has no function {function!r}")
    try:
        inspect.signature(found).bind(*[None] * arguments)
    except TypeError as error:
        raise ValueError(f"{key} {name} must take {arguments} argument(s): {error}") from error
    return found
