"""CVIT's ten test sets: files, metric and the answer format that the instruction asks for.

A new dataset is one entry of `DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from ..arguments import check_choice
from ..data.format import Question, read_json, read_questions
from . import rules
from .pairing import Pairing
from .rules import Item, Metric, Rule, each

PROTOCOLS = ("smolora", "standard", "coin")


class Files:
    """Finds the annotation files of one dataset, in folders and in their subfolders named after it.

    Args:
        folders: folders to search.
        dataset: name of the dataset.
        skip: indices of the question file's records to leave out.

    Raises:
        ValueError: a folder does not exist.
    """

    def __init__(self, folders: Sequence[Path], dataset: str, skip: Collection[int] = ()) -> None:
        missing = [str(folder) for folder in folders if not folder.is_dir()]
        if missing or not folders:
            raise ValueError(f"annotations must be existing folders, got {', '.join(missing) or 'none'}")
        self.dataset = dataset
        self.skip = skip
        self.folders = [place for folder in folders for place in (folder, folder / dataset)]

    def find(self, name: str) -> Path:
        """Find a file by name.

        Raises:
            ValueError: it is in none of the folders, or in several.
        """
        path = self.find_optional(name)
        if path is None:
            places = ", ".join(map(str, self.folders))
            raise ValueError(f"{self.dataset} needs {name}, which is in none of {places}: name its folder too")
        return path

    def find_optional(self, name: str) -> Path | None:
        """Find a file by name, or return None. Several files of that name are an error."""
        found = {path.resolve(): path for path in (folder / name for folder in self.folders) if path.is_file()}
        if len(found) > 1:
            raise ValueError(f"{self.dataset}: {name} is found more than once: {', '.join(map(str, found.values()))}")
        return next(iter(found.values()), None)


@dataclass(frozen=True)
class Scoring:
    """The scoring of a dataset under one protocol."""

    metric: str  # printed name
    score: Metric
    follows_format: Rule | None  # None where nothing says what the form is; then there is no MIF
    groups: tuple[str, ...] = ()  # groups of items that get a score of their own as well
    extra_metrics: Mapping[str, Metric] = field(default_factory=dict)  # printed beside the score
    single_reference_metric: str | None = None  # printed name if every item has a single reference
    pairing: Pairing = "once"  # which answers count; see `pair_answers`


@dataclass(frozen=True)
class Dataset:
    """One test set.

    Args:
        questions: file name of its questions in the benchmark.
        other_questions: the file name that they have in CoIN, where it is another.
        any_file_name: its questions may be in a file of any name.
        load: reads its items from its files.
        smolora: scoring that is comparable with the paper's tables; None for a dataset that is not in them.
        standard: scoring with the metric as the field defines it.
        coin: scoring by CoIN's released scorers.
        missing_scores_zero: a question without an answer counts as wrong; otherwise it is an error.
        max_new_tokens: maximum length of an answer, as released.
        released_square: whether the released evaluation pads images to a square, as training does for all datasets.
        instruction_row: row of its embedding among those saved with a released adapter; None if it has none.
    """

    questions: str
    load: Callable[[Files, str], list[Item]]
    smolora: Scoring | None = None
    standard: Scoring | None = None
    coin: Scoring | None = None
    missing_scores_zero: bool = False
    max_new_tokens: int = 128
    released_square: bool = True
    instruction_row: int | None = None
    other_questions: str | None = None
    any_file_name: bool = False

    @property
    def question_files(self) -> set[str] | None:
        """File names that its questions may have; None for any."""
        return None if self.any_file_name else {self.questions, self.other_questions or self.questions}

    def questions_in(self, files: Files) -> str:
        """File name that its questions have in some folders."""
        other = self.other_questions
        if other is not None and files.find_optional(self.questions) is None and files.find_optional(other):
            return other
        return self.questions

    def scoring(self, protocol: str) -> Scoring:
        """The scoring under a protocol, one of `PROTOCOLS`.

        Raises:
            ValueError: there is no such protocol, or it does not score this dataset.
        """
        check_choice("protocol", protocol, PROTOCOLS)
        scoring = getattr(self, protocol)
        if scoring is None:
            raise ValueError(f"protocol must be one that scores this dataset, got {protocol!r}")
        return scoring


# ---- loaders


def one_answer(files: Files, questions: str, *, unique: bool = True) -> list[Item]:
    """Load questions with one answer each. Without `unique`, ids may be repeated."""
    path = files.find(questions)
    asked = read_questions(path, skip=files.skip, unique=unique)
    return [Item(str(q.question_id), a, (a,)) for q in asked for a in [_one(q, path)]]


def several_answers(files: Files, questions: str) -> list[Item]:
    """Load questions with one reference or a list of them."""
    path = files.find(questions)
    items = []
    for question in read_questions(path, skip=files.skip):
        answer = _given(question, path)
        items.append(Item(str(question.question_id), answer, (answer,) if isinstance(answer, str) else answer))
    return items


def ten_answers(
    annotations: str, key: str | None, *, by: str = "question_id", required: bool = False
) -> Callable[[Files, str], list[Item]]:
    """A loader of questions with one answer each, and ten annotators' answers in a file of the original dataset.

    Args:
        annotations: that file, a list of records with `answers`, under `key` if one is given.
        by: key that matches records to questions, "question_id" or "image" (its file name).
        required: refuse to score without the file. Otherwise the one answer is the only reference then.
    """

    def load(files: Files, questions: str) -> list[Item]:
        items = one_answer(files, questions)
        path = files.find(annotations) if required else files.find_optional(annotations)
        if path is None:
            return items
        keys = [item.question_id for item in items]
        if by == "image":
            keys = [
                PurePath(question.image or "").name
                for question in read_questions(files.find(questions), skip=files.skip)
            ]
        references = read_annotators(path, key, by)
        unknown = [name for name in keys if name not in references]
        if unknown:
            raise ValueError(f"{path}: no answers for {len(unknown)} questions, the first has {by} {unknown[0]!r}")
        return [item._replace(references=references[name]) for item, name in zip(items, keys, strict=True)]

    return load


def gqa(files: Files, questions: str) -> list[Item]:
    """Load GQA: questions with one answer each, and from its own file whether they are balanced, binary or open."""
    path = files.find("testdev_balanced_questions.json")
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold an object, question ids to questions")
    items = []
    for item in one_answer(files, questions):
        try:
            known = content[item.question_id]
            group = ("open" if known["types"]["structural"] == "query" else "binary") if known["isBalanced"] else "-"
            items.append(item._replace(references=(str(known["answer"]),), group=group))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: question {item.question_id}: {error!r} is missing or malformed") from error
    return items


def multiple_choice(files: Files, questions: str) -> list[Item]:
    """Load ScienceQA's test split from its own two files."""
    splits, problems = files.find("pid_splits.json"), files.find("problems.json")
    ids, content = read_json(splits), read_json(problems)
    if not isinstance(ids, dict) or not isinstance(ids.get("test"), list):
        raise ValueError(f"{splits}: must hold the list of ids 'test'")
    if not isinstance(content, dict):
        raise ValueError(f"{problems}: must hold an object, ids to problems")
    items = []
    for index in map(str, ids["test"]):
        try:
            choices, answer = content[index]["choices"], content[index]["answer"]
            if not 0 <= answer < len(choices) <= len(rules.LETTERS):
                raise ValueError(f"answer {answer} of {len(choices)} choices")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{problems}: problem {index}: missing or malformed: {error}") from error
        items.append(Item(index, rules.LETTERS[answer], (rules.LETTERS[answer],), len(choices)))
    return items


def _given(question: Question, path: Path) -> str | tuple[str, ...]:
    if question.answer is None:
        raise ValueError(f"{path}: record {question.index}: answer is missing")
    return question.answer


def _one(question: Question, path: Path) -> str:
    answer = _given(question, path)
    if not isinstance(answer, str):
        raise ValueError(f"{path}: record {question.index}: answer must be one string, got {len(answer)}")
    return answer


def read_annotators(path: Path, key: str | None, by: str) -> dict[str, tuple[str, ...]]:
    """Read the annotators' answers from a file of the original dataset; see `ten_answers`."""
    records: Any = read_json(path)
    if key is not None:
        records = records.get(key) if isinstance(records, dict) else None
    if not isinstance(records, list):
        raise ValueError(f"{path}: must hold a list of records" + (f" under {key!r}" if key else ""))
    references = {}
    for index, record in enumerate(records):
        try:
            answers = [answer["answer"] if isinstance(answer, dict) else answer for answer in record["answers"]]
            if not answers or not all(isinstance(answer, str) for answer in answers):
                raise TypeError("answers must be strings")
            references[str(record[by])] = tuple(answers)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: record {index}: missing or malformed: {error}") from error
    return references


# ---- the table

RELEASED_CAPTION = Scoring("cider", rules.released_cider, rules.released_follows_sentence)
CAPTION = Scoring("cider_d", rules.cider_d, rules.follows_sentence, extra_metrics={"cider": rules.plain_cider})
VQA = Scoring("vqa_accuracy", each(rules.soft_vqa), rules.follows_word, single_reference_metric="accuracy")
ACCURACY = Scoring("accuracy", each(rules.exact), rules.follows_word)


def _released(right: Callable[[Item, str], float]) -> Scoring:
    return Scoring("accuracy", each(right), rules.released_follows_word)


CENTRE_CROP: dict[str, Any] = {
    "max_new_tokens": 1024,
    "released_square": False,
}  # settings of one of the two released scripts

DATASETS: dict[str, Dataset] = {
    "ScienceQA": Dataset(
        "test.json",
        multiple_choice,
        Scoring("accuracy", each(rules.released_letter), rules.follows_letter),
        Scoring("accuracy", each(rules.letter), rules.follows_letter),
        missing_scores_zero=True,
        **CENTRE_CROP,
        instruction_row=0,
    ),
    "TextVQA": Dataset(
        "val.json",
        ten_answers("TextVQA_0.5.1_val.json", "data", required=True),
        _released(rules.released_soft),
        Scoring("vqa_accuracy", each(rules.soft_textvqa), rules.follows_word),
        instruction_row=1,
    ),
    "Flickr30k": Dataset(
        "val.json",
        several_answers,
        Scoring("cider", rules.released_cider_swapped, rules.released_follows_sentence),
        CAPTION,
        instruction_row=2,
    ),
    "ImageNet": Dataset(
        "test.json", one_answer, _released(rules.released_either_contains), ACCURACY, **CENTRE_CROP, instruction_row=3
    ),
    "GQA": Dataset(
        "test.json",
        gqa,
        replace(_released(rules.released_full_stop), groups=("binary", "open")),
        replace(ACCURACY, groups=("binary", "open")),
        instruction_row=4,
    ),
    "VQAv2": Dataset(
        "val.json",
        ten_answers("v2_mscoco_val2014_annotations.json", "annotations"),
        _released(rules.released_exact),
        VQA,
        **CENTRE_CROP,
        instruction_row=5,
    ),
    "VizWiz": Dataset(
        "val.json",
        ten_answers("Annotations/val.json", None, by="image"),
        _released(rules.released_exact),
        VQA,
        instruction_row=1,
    ),
    "TextCaps": Dataset("val.json", several_answers, RELEASED_CAPTION, CAPTION, instruction_row=2),
    "OCRVQA": Dataset(
        "test.json",
        one_answer,
        _released(rules.released_exact_answerable),
        ACCURACY,
        instruction_row=1,
        other_questions="val.json",
    ),
    "Places365": Dataset(
        "val.json", one_answer, _released(rules.released_either_contains), ACCURACY, **CENTRE_CROP, instruction_row=6
    ),
}
