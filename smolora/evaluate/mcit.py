"""UCIT (HiDe-LLaVA, ACL 2025) and the domains of MLLM-CL (MLLM-DCL), scored as their released scorers do.

Neither measures instruction following, so there is no MIF. Each name starts with its benchmark's, since both have
datasets that other benchmarks have too. UCIT's captions are scored by CIDEr of the COCO caption evaluation, against a
file in COCO's format whose image ids number the questions from 1.
"""

from __future__ import annotations

from collections.abc import Callable

from ..data.format import read_json, read_questions
from . import rules
from .datasets import Dataset, Files, Scoring, one_answer
from .rules import Item, each

CAPTIONS = "val_coco_type_3000.json"


def upper_exact(item: Item, text: str) -> bool:
    """UCIT: equality after upper-casing, without stripping."""
    return text.upper() == item.references[0].upper()


def holds_answer(item: Item, text: str) -> bool:
    """MLLM-DCL's RS, Med and AD: the answer occurs in the text, without case, and "Unanswerable" does not."""
    return "Unanswerable" not in text and item.references[0].lower() in text.lower()


def science(item: Item, text: str) -> float:
    """MLLM-DCL's Sci: equality for AI2D, TQA and VQA; for MapQA the answer occurs in the text, or the share of states.

    The group is the start of the picture's name, or "states" for a question of MapQA that asks for states.
    """
    if "Unanswerable" in text:
        return 0.0
    text, answer = text.lower(), item.references[0].lower()
    if item.group in SCIENCE_EXACT:
        return float(text == answer)
    if item.group == STATES:
        given, asked = text.split(","), answer.split(",")
        return sum(state in given for state in asked) / len(asked)
    return float(answer in text)


SCIENCE_EXACT = ("AI2D", "TQA", "VQA")
STATES = "states"


def load_science(files: Files, questions: str) -> list[Item]:
    """Load Sci's questions. What scores them depends on the names of their pictures and on the questions."""
    asked = read_questions(files.find(questions), skip=files.skip)
    items = one_answer(files, questions)
    groups = []
    for question in asked:
        start = (question.image or "").rpartition("/")[2].partition("_")[0]
        states = start not in SCIENCE_EXACT and "Which states" in question.text
        groups.append(STATES if states else start)
    return [item._replace(group=group) for item, group in zip(items, groups, strict=True)]


def load_captions(files: Files, questions: str) -> list[Item]:
    """Load UCIT's questions for captions, with the references of `CAPTIONS`."""
    path = files.find(CAPTIONS)
    content = read_json(path)
    references: dict[int, list[str]] = {}
    try:
        for record in content["annotations"]:
            references.setdefault(record["image_id"], []).append(record["caption"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: must hold COCO's annotations, each with image_id and caption: {error!r}") from error
    items = []
    for question in read_questions(files.find(questions), skip=files.skip):
        captions = tuple(references.get(question.index + 1, ()))
        if not captions or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"{path}: must have captions of image {question.index + 1}, got {captions!r:.80}")
        items.append(Item(str(question.question_id), captions, captions))
    return items


def _released(questions: str, right: Callable[[Item, str], float], standard: Scoring | None = None) -> Dataset:
    released = Scoring("accuracy", each(right), None)
    return Dataset(questions, one_answer, smolora=released, standard=standard or WORD)


WORD = Scoring("accuracy", each(rules.exact), None)
CAPTION = Scoring("cider_d", rules.cider_d, None)
_captions = Dataset("test_3000.json", load_captions, smolora=CAPTION, standard=CAPTION)
_science = Scoring("accuracy", each(science), None)

MCIT_DATASETS: dict[str, Dataset] = {  # of each benchmark in the order of training
    "UCIT ImageNet-R": _released("test_3000.json", upper_exact),
    "UCIT ArxivQA": _released("test_3000.json", upper_exact),
    "UCIT VizWiz": _captions,
    "UCIT IconQA": _released("test_3000.json", upper_exact),
    "UCIT CLEVR-Math": _released("test_3000.json", upper_exact),
    "UCIT Flickr30k": _captions,
    "DCL RS": _released("test.json", holds_answer),
    "DCL Med": _released("test.json", holds_answer),
    "DCL AD": _released("test.json", holds_answer),
    "DCL Sci": Dataset("test.json", load_science, smolora=_science, standard=WORD),
    "DCL Fin": _released("test.json", rules.released_exact_answerable),
}
