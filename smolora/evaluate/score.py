"""From a file of answers to the dataset's metric and to MIF."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..data.format import Skipped, read_answers, read_lines
from .datasets import Files, find_dataset


@dataclass(frozen=True)
class Score:
    """What one answers file is worth; figures in percent, unrounded (CIDEr: 100 times its 0 to 10)."""

    dataset: str
    protocol: str
    metric: str
    score: float
    mif: float
    count: int  # questions that the score is the mean of
    groups: dict[str, float | None] = field(default_factory=dict)  # the score of each; None: no question is in it
    further: dict[str, float] = field(default_factory=dict)  # other metrics
    skipped: int = 0  # left out since they could not be asked
    missing: int = 0  # without an answer, which is wrong

    def as_dict(self) -> dict[str, str | float | int | None]:
        """What `smolora score --json` prints."""
        content = {name: getattr(self, name) for name in ("dataset", "protocol", "metric", "score", "mif", "count")}
        return content | self.groups | ({"skipped": self.skipped} if self.skipped else {})

    def __str__(self) -> str:
        figures = [
            f"{self.metric} {self.score:.2f}",
            *(f"{n} {_two(v)}" for n, v in (self.groups | self.further).items()),
        ]
        figures += [f"MIF {self.mif:.2f}", f"{self.count} answers"]
        figures += [f"{self.missing} of them missing, counted as wrong"] * bool(self.missing)
        figures += [f"{self.skipped} skipped"] * bool(self.skipped)
        return f"{self.dataset} (protocol {self.protocol}): " + ", ".join(figures)

    @property
    def remark(self) -> str | None:
        """What a reader of the figures should know, if anything."""
        if self.count == 1 and self.metric.startswith("cider"):
            return (
                f"{self.dataset}: CIDEr weighs an n-gram by how few of the pictures have it, so that of a single "
                "picture it is 0 whatever the caption says"
            )
        return None

    def show(self) -> None:
        """Print the figures, and to stderr what a reader of them should know."""
        print(self, flush=True)
        self.show_remark()

    def show_remark(self) -> None:
        """Print to stderr what a reader of the figures should know, if anything."""
        if self.remark is not None:
            print(self.remark, file=sys.stderr, flush=True)


def score(dataset: str, annotations: Sequence[str | Path], answers: str | Path, protocol: str = "smolora") -> Score:
    """Score an answers file.

    Args:
        dataset: a name of `DATASETS`.
        annotations: folders with the dataset's files; each is searched, and its subfolder of the dataset's name.
        answers: JSON lines with `question_id` and `text`, in any order. Questions listed in a file `skipped_path` are
            left out.
        protocol: "smolora" (comparable with the paper's tables) or "standard" (what the field calls the metric).

    Raises:
        ValueError: a file is missing or malformed, or the answers are not those to the questions; the message names
            file and line or record.
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
    # ScienceQA's questions come from another file, where they are known by their ids alone
    ids = {str(record.question_id) for record in left_out if record.question_id is not None} - texts.keys()
    items = [item for item in items if item.question_id not in ids]
    missing = [item.question_id for item in items if item.question_id not in texts]
    if missing and not spec.missing_is_wrong:
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
        metric=scoring.metric_of_one if scoring.metric_of_one and one_reference else scoring.metric,
        score=_percent(counted),
        mif=_percent([scoring.follows(item, text) for item, text in zip(items, given, strict=True)]),
        count=len(counted),
        groups={
            group: _percent([value for item, value in zip(items, scores, strict=True) if item.group == group])
            for group in scoring.groups
        },
        further={name: _percent(metric(items, given)) for name, metric in scoring.further.items()},
        skipped=len(left_out),
        missing=len(missing),
    )


def skipped_path(answers: Path) -> Path:
    """Where the evaluator lists the questions that it could not ask (`--skip-broken`), beside the answers."""
    return answers.with_suffix(".skipped.jsonl")


def read_skipped(answers: Path) -> list[Skipped]:
    """The questions that were left out of an answers file; none where it has no such list."""
    path = skipped_path(answers)
    records = read_lines(path) if path.is_file() else ()
    return [Skipped(record["index"], record["question_id"], record["reason"]) for _, record in records]


def _percent(values: Sequence[float]) -> float | None:
    return 100 * sum(values) / len(values) if values else None


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
