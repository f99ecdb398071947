"""Runs to report on, and the CSV files of a report."""

from __future__ import annotations

import csv
from pathlib import Path

MATRIX = [[80.0], [70.0, 60.0], [50.0, 40.0, 150.0]]
TASKS = ["ScienceQA", "TextVQA", "Flickr30k"]


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
