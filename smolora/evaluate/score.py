"""Score a file of answers with the dataset's metric and MIF."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..data.format import Skipped, read_answers, read_lines
from .datasets import Files, find_dataset


@dataclass(frozen=True)
class Score:
    """The score of an answers file. Figures are in percent and unrounded; CIDEr is 100 times its 0 to 10."""

    dataset: str
    protocol: str
    metric: str
    score: float
    mif: float
    count: int  # number of questions that the score averages
    groups: dict[str, float | None] = field(default_factory=dict)  # score of each group; None for an empty one
    extra_metrics: dict[str, float] = field(default_factory=dict)  # by name
    skipped: int = 0  # questions left out because they could not be answered
    missing: int = 0  # questions without an answer, counted as wrong

    def as_dict(self) -> dict[str, str | float | int | None]:
        """The score as `smolora score --json` prints it."""
        content = {name: getattr(self, name) for name in ("dataset", "protocol", "metric", "score", "mif", "count")}
        return content | self.groups | ({"skipped": self.skipped} if self.skipped else {})

    def __str__(self) -> str:
        figures = [
            f"{self.metric} {self.score:.2f}",
            *(f"{n} {_two(v)}" for n, v in (self.groups | self.extra_metrics).items()),
        ]
        figures += [f"MIF {self.mif:.2f}", f"{self.count} answers"]
        figures += [f"{self.missing} of them missing, counted as wrong"] * bool(self.missing)
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


def score(dataset: str, annotations: Sequence[str | Path], answers: str | Path, protocol: str = "smolora") -> Score:
    """Score an answers file.

    Args:
        dataset: a name of `DATASETS`.
        annotations: folders with the dataset's files, searched with their subfolders named after the dataset.
        answers: JSON lines with `question_id` and `text`, in any order. The questions listed in the file
            `skipped_path` are left out.
        protocol: "smolora" (comparable with the paper's tables) or "standard" (the metric as the field defines it).

    Raises:
        ValueError: a file is missing or malformed, or answers and questions do not match. The message names file and
            line or record.
    """
    spec = find_dataset(dataset)
    scoring = spec.scoring(protocol)
    answers = Path(answers)
    left_out = read_skipped(answers)
    files = Files([Path(folder) for folder in annotations], dataset, {record.index for record in left_out})
    items = spec.load(files, spec.questions)
    texts = {str(answer.question_id): answer for answer in read_answers(answers)}
    known = {item.question_id for item in items}
    for question_id, answer in texts.items():
        if question_id not in known:
            raise ValueError(f"{answers}: line {answer.line}: {dataset} has no question {question_id}")
    # ScienceQA's items come from another file than its questions, so they are left out by id
    ids = {str(record.question_id) for record in left_out if record.question_id is not None} - texts.keys()
    items = [item for item in items if item.question_id not in ids]
    missing = [item.question_id for item in items if item.question_id not in texts]
    if missing and not spec.missing_scores_zero:
        raise ValueError(
            f"{answers}: no answer to {len(missing)} of {len(items)} questions of {dataset}, the first is {missing[0]}"
        )
    if not items:
        raise ValueError(f"{answers}: {dataset} has no question to score")
    given = [texts[item.question_id].text if item.question_id in texts else "" for item in items]
    scores = scoring.score(items, given)
    counted = [value for value in scores if value is not None]
    if not counted:
        raise ValueError(f"{answers}: none of the {len(items)} questions of {dataset} counts")
    one_reference = all(len(item.references) == 1 for item in items)
    return Score(
        dataset=dataset,
        protocol=protocol,
        metric=scoring.single_reference_metric if scoring.single_reference_metric and one_reference else scoring.metric,
        score=_percent(counted),
        mif=_percent([scoring.follows_format(item, text) for item, text in zip(items, given, strict=True)]),
        count=len(counted),
        groups={
            group: _percent([value for item, value in zip(items, scores, strict=True) if item.group == group])
            for group in scoring.groups
        },
        extra_metrics={name: _percent(metric(items, given)) for name, metric in scoring.extra_metrics.items()},
        skipped=len(left_out),
        missing=len(missing),
    )


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
