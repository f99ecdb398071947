"""What needs a GPU runs as on a machine with one, up to the moment when it asks the driver for it.

    python until_card.py -m pytest ...      tests; those that get so far are reported as skipped
    python until_card.py PROGRAM ...        a program

What comes before, imports, fixtures and arguments, should not fail for the first time where a card is paid for.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

ASKED = ("Torch not compiled with CUDA enabled", "Found no NVIDIA driver", "No CUDA GPUs are available")

torch.cuda.is_available = lambda: True  # before tests are collected, and before Triton decides whether it interprets


def asked(error: BaseException) -> bool:
    """Whether an error is what torch says to a program that asks for a GPU where there is none."""
    return any(text in str(error) for text in ASKED)


def pytest_collection_finish() -> None:
    from smolora.engine import cuda_build as cuda

    if cuda.extension is not None:
        cuda.unavailable_reason = lambda: None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    if call.excinfo is not None and asked(call.excinfo.value):
        skipped = pytest.skip.Exception("asks for a card")
        call.excinfo = pytest.ExceptionInfo.from_exc_info((type(skipped), skipped, call.excinfo.tb))


if __name__ == "__main__":
    if sys.argv[1:3] == ["-m", "pytest"]:
        sys.exit(pytest.main([*sys.argv[3:], "-p", "support.until_card"]))
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except Exception as error:
        if not asked(error):
            raise
        print("asks for a card")
