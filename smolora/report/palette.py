"""One colour and one marker for a method in all figures of the page, and one dash for each of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .layout import RunFolder

# Told apart with every kind of colour blindness, and at least 3:1 against the page; the test computes both.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#333333", "#9c10f9", "#633d03", "#8b0470", "#557c3c", "#55048b")
DARK = ("#56b4e9", "#ff8c42", "#38fa86", "#e4dfc8", "#8638fa", "#ca91a8", "#db065b", "#9cf910", "#b9279c")
LIGHT_PAGE, DARK_PAGE = "#ffffff", "#16181c"

METHODS = (
    "smolora",
    "seqlora",
    "moelora",
    "zeroshot",
    "dirlora",
    "multitask",
    "smolora-vu",
    "smolora-if",
    "smolora-mean",
)
MARKERS = (  # paths around the origin
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "M-3.5 -3.5h7v7h-7z",
    "M0 -4.5L4.3 3.5H-4.3z",
    "M0 -5L4 0L0 5L-4 0z",
    "M0 4.5L4.3 -3.5H-4.3z",
    "M-1.5 -4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "M-4.5 0L3.5 -4.3V4.3z",
    "M4.5 0L-3.5 -4.3V4.3z",
    "M-4.5 -2h9v4h-9z",
)
DASHES = ("", "7 3", "2 3", "8 3 2 3", "1 4")


class Style(NamedTuple):
    """How a run is drawn."""

    colour: str  # a variable of the page's style sheet, which has a value for light and one for dark
    dash: str
    marker: str


def method_slots(methods: Sequence[str]) -> dict[str, int]:
    """The place of each method in the palette. One that `METHODS` lacks takes a place that no other method has.

    Places after the last colour stand for the same colours with other markers.
    """
    slots = {method: METHODS.index(method) for method in methods if method in METHODS}
    free = [slot for slot in range(len(LIGHT)) if slot not in slots.values()]
    for method in dict.fromkeys(methods):
        if method not in slots:
            slots[method] = free.pop(0) if free else len(slots)
    return slots


def method_style(slot: int, run: int = 0) -> Style:
    """The style of a method's run, counted from 0."""
    turn, colour = divmod(slot, len(LIGHT))
    return Style(f"method-{colour}", DASHES[run % len(DASHES)], MARKERS[(colour + turn) % len(MARKERS)])


def run_styles(runs: Sequence[RunFolder]) -> dict[str, Style]:
    """The style of each run, by its name."""
    slots = method_slots([run.method for run in runs])
    styles: dict[str, Style] = {}
    seen: dict[str, int] = {}
    for run in runs:
        number = seen[run.method] = seen.get(run.method, -1) + 1
        styles[run.name] = method_style(slots[run.method], number)
    return styles
