"""AP, MAP, BWT and MIF by hand, and CoIN's ACC, MAA and BWT."""

from __future__ import annotations

import pytest

from smolora.evaluate.metrics import continual_metrics

TASKS = ["one", "two", "three"]
MATRIX = [[80.0], [70.0, 60.0], [50.0, 40.0, 90.0]]


def test_by_hand():
    figures = continual_metrics(TASKS, MATRIX, [[100.0], [90.0, 80.0], [60.0, 60.0, 90.0]])
    assert figures["AP"] == [80, 65, 60]
    assert figures["MAP"] == [80, 72.5, pytest.approx(205 / 3)]
    assert figures["BWT"] == [None, -10, -25]  # (70 - 80), ((50 - 80) + (40 - 60)) / 2
    assert figures["MIF"] == [100, 85, 70]
    assert list(figures) == ["AP", "MAP", "BWT", "MIF"]


def test_coin_by_hand():
    figures = continual_metrics(TASKS, MATRIX, convention="coin")
    assert figures == {
        "ACC": [80, 65, 60],
        "MAA": [80, 72.5, pytest.approx(205 / 3)],
        "BWT": [0, -5, pytest.approx(-50 / 3)],  # (70 - 80) / 2, ((50 - 80) + (40 - 60)) / 3
    }
    assert list(figures) == ["ACC", "MAA", "BWT"]


def test_coin_of_other_shapes():
    single = [[1.0, 2.0, 6.0]]
    assert continual_metrics(TASKS, single, convention="coin") == {"ACC": [3], "MAA": [None], "BWT": [None]}
    dirlora = continual_metrics(TASKS, single, method="dirlora", convention="coin")
    assert dirlora == {"ACC": [1, 1.5, 3], "MAA": [None] * 3, "BWT": [0] * 3}
    holes = [[80.0], [None, 60.0], [50.0, 40.0, None]]
    figures = continual_metrics(TASKS, holes, allow_missing=True, convention="coin")
    assert figures == {"ACC": [80, None, None], "MAA": [80, None, None], "BWT": [0, None, None]}


def test_unknown_convention():
    with pytest.raises(ValueError, match="convention must be one of 'cvit', 'coin', 'mllm-cl', got 'CoIN'"):
        continual_metrics(TASKS, MATRIX, convention="CoIN")


def test_without_mif():
    assert continual_metrics(TASKS, MATRIX)["MIF"] == [None] * 3


def test_single_row():
    figures = continual_metrics(TASKS, [[1.0, 2.0, 6.0]], [[10.0, 20.0, 30.0]])
    assert figures == {"AP": [3], "MAP": [None], "BWT": [None], "MIF": [20]}


@pytest.mark.parametrize(
    "matrix", [[[80, 60, 90]], [[80], [80, 60], [80, 60, 90]], [[80], [None, 60], [None, None, 90]]]
)
def test_an_adapter_a_task(matrix):
    figures = continual_metrics(TASKS, matrix, matrix, method="dirlora")
    expected = [80, 70, pytest.approx(230 / 3)]
    assert figures == {"AP": expected, "MAP": [None] * 3, "BWT": [None, 0, 0], "MIF": expected}


def test_missing_cells():
    holes = [[80.0], [70.0, None], [50.0, 40.0, 90.0]]
    with pytest.raises(ValueError, match=r"matrix: 1 cells are missing, the first is row 2, column 2 \(two\)"):
        continual_metrics(TASKS, holes)
    figures = continual_metrics(TASKS, holes, allow_missing=True)
    assert figures["AP"] == [80, None, 60] and figures["MAP"] == [80, None, None]
    assert figures["BWT"] == [None, -10, None]  # stage 3 needs a_22


def test_missing_stages():
    with pytest.raises(ValueError, match=r"3 cells are missing, the first is row 3, column 1 \(one\)"):
        continual_metrics(TASKS, MATRIX[:2])
    figures = continual_metrics(TASKS, MATRIX[:2], allow_missing=True)
    assert figures["AP"] == [80, 65, None] and figures["BWT"] == [None, -10, None]


def test_rows_that_end_early():
    short = [[80.0], [70.0], [50.0, 40.0, 90.0]]
    with pytest.raises(ValueError, match="matrix, row 2: must have 2 cells, got 1"):
        continual_metrics(TASKS, short)
    figures = continual_metrics(TASKS, short, [[90.0], [], [90.0] * 3], allow_missing=True)
    assert figures["AP"] == [80, None, 60] and figures["BWT"] == [None, -10, None]
    assert figures["MIF"] == [90, None, 90]
    with pytest.raises(ValueError, match="matrix, row 1: must have 1 cells, got 2"):
        continual_metrics(TASKS, [[80.0, 1.0], *MATRIX[1:]], allow_missing=True)


@pytest.mark.parametrize(
    ("tasks", "matrix", "mif", "match"),
    [
        ([], MATRIX, None, "tasks must be a list of names"),
        (["a", "a", "b"], MATRIX, None, "tasks must differ"),
        (TASKS, [], None, "matrix must be a list of rows"),
        (TASKS, [[1.0], [1.0]], None, "matrix, row 2: must have 2 cells, got 1"),
        (TASKS, [[1.0], [1.0, "x"]], None, r"matrix, row 2, column 2 \(two\): must be a number, got 'x'"),
        (TASKS, [[True]], None, "must be a number, got True"),
        (TASKS, [[float("nan")]], None, "must be a number, got nan"),
        (TASKS, [*MATRIX, [1.0] * 4], None, "matrix has 4 rows for 3 tasks"),
        (TASKS, MATRIX, [[1.0], [2.0]], "mif, row 2: must have 2 cells"),
        (TASKS, [[1.0] * 3], MATRIX, "mif must have as many rows as matrix, 1, got 3"),
    ],
)
def test_bad_input_is_named(tasks, matrix, mif, match):
    with pytest.raises(ValueError, match=match):
        continual_metrics(tasks, matrix, mif)
