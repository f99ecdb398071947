"""The continual-learning figures of a run after each stage, from its accuracy matrix.

AP, MAP, BWT and MIF are Eq. 10 to 12. ACC, MAA and BWT are CoIN's. MFT, MFN, MAA and BWT are MLLM-CL's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..arguments import check_choice, is_number

Row = Sequence[float | None]
Figures = dict[str, list[float | None]]

FIGURES = ("AP", "MAP", "BWT", "MIF")
COIN_FIGURES = ("ACC", "MAA", "BWT")
MLLM_CL_FIGURES = ("MFT", "MFN", "MAA", "BWT")
CONVENTIONS = ("cvit", "coin", "mllm-cl")


def continual_metrics(
    tasks: Sequence[str],
    matrix: Sequence[Row],
    mif: Sequence[Row] | None = None,
    *,
    method: str | None = None,
    allow_missing: bool = False,
    convention: str = "cvit",
) -> Figures:
    """AP, MAP, BWT (Eq. 10 and 11) and MIF (Eq. 12) after each stage, or CoIN's or MLLM-CL's figures.

    Args:
        tasks: names of the n tasks, in the order of training.
        matrix: one row per stage. Row k holds a_k1 to a_kk, the accuracies of the tasks seen so far. A single row of
            all n is one evaluation: zero-shot, multitask, or a downstream table.
        mif: instruction following, with the matrix's shape; without it every MIF is None.
        method: "dirlora" for one adapter per task. Then a_kj is a_jj, so only the last cell of each row is read (or the
            single row), there is no MAP, and BWT is 0.
        allow_missing: cells may be None, rows may end early and stages may be missing. Every figure that needs such a
            cell is None.
        convention: "cvit" for AP, MAP, BWT and MIF; "coin" for ACC, MAA and BWT; "mllm-cl" for MFT, MFN, MAA and BWT.
            ACC and MFN are AP, and MAA is MAP. CoIN's BWT after stage k is a mean over all k tasks, the last of which
            cannot have changed, so it is (k - 1) / k times the other. MFT after stage k is the mean of a_11 to a_kk,
            each task's accuracy after its own stage. `mif` is read for "cvit" alone.

    Returns:
        One entry per stage under each name. After the first stage BWT is None, and 0 in CoIN's. A single row has
        neither MAP (MAA) nor BWT nor MFT.

    Raises:
        ValueError: the input has another shape, or cells are missing. The message names row and column.
    """
    if not isinstance(tasks, (list, tuple)) or not tasks or not all(isinstance(task, str) for task in tasks):
        raise ValueError(f"tasks must be a list of names, got {tasks!r}")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks must differ, got {list(tasks)}")
    check_choice("convention", convention, CONVENTIONS)
    coin = convention == "coin"
    accuracy = _rows("matrix", matrix, tasks, method, allow_missing)
    following = (
        _rows("mif", mif, tasks, method, allow_missing)
        if mif is not None and convention == "cvit"
        else [[None]] * len(accuracy)
    )
    if len(following) != len(accuracy):
        raise ValueError(f"mif must have as many rows as matrix, {len(accuracy)}, got {len(following)}")
    ap = [_mean(row) for row in accuracy]
    figures: Figures = {"AP": ap, "MIF": [_mean(row) for row in following]}
    stages = range(len(ap))
    if _is_single(accuracy, tasks):
        figures |= {"MAP": [None], "BWT": [None]}
    elif method == "dirlora":
        figures |= {"MAP": [None for _ in stages], "BWT": [0.0 if k or coin else None for k in stages]}
    else:
        figures["MAP"] = [_mean(ap[: k + 1]) for k in stages]
        changes = [[_minus(row[j], accuracy[j][j]) for j in range(k + coin)] for k, row in enumerate(accuracy)]
        figures["BWT"] = [_mean(of_stage) if of_stage else None for of_stage in changes]
    if convention == "mllm-cl":
        own = [None] if _is_single(accuracy, tasks) else [accuracy[k][k] for k in stages]
        figures |= {"MFT": [_mean(own[: k + 1]) for k in stages], "MFN": figures["AP"], "MAA": figures["MAP"]}
        return {name: figures[name] for name in MLLM_CL_FIGURES}
    if coin:
        return dict(zip(COIN_FIGURES, (figures["AP"], figures["MAP"], figures["BWT"]), strict=True))
    return {name: figures[name] for name in FIGURES}


def _rows(
    name: str, rows: Any, tasks: Sequence[str], method: str | None, allow_missing: bool
) -> list[list[float | None]]:
    """Check the rows and convert them to floats. With one adapter per task, fill them from the diagonal."""
    if not isinstance(rows, (list, tuple)) or not rows or not all(isinstance(row, (list, tuple)) for row in rows):
        raise ValueError(f"{name} must be a list of rows, got {rows!r}")
    if method not in (None, "dirlora"):
        raise ValueError(f"method must be 'dirlora' or left out, got {method!r}")
    n = len(tasks)
    if len(rows) > n:
        raise ValueError(f"{name} has {len(rows)} rows for {n} tasks")
    single = _is_single(rows, tasks)
    lengths = [n] if single else list(range(1, n + 1))
    for k, (row, length) in enumerate(zip(rows, lengths, strict=False), 1):
        if len(row) > length or (len(row) < length and not allow_missing):
            raise ValueError(f"{name}, row {k}: must have {length} cells, got {len(row)}")
        for j, cell in enumerate(row, 1):
            if cell is not None and not is_number(cell):
                raise ValueError(f"{name}, row {k}, column {j} ({tasks[j - 1]}): must be a number, got {cell!r}")
    if method == "dirlora":
        diagonal = rows[0] if single else [row[k] if k < len(row) else None for k, row in enumerate(rows)]
        rows, lengths = [diagonal[:k] for k in range(1, len(diagonal) + 1)], list(range(1, n + 1))
    # missing stages and the missing ends of rows become cells of None
    there = [*rows, *[()] * (len(lengths) - len(rows))]
    filled = [[*row, *[None] * (length - len(row))] for row, length in zip(there, lengths, strict=True)]
    missing = [
        f"row {k}, column {j} ({tasks[j - 1]})"
        for k, row in enumerate(filled, 1)
        for j, cell in enumerate(row, 1)
        if cell is None
    ]
    if missing and not allow_missing:
        raise ValueError(f"{name}: {len(missing)} cells are missing, the first is {missing[0]}; see --allow-missing")
    return [[None if cell is None else float(cell) for cell in row] for row in filled]


def _is_single(rows: Sequence[Row], tasks: Sequence[str]) -> bool:
    return len(rows) == 1 and len(rows[0]) == len(tasks) > 1


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) else None


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
