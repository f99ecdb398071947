"""CoIN (NeurIPS 2024 Datasets and Benchmarks): its eight test sets, scored as its released scorers do.

They are the scorers of github.com/zackschen/CoIN at commit 4122465. MoELoRA's and BranchLoRA's results are CoIN's
metrics. An answer counts as often as it is given, and a question without one does not count, except in ScienceQA and
GQA. Question ids are compared as text. CoIN has no measure of instruction following such as MIF; its accuracy is
called that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from . import grounding, rules
from .datasets import Dataset, Files, Scoring, gqa, multiple_choice, one_answer, read_annotators
from .pairing import Pairing
from .rules import Item, each


def upper_exact(item: Item, text: str) -> bool:
    """VQAv2: equality after upper-casing, so "straße" is "STRASSE"."""
    return text.upper() == item.references[0].upper()


def either_contains(item: Item, text: str) -> bool:
    """ImageNet: either contains the other, with case, so an empty answer is right."""
    return text in item.references[0] or item.references[0] in text


def ten_answers(files: Files, questions: str) -> list[Item]:
    """Load TextVQA from its own annotations; the question file is only for asking."""
    path = files.find("TextVQA_0.5.1_val.json")
    return [Item(name, "", references) for name, references in read_annotators(path, "data", "question_id").items()]


def _coin(
    questions: str,
    load: Callable[[Files, str], list[Item]],
    right: Callable[[Item, str], float],
    pairing: Pairing = "every",
    *,
    groups: tuple[str, ...] = (),
    **more: Any,
) -> Dataset:
    """A test set with the generation settings of CoIN's evaluation: up to 1024 tokens, images cropped."""
    scoring = Scoring("accuracy", each(right), None, groups, pairing=pairing)
    return Dataset(questions, load, coin=scoring, max_new_tokens=1024, released_square=False, **more)


load_answers = partial(one_answer, unique=False)

COIN_DATASETS: dict[str, Dataset] = {  # in the order of training
    "ScienceQA": _coin("test.json", multiple_choice, rules.released_letter, "last", missing_scores_zero=True),
    "TextVQA": _coin("val.json", ten_answers, rules.released_soft),
    "ImageNet": _coin("test.json", load_answers, either_contains, "position"),
    "GQA": _coin("test.json", gqa, rules.released_full_stop, "last", groups=("binary", "open")),
    "VizWiz": _coin("val.json", load_answers, rules.released_exact),
    "Grounding": _coin(
        "test.json",
        grounding.load,
        grounding.coin_grounded,
        standard=Scoring("acc@0.5", each(grounding.grounded), grounding.follows_box),
    ),
    "VQAv2": _coin("val.json", load_answers, upper_exact),
    "OCRVQA": _coin("val.json", load_answers, rules.released_exact_answerable),
}
