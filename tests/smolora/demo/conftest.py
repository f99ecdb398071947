"""Two small finished runs over one base, to ask on."""

from __future__ import annotations

from pathlib import Path

import pytest

from smolora.demo.runs import DemoRun, open_runs


@pytest.fixture(scope="session")
def folders(two_runs: list[Path]) -> list[Path]:
    """The folders of two runs of two tasks."""
    return two_runs


@pytest.fixture(scope="session")
def runs(folders: list[Path]) -> list[DemoRun]:
    return open_runs(folders)
