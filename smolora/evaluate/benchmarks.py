"""The test sets by name, for each protocol: CVIT's ten, CoIN's eight, UCIT's six and MLLM-DCL's five."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import lru_cache

from ..arguments import check_choice
from ..data.own import own_parts
from .coin import COIN_DATASETS
from .datasets import DATASETS, PROTOCOLS, Dataset
from .mcit import MCIT_DATASETS
from .own import own_dataset

BENCHMARKS: tuple[Mapping[str, Dataset], ...] = (DATASETS, COIN_DATASETS, MCIT_DATASETS)


def datasets_of(protocol: str | None = None) -> dict[str, Dataset]:
    """The datasets that a protocol scores, by name; None for all of them, CVIT's where both benchmarks have a name.

    Raises:
        ValueError: there is no such protocol.
    """
    if protocol is not None:
        check_choice("protocol", protocol, PROTOCOLS)
    found: dict[str, Dataset] = {}
    for benchmark in BENCHMARKS:
        for name, dataset in benchmark.items():
            if name not in found and (protocol is None or getattr(dataset, protocol) is not None):
                found[name] = dataset
    return found


def find_dataset(name: str, protocol: str | None = None) -> Dataset:
    """Find a dataset by name, among those that a protocol scores. Any protocol scores a task of one's own.

    Raises:
        ValueError: there is none. The message has the nearest name and all of them.
    """
    own = _own(name)
    if own is not None:
        return own
    known = datasets_of(protocol)
    if name not in known:
        near = difflib.get_close_matches(name.lower(), {other.lower(): other for other in known}, n=1, cutoff=0.5)
        hint = "".join(f"; did you mean {other}?" for other in known if other.lower() in near)
        under = [other for other in PROTOCOLS if protocol is not None and name in datasets_of(other)]
        hint = f"; it is scored under {' and '.join(map(repr, under))}" if under else hint
        which = "" if protocol is None else f" under protocol {protocol!r}"
        raise ValueError(f"dataset must be one of {', '.join(known)}{which}, got {name!r}{hint}")
    return known[name]


@lru_cache(maxsize=64)  # a format's schema and a function's file are read once
def _own(name: str) -> Dataset | None:
    parts = own_parts(name)
    return None if parts is None else own_dataset(*parts)


def question_files(name: str) -> set[str] | None:
    """File names that a dataset's questions have: CVIT's and CoIN's. None for any, of a task of one's own."""
    if find_dataset(name).any_file_name:
        return None
    return {benchmark[name].questions for benchmark in BENCHMARKS if name in benchmark}
