"""What holds for every test: where kernels run, and memory that is never quietly zero."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is imported: Triton decides then
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none"))


@pytest.fixture(autouse=True)
def poison():
    """Fill fresh memory with NaN, so that reading what nobody wrote shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
