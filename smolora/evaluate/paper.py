"""The figures of the SMoLoRA paper (ICCV 2025, Tables 1 to 7), and a check of where its tables disagree.

All figures are in percent as printed. Accuracies of captions are CIDEr. `disagreements()` recomputes every figure that
follows from others, and `python -m smolora.evaluate.paper` prints the result:

- Table 1, single-type, SeqLoRA, VQAv2: 64.61, but 64.37 in Table 5; so its AP is 46.21, but 46.17 by Table 5.
- Table 1, multi-type, EWC: AP 43.10, but 43.04 by its own accuracies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .metrics import FIGURES, continual_metrics

UPSTREAM = ("ScienceQA", "TextVQA", "Flickr30k", "ImageNet", "GQA", "VQAv2")
ZERO_SHOT = ("VizWiz", "TextCaps", "OCRVQA")
FEW_SHOT = ("Places365, 5-shot", "Places365, 10-shot")


class Row(NamedTuple):
    """A method's row of a table: accuracies and the figures beside them; None for a figure that is not printed."""

    accuracy: tuple[float, ...]
    AP: float
    MAP: float | None
    BWT: float | None
    MIF: float | None


def _rows(table: str) -> dict[str, Row]:
    """Parse a table: a method and its accuracies, AP, MAP, BWT and MIF in each line."""
    rows = {}
    for line in table.strip().splitlines():
        method, *cells = line.split()
        values = [None if cell == "-" else float(cell) for cell in cells]
        rows[method] = Row(tuple(values[:-4]), *values[-4:])
    return rows


TABLE_1 = {  # upstream tasks after the last stage
    "single": _rows(
        """
        Multitask  83.49  61.93  169.21  96.53  60.07  65.80  89.51      -       -  98.38
        Zero-shot  52.72   2.95   52.64  22.10   2.73   0.65  22.30      -       -  17.84
        DirLoRA    83.75  60.66  164.20  96.71  58.55  64.93  88.13      -    0.00  98.41
        SeqLoRA    55.31  50.22   33.89  22.73  50.52  64.61  46.21  57.41  -48.10  78.35
        MoeLoRA    55.01  48.87   32.04  22.00  50.03  63.64  45.27  56.16  -48.05  79.97
        DoRA       51.26  46.36   36.41  28.24  45.29  56.87  44.07  65.03  -31.12  78.59
        C-LoRA     57.25  38.70   56.50  25.27  42.89  54.06  45.78  57.04  -19.58  65.84
        Replay     75.61  47.58   31.97  35.84  48.51  58.67  49.70  69.78  -22.71  82.06
        EWC        57.04  50.02   32.96  22.85  50.16  64.54  46.26  56.19  -49.71  78.90
        EWC+TIR    72.22  44.78   34.54  25.98  46.86  58.73  47.19  67.21  -25.64  81.62
        Eproj      65.29  52.87  148.19  39.45  28.06  57.86  65.29  73.53  -14.02  89.81
        SMoLoRA    77.36  58.29  151.99  95.35  51.96  65.71  83.44  84.85   -3.23  97.79
        """
    ),
    "multi": _rows(
        """
        Multitask  82.83  61.27  175.97  96.44  59.67  65.80  90.33      -       -      -
        Zero-shot  51.85   5.11   44.05  20.34   2.37   1.16  20.81      -       -  19.45
        DirLoRA    83.85  60.51  164.66  96.71  57.93  64.90  88.09      -    0.00  98.31
        SeqLoRA    59.21  50.80   20.99  20.30  49.98  64.41  44.28  53.75  -48.73  79.47
        MoeLoRA    58.09  53.30   22.82  22.61  51.80  65.15  45.63  54.88  -49.94  78.19
        DoRA       52.03  47.37   27.97  26.18  46.05  57.33  42.82  56.24  -34.11  78.30
        C-LoRA     55.58  38.64   59.05  22.81  40.93  51.65  44.78  52.37  -18.83  70.01
        Replay     66.06  47.78   24.21  25.66  46.53  58.59  44.81  66.68  -26.88  80.38
        EWC        53.60  49.07   20.38  20.48  50.11  64.63  43.10  53.94  -52.47  78.18
        EWC+TIR    66.94  45.76   29.49  21.68  46.90  58.80  44.93  64.51  -26.38  80.56
        Eproj      63.45  53.18  151.41  20.63  45.30  57.32  65.22  72.10  -14.43  89.93
        SMoLoRA    80.50  58.30  146.63  94.28  52.42  65.96  83.02  85.05   -6.50  98.12
        """
    ),
}
TABLE_2 = {  # zero-shot on three datasets
    "single": _rows(
        """
        SeqLoRA  27.69   9.73  30.97  22.80  -  -  61.58
        MoeLoRA  29.64   8.74  30.27  22.88  -  -  60.11
        Replay   29.54   7.52  37.78  24.95  -  -  61.10
        DoRA     29.03   9.45  37.14  25.21  -  -  61.98
        SMoLoRA  32.72  30.97  39.37  34.35  -  -  90.94
        """
    ),
    "multi": _rows(
        """
        SeqLoRA  22.27   7.10  31.06  20.14  -  -  61.09
        MoeLoRA  26.30   7.13  32.55  21.99  -  -  61.28
        Replay   24.70   8.32  38.18  23.73  -  -  61.33
        DoRA     26.16   8.83  38.08  24.36  -  -  61.59
        SMoLoRA  27.46  25.28  39.86  30.87  -  -  85.76
        """
    ),
}
TABLE_3 = {  # few-shot on Places365
    "single": _rows(
        """
        SeqLoRA  13.15  12.34  12.75  -  -   99.90
        MoeLoRA  18.58  21.38  19.98  -  -   99.82
        Replay   17.80  21.02  19.41  -  -   99.87
        DoRA     28.30  30.53  29.42  -  -  100.00
        SMoLoRA  36.95  43.68  40.32  -  -  100.00
        """
    ),
    "multi": _rows(
        """
        SeqLoRA  17.82  17.98  17.90  -  -   99.90
        MoeLoRA  10.56  11.12  10.84  -  -    2.98
        Replay   17.38  22.34  19.86  -  -   99.92
        DoRA     29.55  32.24  30.90  -  -  100.00
        SMoLoRA  37.00  43.40  40.20  -  -  100.00
        """
    ),
}
TABLE_4 = _rows(  # single-type ablation of visual understanding, instruction following and adaptive fusion
    """
    none      46.21  57.41  -48.10  78.35
    VU        53.49  67.84  -33.06  80.12
    IF        71.97  79.56  -17.42  98.38
    VU+IF     75.16  78.72  -10.99  97.43
    VU+IF+AF  83.44  84.85   -3.23  97.79
    """
)
TABLE_5 = {  # accuracy matrix of SeqLoRA, one row per stage
    "single": [
        [83.75],
        [66.21, 49.95],
        [68.78, 19.35, 166.33],
        [43.9, 0.05, 0.26, 95.45],
        [53.29, 34.74, 25.76, 11.84, 57.69],
        [55.31, 50.22, 33.89, 22.73, 50.52, 64.37],
    ],
    "multi": [
        [83.85],
        [69.18, 50.24],
        [51.38, 0.0, 156.85],
        [37.77, 0.01, 0.13, 95.98],
        [53.01, 33.78, 3.77, 10.18, 58.01],
        [59.21, 50.8, 20.99, 20.3, 49.98, 64.41],
    ],
}
TABLE_6 = {  # accuracy matrix of SMoLoRA, one row per stage
    "single": [
        [83.85],
        [80.71, 61.05],
        [81.99, 61.2, 150.72],
        [73.8, 51.9, 140.71, 96.28],
        [74.98, 44.87, 137.08, 95.45, 59.19],
        [77.36, 58.29, 151.99, 95.35, 51.96, 65.71],
    ],
    "multi": [
        [84.53],
        [80.71, 61.24],
        [81.58, 60.24, 162.78],
        [74.44, 44.28, 136.92, 96.14],
        [78.09, 45.31, 133.03, 95.09, 59.96],
        [80.5, 58.3, 146.63, 94.28, 52.42, 65.96],
    ],
}
TABLE_7 = {  # MiniGPT-4, upstream tasks after the last stage
    "single": _rows(
        """
        Zero-shot  41.10   0.00    0.03  26.32   0.00   0.00  11.24      -     -   0.96
        SeqLoRA    54.56  36.18  134.83  38.93  40.85  34.16  56.59  56.78  9.22  58.42
        SMoLoRA    54.16  38.61  135.60  48.46  44.11  48.35  61.55  62.05  3.39  76.40
        """
    ),
    "multi": _rows(
        """
        Zero-shot  42.72   0.00    0.01  26.83   0.00   0.00  11.59      -      -   1.18
        SeqLoRA    54.61  34.24  116.09  30.32  40.65  28.91  50.80  51.76  -2.37  54.49
        SMoLoRA    57.72  39.60  112.43  43.27  44.65  38.43  56.02  60.67   1.84  75.39
        """
    ),
}

# the table of upstream tasks after the last stage that each benchmark's runs are beside, by a recipe's `benchmark`
UPSTREAM_TABLES = {"CVIT": TABLE_1, "CVIT, MiniGPT-4": TABLE_7}
MATRICES = {"Table 5": ("SeqLoRA", TABLE_5), "Table 6": ("SMoLoRA", TABLE_6)}

ROUNDING = 0.01  # both figures are rounded to two decimals


class Disagreement(NamedTuple):
    """A printed figure that differs from the same figure elsewhere in the paper."""

    where: str
    figure: str
    printed: float
    expected: float  # computed from other figures of the paper
    source: str  # those figures

    def __str__(self) -> str:
        return f"{self.where}, {self.figure}: {self.printed:.2f}, but {self.expected:.2f} by {self.source}"


def disagreements() -> list[Disagreement]:
    """Find every printed figure that other figures of the paper contradict by more than rounding."""
    found = []

    def compare(where: str, figure: str, printed: float | None, expected: float | None, source: str) -> None:
        if printed is not None and expected is not None and abs(printed - expected) > ROUNDING + 1e-9:
            found.append(Disagreement(where, figure, printed, expected, source))

    for name, tasks, table in (
        ("Table 1", UPSTREAM, TABLE_1),
        ("Table 2", ZERO_SHOT, TABLE_2),
        ("Table 3", FEW_SHOT, TABLE_3),
        ("Table 7", UPSTREAM, TABLE_7),
    ):
        for setting, rows in table.items():
            for method, row in rows.items():
                ap = continual_metrics(tasks, [row.accuracy])["AP"][0]
                compare(_where(name, setting, method), "AP", row.AP, ap, "its own accuracies")
    for name, (method, table) in MATRICES.items():
        for setting, matrix in table.items():
            row, where = TABLE_1[setting][method], _where("Table 1", setting, method)
            for task, printed, expected in zip(UPSTREAM, row.accuracy, matrix[-1], strict=True):
                compare(where, task, printed, expected, f"{name}'s last row")
            figures = continual_metrics(UPSTREAM, matrix)
            for figure in ("AP", "MAP", "BWT"):
                compare(where, figure, getattr(row, figure), figures[figure][-1], name)
    for modules, method in (("none", "SeqLoRA"), ("VU+IF+AF", "SMoLoRA")):
        ablation, row = TABLE_4[modules], TABLE_1["single"][method]
        for figure in FIGURES:
            compare(f"Table 4, {modules}", figure, getattr(ablation, figure), getattr(row, figure), "Table 1")
    return found


def disagreements_with(tasks: Sequence[str], matrix: Sequence[Sequence[float | None]]) -> list[Disagreement]:
    """Find the figures of Table 1 that disagree with a matrix of the paper (Tables 5 and 6)."""
    for method, table in MATRICES.values():
        for setting, printed in table.items():
            if tuple(tasks) == UPSTREAM and [list(row) for row in matrix] == printed:
                return [d for d in disagreements() if d.where == _where("Table 1", setting, method)]
    return []


def _where(table: str, setting: str, method: str) -> str:
    return f"{table}, {setting}-type, {method}"


if __name__ == "__main__":
    print(*disagreements(), sep="\n")
