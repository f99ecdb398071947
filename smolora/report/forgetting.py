"""Forgetting in its two kinds: the form of the answer, and what the answer says.

A question counts as learned if its answer scores after the task's own stage. At the end of the run it is in one of four
cells: whether the answer still has the form that was asked for, and whether its content is still right. The content is
right if the answer keeps at least half of its score (accuracies are 0 or 1 for most tasks, captions have a CIDEr of
their own), or if it has another form and `holds_content` finds the reference in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ..data.format import read_questions
from ..evaluate.benchmarks import find_dataset
from ..evaluate.datasets import Scoring
from ..evaluate.rules import LETTERS, Item
from ..evaluate.score import Judged, judge
from .csv_files import write_csv
from .layout import RunFolder
from .tables import Cells, Table

KEPT_SHARE = 0.5  # of its score after the task's own stage, for an answer to count as still right
COMMON = {"a", "an", "and", "at", "by", "for", "from", "in", "is", "it", "its", "of", "on", "or", "the", "to", "with"}


class Fate(NamedTuple):
    """Numbers of questions of a task that were learned, by what became of them at the end of the run."""

    learned: int
    kept: int
    wrong_form: int  # still understood, but in the wrong form
    wrong_content: int  # in the right form, but wrong
    lost: int  # wrong in both


class Judge:
    """Judges the answers of a run, each file once.

    Args:
        run: the run, with its test sets where `results.json` says.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self._texts: dict[tuple[int, str], dict[str, str]] = {}
        self._judged: dict[tuple[int, str], dict[str, Judged]] = {}

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks whose files for scoring are known and there, under a protocol that judges the form as well."""
        having = [task for task in self.run.tasks if self._has_files(self.run.tests.get(task, {}))]
        return [task for task in having if self._scoring(task).follows_format is not None]

    def _scoring(self, task: str) -> Scoring:
        return find_dataset(self.run.tests[task]["dataset"], self.run.protocol).scoring(self.run.protocol)

    def _has_files(self, test: dict) -> bool:
        return bool(test.get("annotations")) and all(
            path.exists() for path in (self._path(test["questions"]), *map(self._path, test["annotations"]))
        )

    def _path(self, name: str) -> Path:
        return self.run.folder / name

    def texts(self, stage: int, task: str) -> dict[str, str]:
        """The answers to a task after a stage, by question id; empty where there are none."""
        if (stage, task) not in self._texts:
            known = self.run.answers_file(stage, task).is_file()
            self._texts[stage, task] = self.run.answers(stage, task) if known else {}
        return self._texts[stage, task]

    def answers(self, stage: int, task: str) -> dict[str, Judged]:
        """The judged answers to a task after a stage, by question id; empty without answers or files for scoring.

        Raises:
            ValueError: a file is malformed, or answers and questions do not match.
        """
        answers = self.run.answers_file(stage, task)
        if task not in self.tasks or not answers.is_file():
            return {}
        if (stage, task) not in self._judged:
            test = self.run.tests[task]
            folders = list(map(self._path, test["annotations"]))
            questions = Path(test["questions"]).name
            self._judged[stage, task] = judge(test["dataset"], folders, answers, self.run.protocol, questions)
        return self._judged[stage, task]

    def fate(self, task: str) -> Fate | None:
        """What became of a task's questions; None for a task that was learned last, or cannot be judged."""
        own, last = self.run.own_stage(task), len(self.run.stages) - 1
        before, after = self.answers(own, task), self.answers(last, task)
        if own == last or not before or not after:
            return None
        test = self.run.tests[task]
        questions = {str(q.question_id): q.text for q in read_questions(self._path(test["questions"]), broken=[])}
        caption = self._scoring(task).metric.startswith("cider")
        counts = {(form, content): 0 for form in (True, False) for content in (True, False)}
        for name, then in before.items():
            now = after.get(name)
            if now is None or not then.score:
                continue
            right = (now.score or 0) >= KEPT_SHARE * then.score
            if not right and not now.follows_format:
                right = holds_content(now.item, now.text, questions.get(name, ""), caption=caption)
            counts[bool(now.follows_format), right] += 1
        return Fate(
            sum(counts.values()), counts[True, True], counts[False, True], counts[True, False], counts[False, False]
        )


def holds_content(item: Item, text: str, question: str, *, caption: bool) -> bool:
    """Return whether an answer in the wrong form still says what was asked for.

    A multiple choice is answered by the text of the right option, or by its letter before no other word ("A dog" names
    none). A caption holds its
    content if every word of it, but for articles and the like, is in one of the references. Any other answer holds it
    if it has a reference's words one after the other.

    Args:
        item: the question with its references.
        text: the answer.
        question: the question as it was asked, with the options of a multiple choice in lines such as "B. a dog".
        caption: whether a caption was asked for.
    """
    words = _words(text)
    if caption:
        known = {word for reference in item.references for word in _words(reference)}
        said = set(words) - COMMON
        return bool(said) and said <= known
    if item.choices:
        letter = item.references[0]
        options = dict(re.findall(rf"^\(?([{LETTERS}])[.):]\s*(.+)$", question, re.MULTILINE))
        return re.search(rf"\b{letter}\b(?!\s+\w)", text) is not None or _has_run(
            words, _words(options.get(letter, ""))
        )
    return any(_has_run(words, _words(reference)) for reference in item.references)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _has_run(words: Sequence[str], wanted: Sequence[str]) -> bool:
    """Return whether `wanted`, which is not empty, occurs in `words` without a gap."""
    size = len(wanted)
    return size > 0 and any(words[i : i + size] == wanted for i in range(len(words) - size + 1))


def forgetting_table(path: Path, judges: Sequence[Judge]) -> Table | None:
    """The fates of each task's questions in each run, also written as CSV; None where nothing can be judged.

    Raises:
        ValueError: see `Judge.answers`.
    """
    header = ["run", "task", "learned", "kept", "understood, wrong form", "right form, wrong", "wrong in both"]
    rows: list[Cells] = []
    for judge_ in judges:
        for task in judge_.run.tasks:
            fate = judge_.fate(task)
            if fate is not None and fate.learned:
                rows.append([judge_.run.name, task, *map(str, fate)])
    if not rows:
        return None
    write_csv(path, header, rows)
    return Table(header, rows)
