"""Runs functions in a process of its own, in which Triton's kernels are compiled rather than interpreted.

Triton decides that when it is imported, and the other tests' process interprets.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any, TypeVar
from unittest import mock

import torch

Result = TypeVar("Result")


@cache
def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_prepare)


def _prepare() -> None:
    """Fill fresh memory with NaN, as tests/conftest.py does."""
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)


def run(function: Callable[..., Result], *arguments: Any, **keywords: Any) -> Result:
    """Call a function of an importable module there; what it raises is raised here."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="0"):  # for the process that the first call starts
        pending = _pool().submit(function, *arguments, **keywords)
    return pending.result()
