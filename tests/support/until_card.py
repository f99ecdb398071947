"""A pytest plugin, `-p until_card`: tests for a GPU run as on one, up to the moment when they ask for it.

What comes before that, imports, fixtures and arguments, must not fail for the first time where a card is paid for.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch

ASKED = ("Torch not compiled with CUDA enabled", "Found no NVIDIA driver", "No CUDA GPUs are available")

torch.cuda.is_available = lambda: True  # before the tests are collected, and Triton decides whether it interprets


def pytest_collection_finish() -> None:
    from smolora import cuda

    cuda.obstacle = lambda: None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.excinfo is not None and any(text in str(call.excinfo.value) for text in ASKED):
        report.outcome, report.longrepr, report.wasxfail = "skipped", None, "reason: asks for a card"
    return report
