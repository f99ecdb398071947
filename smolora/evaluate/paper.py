"""The figures that the SMoLoRA paper prints (ICCV 2025, Tables 1 to 7), and where its tables disagree.

Everything is in percent as printed; None is a figure that a table leaves out. Accuracies of captions are CIDEr.
`disagreements()` recomputes every figure that follows from others; `python -m smolora.evaluate.paper` prints them:

- Table 1, single-type, SeqLoRA, VQAv2: 64.61, but 64.37 in Table 5; so its AP is 46.21, but 46.17 by Table 5.
- Table 1, multi-type, EWC: AP 43.10, but 43.04 by its own accuracies.
"""

from __future__ import annotations

from typing import NamedTuple

from .matrix import continual_metrics

UPSTREAM = ("ScienceQA", "TextVQA", "Flickr30k", "ImageNet", "GQA", "VQAv2")
ZERO_SHOT = ("VizWiz", "TextCaps", "OCRVQA")
FEW_SHOT = ("Places365, 5-shot", "Places365, 10-shot")


class Row(NamedTuple):
    """A method's row: its accuracies, and what the table prints beside them."""

    accuracy: tuple[float, ...]
    AP: float
    MAP: float | None = None
    BWT: float | None = None
    MIF: float | None = None


TABLE_1 = {  # upstream tasks after the last stage
    "single": {
        "Multitask": Row((83.49, 61.93, 169.21, 96.53, 60.07, 65.8), AP=89.51, MIF=98.38),
        "Zero-shot": Row((52.72, 2.95, 52.64, 22.1, 2.73, 0.65), AP=22.3, MIF=17.84),
        "DirLoRA": Row((83.75, 60.66, 164.2, 96.71, 58.55, 64.93), AP=88.13, BWT=0.0, MIF=98.41),
        "SeqLoRA": Row((55.31, 50.22, 33.89, 22.73, 50.52, 64.61), AP=46.21, MAP=57.41, BWT=-48.1, MIF=78.35),
        "MoeLoRA": Row((55.01, 48.87, 32.04, 22.0, 50.03, 63.64), AP=45.27, MAP=56.16, BWT=-48.05, MIF=79.97),
        "DoRA": Row((51.26, 46.36, 36.41, 28.24, 45.29, 56.87), AP=44.07, MAP=65.03, BWT=-31.12, MIF=78.59),
        "C-LoRA": Row((57.25, 38.7, 56.5, 25.27, 42.89, 54.06), AP=45.78, MAP=57.04, BWT=-19.58, MIF=65.84),
        "Replay": Row((75.61, 47.58, 31.97, 35.84, 48.51, 58.67), AP=49.7, MAP=69.78, BWT=-22.71, MIF=82.06),
        "EWC": Row((57.04, 50.02, 32.96, 22.85, 50.16, 64.54), AP=46.26, MAP=56.19, BWT=-49.71, MIF=78.9),
        "EWC+TIR": Row((72.22, 44.78, 34.54, 25.98, 46.86, 58.73), AP=47.19, MAP=67.21, BWT=-25.64, MIF=81.62),
        "Eproj": Row((65.29, 52.87, 148.19, 39.45, 28.06, 57.86), AP=65.29, MAP=73.53, BWT=-14.02, MIF=89.81),
        "SMoLoRA": Row((77.36, 58.29, 151.99, 95.35, 51.96, 65.71), AP=83.44, MAP=84.85, BWT=-3.23, MIF=97.79),
    },
    "multi": {
        "Multitask": Row((82.83, 61.27, 175.97, 96.44, 59.67, 65.8), AP=90.33),
        "Zero-shot": Row((51.85, 5.11, 44.05, 20.34, 2.37, 1.16), AP=20.81, MIF=19.45),
        "DirLoRA": Row((83.85, 60.51, 164.66, 96.71, 57.93, 64.9), AP=88.09, BWT=0.0, MIF=98.31),
        "SeqLoRA": Row((59.21, 50.8, 20.99, 20.3, 49.98, 64.41), AP=44.28, MAP=53.75, BWT=-48.73, MIF=79.47),
        "MoeLoRA": Row((58.09, 53.3, 22.82, 22.61, 51.8, 65.15), AP=45.63, MAP=54.88, BWT=-49.94, MIF=78.19),
        "DoRA": Row((52.03, 47.37, 27.97, 26.18, 46.05, 57.33), AP=42.82, MAP=56.24, BWT=-34.11, MIF=78.3),
        "C-LoRA": Row((55.58, 38.64, 59.05, 22.81, 40.93, 51.65), AP=44.78, MAP=52.37, BWT=-18.83, MIF=70.01),
        "Replay": Row((66.06, 47.78, 24.21, 25.66, 46.53, 58.59), AP=44.81, MAP=66.68, BWT=-26.88, MIF=80.38),
        "EWC": Row((53.6, 49.07, 20.38, 20.48, 50.11, 64.63), AP=43.1, MAP=53.94, BWT=-52.47, MIF=78.18),
        "EWC+TIR": Row((66.94, 45.76, 29.49, 21.68, 46.9, 58.8), AP=44.93, MAP=64.51, BWT=-26.38, MIF=80.56),
        "Eproj": Row((63.45, 53.18, 151.41, 20.63, 45.3, 57.32), AP=65.22, MAP=72.1, BWT=-14.43, MIF=89.93),
        "SMoLoRA": Row((80.5, 58.3, 146.63, 94.28, 52.42, 65.96), AP=83.02, MAP=85.05, BWT=-6.5, MIF=98.12),
    },
}
TABLE_2 = {  # zero-shot on three datasets
    "single": {
        "SeqLoRA": Row((27.69, 9.73, 30.97), AP=22.8, MIF=61.58),
        "MoeLoRA": Row((29.64, 8.74, 30.27), AP=22.88, MIF=60.11),
        "Replay": Row((29.54, 7.52, 37.78), AP=24.95, MIF=61.1),
        "DoRA": Row((29.03, 9.45, 37.14), AP=25.21, MIF=61.98),
        "SMoLoRA": Row((32.72, 30.97, 39.37), AP=34.35, MIF=90.94),
    },
    "multi": {
        "SeqLoRA": Row((22.27, 7.1, 31.06), AP=20.14, MIF=61.09),
        "MoeLoRA": Row((26.3, 7.13, 32.55), AP=21.99, MIF=61.28),
        "Replay": Row((24.7, 8.32, 38.18), AP=23.73, MIF=61.33),
        "DoRA": Row((26.16, 8.83, 38.08), AP=24.36, MIF=61.59),
        "SMoLoRA": Row((27.46, 25.28, 39.86), AP=30.87, MIF=85.76),
    },
}
TABLE_3 = {  # few-shot on Places365
    "single": {
        "SeqLoRA": Row((13.15, 12.34), AP=12.75, MIF=99.9),
        "MoeLoRA": Row((18.58, 21.38), AP=19.98, MIF=99.82),
        "Replay": Row((17.8, 21.02), AP=19.41, MIF=99.87),
        "DoRA": Row((28.3, 30.53), AP=29.42, MIF=100.0),
        "SMoLoRA": Row((36.95, 43.68), AP=40.32, MIF=100.0),
    },
    "multi": {
        "SeqLoRA": Row((17.82, 17.98), AP=17.9, MIF=99.9),
        "MoeLoRA": Row((10.56, 11.12), AP=10.84, MIF=2.98),
        "Replay": Row((17.38, 22.34), AP=19.86, MIF=99.92),
        "DoRA": Row((29.55, 32.24), AP=30.9, MIF=100.0),
        "SMoLoRA": Row((37.0, 43.4), AP=40.2, MIF=100.0),
    },
}
TABLE_7 = {  # MiniGPT-4, upstream tasks after the last stage
    "single": {
        "Zero-shot": Row((41.1, 0.0, 0.03, 26.32, 0.0, 0.0), AP=11.24, MIF=0.96),
        "SeqLoRA": Row((54.56, 36.18, 134.83, 38.93, 40.85, 34.16), AP=56.59, MAP=56.78, BWT=9.22, MIF=58.42),
        "SMoLoRA": Row((54.16, 38.61, 135.6, 48.46, 44.11, 48.35), AP=61.55, MAP=62.05, BWT=3.39, MIF=76.4),
    },
    "multi": {
        "Zero-shot": Row((42.72, 0.0, 0.01, 26.83, 0.0, 0.0), AP=11.59, MIF=1.18),
        "SeqLoRA": Row((54.61, 34.24, 116.09, 30.32, 40.65, 28.91), AP=50.8, MAP=51.76, BWT=-2.37, MIF=54.49),
        "SMoLoRA": Row((57.72, 39.6, 112.43, 43.27, 44.65, 38.43), AP=56.02, MAP=60.67, BWT=1.84, MIF=75.39),
    },
}
TABLE_5 = {  # SeqLoRA, the accuracy matrix: a row a stage
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
TABLE_6 = {  # SMoLoRA, the accuracy matrix: a row a stage
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
TABLE_4 = {  # single-type, modules left out: visual understanding, instruction following, adaptive fusion
    "none": {"AP": 46.21, "MAP": 57.41, "BWT": -48.1, "MIF": 78.35},
    "VU": {"AP": 53.49, "MAP": 67.84, "BWT": -33.06, "MIF": 80.12},
    "IF": {"AP": 71.97, "MAP": 79.56, "BWT": -17.42, "MIF": 98.38},
    "VU + IF": {"AP": 75.16, "MAP": 78.72, "BWT": -10.99, "MIF": 97.43},
    "VU + IF + AF": {"AP": 83.44, "MAP": 84.85, "BWT": -3.23, "MIF": 97.79},
}

ROUNDING = 0.01  # two decimals on both sides: half a hundredth each


class Disagreement(NamedTuple):
    """Two figures of the paper that should be one."""

    where: str
    figure: str
    printed: float
    expected: float  # what follows from other figures of the paper
    source: str  # which those are

    def __str__(self) -> str:
        return f"{self.where}, {self.figure}: {self.printed:.2f}, but {self.expected:.2f} by {self.source}"


def disagreements() -> list[Disagreement]:
    """Every printed figure that is off by more than rounding from what other figures of the paper give."""
    found = []

    def compare(where: str, figure: str, printed: float | None, expected: float | None, source: str) -> None:
        if printed is not None and expected is not None and abs(printed - expected) > ROUNDING + 1e-9:
            found.append(Disagreement(where, figure, printed, expected, source))

    tables = {"Table 1": (TABLE_1, UPSTREAM), "Table 2": (TABLE_2, ZERO_SHOT), "Table 3": (TABLE_3, FEW_SHOT)}
    for name, (table, tasks) in {**tables, "Table 7": (TABLE_7, UPSTREAM)}.items():
        for setting, rows in table.items():
            for method, row in rows.items():
                ap = continual_metrics(tasks, [row.accuracy])["AP"][0]
                compare(f"{name}, {setting}-type, {method}", "AP", row.AP, ap, "its own accuracies")
    for name, method, table in (("Table 5", "SeqLoRA", TABLE_5), ("Table 6", "SMoLoRA", TABLE_6)):
        for setting, matrix in table.items():
            row, where = TABLE_1[setting][method], f"Table 1, {setting}-type, {method}"
            for task, printed, expected in zip(UPSTREAM, row.accuracy, matrix[-1], strict=True):
                compare(where, task, printed, expected, f"{name}'s last row")
            figures = continual_metrics(UPSTREAM, matrix)
            for figure in ("AP", "MAP", "BWT"):
                compare(where, figure, getattr(row, figure), figures[figure][-1], name)
    for modules, method in (("none", "SeqLoRA"), ("VU + IF + AF", "SMoLoRA")):
        for figure, printed in TABLE_4[modules].items():
            compare(f"Table 4, {modules}", figure, printed, getattr(TABLE_1["single"][method], figure), "Table 1")
    return found


if __name__ == "__main__":
    print(*disagreements(), sep="\n")
