"""Answers to score: the golden files of the released scorers, and small trees of files."""

from __future__ import annotations

import json
from pathlib import Path

from smolora.evaluate.rules import Item
from smolora.evaluate.score import Score, score

GOLDEN = Path(__file__).parents[2] / "golden" / "eval"


def golden(dataset: str, protocol: str = "smolora") -> Score:
    """The score of a dataset's golden answers."""
    return score(dataset, [GOLDEN / dataset], GOLDEN / dataset / "answers.jsonl", protocol)


def write_lines(path: Path, records: list[dict]) -> Path:
    """Write a JSON-lines file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def vqa_files(folder: Path, answers: list[str], texts: list[str]) -> Path:
    """A VQAv2 tree with these answers in its question file, and a file with these texts."""
    folder.mkdir(exist_ok=True)
    questions = [
        {"question_id": i, "text": "q\ni", "image": "x.jpg", "answer": answer} for i, answer in enumerate(answers)
    ]
    (folder / "val.json").write_text(json.dumps(questions))
    return write_lines(folder / "answers.jsonl", [{"question_id": i, "text": text} for i, text in enumerate(texts)])


def correct(rule, answer: str, text: str, **item) -> float:
    """What a rule gives for a text beside one answer."""
    return rule(Item("0", answer, (answer,), **item), text)
