"""What the page shows of answers: a table of stages and runs, and the routing of each run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment

from ..data.images import read_image
from ..report import charts, palette
from ..report.cases import SIDE
from ..report.environment import environment
from ..report.layout import RunFolder
from ..report.page import Note, answer_notes, changed_parts, form_notes, picture_uri
from ..report.routing import BRANCHES
from .answers import Reply


class Shown(NamedTuple):
    """An answer in the table."""

    parts: list[tuple[str, bool]]  # the text, and whether it differs from the stage before
    changed: bool
    notes: list[Note]


@cache
def templates() -> Environment:
    """The demo's templates."""
    return environment("smolora.demo")


def style_sheet() -> str:
    """The style sheet of answers and routing."""
    return templates().get_template("demo.css").render(palette=palette)


def answers_table(runs: Sequence[RunFolder], replies: Sequence[Reply], reference: str | None) -> str:
    """The answers so far as HTML, with what each is worth.

    Args:
        runs: the runs, a column each.
        replies: the answers, a run's in the order of its stages.
        reference: the reference, or None if there is none.
    """
    asked = [run.name for run in runs if any(reply.run == run.name for reply in replies)]
    cells: dict[tuple[str, str], Shown] = {}
    before: dict[str, str] = {}
    for reply in replies:
        last = before.get(reply.run)
        parts = changed_parts(last, reply.text) if last is not None else [(reply.text, False)] if reply.text else []
        cells[reply.stage, reply.run] = Shown(parts, last not in (None, reply.text), _notes(reply))
        before[reply.run] = reply.text
    stages = dict.fromkeys(reply.stage for reply in replies)
    rows = [(stage, [cells.get((stage, name)) for name in asked]) for stage in stages]
    template = templates().get_template("answers.html")
    return template.render(runs=asked, styles=palette.run_styles(runs), rows=rows, reference=reference)


def _notes(reply: Reply) -> list[Note]:
    if reply.score is not None:
        notes = answer_notes(reply.score, reply.follows)
    else:
        notes = form_notes(reply.follows) or [Note("form not judged", None)]
    return notes if reply.taken_for is None else [*notes, Note(f"taken for {reply.taken_for}", None)]


def routing_view(runs: Sequence[RunFolder], replies: Sequence[Reply]) -> str:
    """The experts that each layer chose after every stage, and how it fused them, as HTML."""
    parts = []
    for run in runs:
        of_run = [reply for reply in replies if reply.run == run.name and reply.layers]
        if of_run:
            parts.append(_routing_part(run.name, of_run))
    return templates().get_template("routing.html").render(parts=parts)


def _routing_part(run: str, replies: Sequence[Reply]) -> dict[str, Any]:
    layers = list(dict.fromkeys(entry["layer"] for reply in replies for entry in reply.layers))
    maps = []
    for place, (branch, title) in enumerate(BRANCHES.items()):
        shares = {
            reply.stage: {
                entry["layer"]: [
                    float(expert in entry[branch]) for expert in range(reply.experts[entry["layer"]][place])
                ]
                for entry in reply.layers
                if entry[branch] is not None
            }
            for reply in replies
        }
        if any(shares.values()):
            maps.append((title, charts.routing_map({k: v for k, v in shares.items() if v}, layers)))
    lines = [
        charts.Line(
            reply.stage,
            palette.Style("ink", palette.DASHES[number % len(palette.DASHES)], palette.MARKERS[number % 9]),
            [(float(layers.index(entry["layer"])), entry["alpha"]) for entry in reply.layers],
        )
        for number, reply in enumerate(replies)
    ]
    fusion = charts.line_panel(
        "α, the share of visual understanding; instruction following has the rest",
        lines,
        "adapted layer",
        "α",
        size=(900, 240),
        y_top=1.0,
        markers=len(layers) <= 40,
    )
    table = [(layer, [_cell(reply, layer) for reply in replies]) for layer in layers]
    return {
        "run": run,
        "stages": [reply.stage for reply in replies],
        "maps": maps,
        "fusion": fusion,
        "table": table,
    }


def _cell(reply: Reply, layer: str) -> str:
    """What a layer did, in words."""
    entry = next((entry for entry in reply.layers if entry["layer"] == layer), None)
    if entry is None:
        return "-"
    chosen = [
        f"{branch.upper()} {', '.join(map(str, entry[branch]))}" for branch in BRANCHES if entry[branch] is not None
    ]
    return "; ".join([*chosen, f"α {entry['alpha']:.2f}", f"β {entry['beta']:.2f}"])


def picture_view(path: Path | None, name: str) -> str:
    """A small copy of a picture as HTML.

    Raises:
        BrokenImageError: it cannot be decoded.
    """
    if path is None:
        return templates().from_string('<p class="soft">This question has no picture.</p>').render()
    image = read_image(path)
    image.thumbnail((SIDE, SIDE))
    template = templates().from_string('<div class="smolora"><img src="{{ uri }}" alt="{{ name }}"></div>')
    return template.render(uri=picture_uri(image), name=name)
