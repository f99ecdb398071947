"""Score a file of answers with the dataset's metric, and MIF where it is defined."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..data.format import Skipped, read_lines
from ..data.own import own_parts
from .benchmarks import find_dataset
from .datasets import Files
from .pairing import pair_answers
from .rules import Item


@dataclass(frozen=True)
class Score:
    """The score of an answers file. Figures are in percent and unrounded; CIDEr is 100 times its 0 to 10."""

    dataset: str
    protocol: str
    metric: str
    score: float
    mif: float | None  # None under protocol "coin", which does not measure it
    count: int  # number of questions that the score averages; of answers where each counts
    groups: dict[str, float | None] = field(default_factory=dict)  # score of each group; None for an empty one
    extra_metrics: dict[str, float] = field(default_factory=dict)  # by name
    skipped: int = 0  # questions left out because they could not be answered
    missing: int = 0  # questions without an answer, counted as wrong
    uncounted: int = 0  # questions without an answer, not counted

    def as_dict(self) -> dict[str, str | float | int | None]:
        """The score as `smolora score --json` prints it."""
        content = {name: getattr(self, name) for name in ("dataset", "protocol", "metric", "score", "mif", "count")}
        counts = {name: getattr(self, name) for name in ("skipped", "uncounted") if getattr(self, name)}
        own = self.extra_metrics if own_parts(self.dataset) else {}
        return content | self.groups | own | counts

    def __str__(self) -> str:
        figures = [
            f"{self.metric} {self.score:.2f}",
            *(f"{n} {_two(v)}" for n, v in (self.groups | self.extra_metrics).items()),
        ]
        figures += [] if self.mif is None else [f"MIF {self.mif:.2f}"]
        figures += [f"{self.count} answers"]
        figures += [f"{self.missing} of them missing, counted as wrong"] * bool(self.missing)
        figures += [f"{self.uncounted} questions without an answer not counted"] * bool(self.uncounted)
        figures += [f"{self.skipped} skipped"] * bool(self.skipped)
        return f"{self.dataset} (protocol {self.protocol}): " + ", ".join(figures)

    @property
    def remark(self) -> str | None:
        """A caveat on the figures, if there is one."""
        if self.count == 1 and self.metric.startswith("cider"):
            return (
                f"{self.dataset}: CIDEr weighs an n-gram by how few of the pictures have it, so that of a single "
                "picture it is 0 whatever the caption says"
            )
        return None

    def show(self) -> None:
        """Print the figures, and a caveat on stderr if there is one."""
        print(self, flush=True)
        self.show_remark()

    def show_remark(self) -> None:
        """Print the caveat on stderr if there is one."""
        if self.remark is not None:
            print(self.remark, file=sys.stderr, flush=True)


def score(
    dataset: str,
    annotations: Sequence[str | Path],
    answers: str | Path,
    protocol: str = "smolora",
    questions: str | None = None,
) -> Score:
    """Score an answers file.

    Args:
        dataset: a name of `datasets_of(protocol)`.
        annotations: folders with the dataset's files, searched with their subfolders named after the dataset.
        answers: JSON lines with `question_id` and `text`, in any order. The questions listed in the file
            `skipped_path` are left out.
        protocol: "smolora" (comparable with the paper's tables), "standard" (the metric as the field defines it) or
            "coin" (CoIN's scorers as released, see `smolora.evaluate.coin`).
        questions: file name of the questions; None for the dataset's own.

    Raises:
        ValueError: a file is missing or malformed, or answers and questions do not match. The message names file and
            line or record.
    """
    scoring = find_dataset(dataset, protocol).scoring(protocol)
    items, given, skipped, missing, uncounted = _read(dataset, annotations, Path(answers), protocol, questions)
    scores = scoring.score(items, given)
    counted = [value for value in scores if value is not None]
    if not counted:
        raise ValueError(f"{answers}: none of the {len(items)} questions of {dataset} counts")
    follows = scoring.follows_format
    one_reference = all(len(item.references) == 1 for item in items)
    return Score(
        dataset=dataset,
        protocol=protocol,
        metric=scoring.single_reference_metric if scoring.single_reference_metric and one_reference else scoring.metric,
        score=_percent(counted),
        mif=None
        if follows is None
        else _percent([follows(item, text) for item, text in zip(items, given, strict=True)]),
        count=len(counted),
        groups={
            group: _percent([value for item, value in zip(items, scores, strict=True) if item.group == group])
            for group in scoring.groups
        },
        extra_metrics={name: _percent(metric(items, given)) for name, metric in scoring.extra_metrics.items()},
        skipped=skipped,
        missing=missing,
        uncounted=uncounted,
    )


class Judged(NamedTuple):
    """A question of a test set with the answer it got."""

    item: Item
    text: str
    score: float | None  # by the dataset's metric; None if the question does not count
    follows_format: bool | None  # whether the answer has the form that was asked for; None where nothing says so


def judge(
    dataset: str,
    annotations: Sequence[str | Path],
    answers: str | Path,
    protocol: str = "smolora",
    questions: str | None = None,
) -> dict[str, Judged]:
    """Judge every answer of a file as `score` does, with the same arguments and errors. Returns them by question id."""
    scoring = find_dataset(dataset, protocol).scoring(protocol)
    items, given, *_ = _read(dataset, annotations, Path(answers), protocol, questions)
    follows = scoring.follows_format
    return {
        item.question_id: Judged(item, text, value, None if follows is None else follows(item, text))
        for item, text, value in zip(items, given, scoring.score(items, given), strict=True)
    }


def _read(
    dataset: str, annotations: Sequence[str | Path], answers: Path, protocol: str, questions: str | None
) -> tuple[list[Item], list[str], int, int, int]:
    """Read the questions to score and their answers, and the numbers of skipped, missing and uncounted ones."""
    spec = find_dataset(dataset, protocol)
    scoring = spec.scoring(protocol)
    left_out = read_skipped(answers)
    files = Files([Path(folder) for folder in annotations], dataset, {record.index for record in left_out})
    items = spec.load(files, questions or spec.questions_in(files))
    skipped = {str(record.question_id) for record in left_out if record.question_id is not None}
    items, given, missing, uncounted = pair_answers(
        dataset, items, answers, scoring.pairing, skipped=skipped, missing_scores_zero=spec.missing_scores_zero
    )
    if not items:
        raise ValueError(f"{answers}: {dataset} has no question to score")
    return items, given, len(left_out), missing, uncounted


def skipped_path(answers: Path) -> Path:
    """Path of the list of questions that the evaluator left out (`--skip-broken`), beside the answers."""
    return answers.with_suffix(".skipped.jsonl")


def read_skipped(answers: Path) -> list[Skipped]:
    """Read the questions that were left out of an answers file."""
    path = skipped_path(answers)
    records = read_lines(path) if path.is_file() else ()
    return [Skipped(record["index"], record["question_id"], record["reason"]) for _, record in records]


def _percent(values: Sequence[float]) -> float | None:
    return 100 * sum(values) / len(values) if values else None


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
