"""The report as one HTML page that needs no network: tables, figures, pictures and data are inside."""

from __future__ import annotations

import base64
import difflib
import io
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from PIL import Image

from ..evaluate import paper
from ..evaluate.metrics import FIGURES
from ..io.files import atomic_write_text
from . import charts, palette, routing
from .cases import Case
from .environment import environment
from .forgetting import Judge
from .layout import RunFolder
from .selector import confusion, taken_for, task_source
from .tables import Table, over_seeds, published


class Note(NamedTuple):
    """A remark on an answer of a case."""

    text: str
    good: bool | None  # None: neither good nor bad


class Answer(NamedTuple):
    """An answer of a case after a stage."""

    stage: str
    parts: list[tuple[str, bool]]  # the text, and whether it differs from the stage before
    changed: bool
    notes: list[Note]


def write_page(
    path: Path,
    runs: Sequence[RunFolder],
    tables: dict[str, Any],
    cases: dict[str, list[Case]],
    judges: Sequence[Judge],
    *,
    remarks: Sequence[str] = (),
    data: Sequence[Path] = (),
) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        runs: the runs.
        tables: "final", "stages", "seeds" and "forgetting" (the last two may be None), and "downstream", by name.
        cases: the cases of each task.
        judges: of each run, for the marks on its answers.
        remarks: sentences below the first table.
        data: CSV files to put inside.

    Raises:
        ValueError: a run's answers cannot be read.
    """
    styles = palette.run_styles(runs)
    content = (
        environment()
        .get_template("report.html")
        .render(
            palette=palette,
            runs=runs,
            styles=styles,
            tables=tables,
            remarks=remarks,
            dots=figure_dots(runs, styles),
            accuracy=accuracy_panels(runs, styles),
            experts=expert_panels(runs),
            matrices=[(run, matrix_rows(run)) for run in runs],
            forgetting=forgetting_bars(tables["forgetting"]),
            routing=[(run, routing_parts(run)) for run in runs if run.routing],
            selections=[(run, taken_for(run), rows) for run in runs if (rows := confusion(run))],
            task_source=task_source,
            losses=loss_panels(runs, styles),
            training=training_table(runs),
            cases={task: [case_parts(task, case, judges) for case in of_task] for task, of_task in cases.items()},
            data=[(file.name, _uri("text/csv", file.read_bytes())) for file in data],
        )
    )
    atomic_write_text(path, content)


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ---- figures


def figure_dots(runs: Sequence[RunFolder], styles: dict[str, palette.Style]) -> list[charts.DotPlot]:
    """AP, MAP, BWT and MIF after the last stage: a row per method with its seeds and, if comparable, the paper's."""
    plots = []
    for figure in FIGURES:
        rows = []
        for alike in over_seeds(runs):
            values = [run.last[figure] for run in alike]
            known = [value for value in values if value is not None]
            if len(known) < len(values):
                continue
            first = alike[0]
            row = _paper_row(first, published(runs))
            rows.append(
                charts.Dots(
                    f"{first.method}, {len(alike)} seeds" if len(alike) > 1 else first.name,
                    styles[first.name],
                    known,
                    statistics.mean(known),
                    statistics.stdev(known) if len(known) > 1 else None,
                    None if row is None else getattr(row, figure),
                )
            )
        if rows:
            plots.append(charts.dot_plot(figure, rows))
    return plots


def _paper_row(run: RunFolder, table: Mapping[str, Mapping[str, paper.Row]] | None) -> paper.Row | None:
    """The row of a run's method in a table of the paper, if it ran the paper's stream."""
    if table is None or tuple(run.tasks) != paper.UPSTREAM:
        return None
    printed = {method.lower().replace("-", ""): row for method, row in table[run.setting].items()}
    return printed.get(run.method)


def accuracy_panels(runs: Sequence[RunFolder], styles: dict[str, palette.Style]) -> list[charts.Panel]:
    """Each task's accuracy from its own stage on (the paper's Fig. 4)."""
    panels = []
    for task in dict.fromkeys(task for run in runs for task in run.tasks):
        having = [run for run in runs if task in run.tasks]
        lines = []
        for run in having:
            points = [(k + 1, run.accuracy(k, task)) for k in range(len(run.stages))]
            lines.append(charts.Line(run.name, styles[run.name], [(k, v) for k, v in points if v is not None]))
        ticks = [(k, str(k)) for k in range(1, max(len(run.stages) for run in having) + 1)]
        panels.append(charts.line_panel(task, lines, "stage", "score", x_ticks=ticks))
    return panels


def expert_panels(runs: Sequence[RunFolder]) -> list[charts.Panel]:
    """AP, MAP, BWT and MIF against the number of experts (the paper's Fig. 5); empty for a single number."""
    sized = [(run, run.experts) for run in runs if run.experts is not None]
    counts = sorted({count for _, count in sized})
    if len(counts) < 2:
        return []
    slots = palette.method_slots([run.method for run in runs])
    ticks = [(float(place), str(count)) for place, count in enumerate(counts)]
    panels = []
    for figure in FIGURES:
        lines = []
        for number, (method, setting) in enumerate(dict.fromkeys((run.method, run.setting) for run, _ in sized)):
            style = palette.method_style(slots[method], number)
            points = [
                (float(counts.index(count)), value)
                for run, count in sized
                if (run.method, run.setting) == (method, setting) and (value := run.last[figure]) is not None
            ]
            lines.append(charts.Line(f"{method}, {setting}", style, sorted(points)))
        panels.append(charts.line_panel(figure, lines, "experts, both branches", figure, x_ticks=ticks))
    return panels


class MatrixCell(NamedTuple):
    """A cell of an accuracy matrix."""

    value: float | None
    drop: float | None  # since the task's own stage; None there and before
    shade: float  # from 0 to 1, relative to the best of its column


def matrix_rows(run: RunFolder) -> list[tuple[str, list[MatrixCell]]]:
    """The rows of a run's accuracy matrix by stage."""
    columns = {task: [run.accuracy(k, task) for k in range(len(run.stages))] for task in run.tasks}
    best = {task: max((v for v in values if v is not None), default=0.0) for task, values in columns.items()}
    rows = []
    for k, stage in enumerate(run.stages):
        cells = []
        for task, values in columns.items():
            value, own = values[k], values[run.own_stage(task)]
            drop = None if value is None or own is None or k <= run.own_stage(task) else value - own
            cells.append(MatrixCell(value, drop, (value or 0.0) / best[task] if best[task] > 0 else 0.0))
        rows.append((stage.removeprefix("stage-"), cells))
    return rows


class ForgettingBar(NamedTuple):
    """A task of a run with the shares of its learned questions, in percent."""

    run: str
    task: str
    counts: list[int]
    shares: list[float]


def forgetting_bars(table: Table | None) -> list[ForgettingBar]:
    """The rows of the forgetting table as bars."""
    bars = []
    for run, task, learned, *counts in [] if table is None else table.rows:
        numbers = [int(str(count)) for count in counts]
        bars.append(ForgettingBar(str(run), str(task), numbers, [100 * n / int(str(learned)) for n in numbers]))
    return bars


def routing_parts(run: RunFolder) -> dict[str, Any]:
    """A run's routing maps, the overlap of its tasks, and its fusion weights by layer."""
    layers, means = routing.layer_shares(run)
    branches = []
    for branch, title in routing.BRANCHES.items():
        shares = routing.expert_shares(run, branch)
        if shares:
            overlap = list(zip(shares, routing.task_overlap(shares), strict=True))
            branches.append((title, charts.routing_map(shares, layers), list(shares), overlap))
    alpha, beta = (statistics.mean(pair[i] for pair in means) for i in (0, 1))
    lines = [
        charts.Line(
            f"{name}, mean {mean:.3f}",
            palette.Style("ink", palette.DASHES[i], palette.MARKERS[i]),
            [(float(place), pair[i]) for place, pair in enumerate(means)],
        )
        for i, (name, mean) in enumerate((("α, visual understanding", alpha), ("β, instruction following", beta)))
    ]
    panel = charts.line_panel(
        "Fusion weights", lines, "adapted layer", "share", size=(900, 240), y_top=1.0, markers=len(layers) <= 40
    )
    return {"branches": branches, "fusion": panel, "alpha": alpha, "beta": beta}


def loss_panels(runs: Sequence[RunFolder], styles: dict[str, palette.Style]) -> list[charts.Panel]:
    """The training loss of each stage; empty where no log is left."""
    panels = []
    for title in dict.fromkeys(stage for run in runs for stage in run.stages):
        lines = [
            charts.Line(run.name, styles[run.name], [(float(step), loss) for step, loss in losses])
            for run in runs
            if title in run.stages and (losses := run.losses(run.stages.index(title)))
        ]
        if lines:
            panels.append(charts.line_panel(title.removeprefix("stage-"), lines, "step", "loss", markers=False))
    return panels


def training_table(runs: Sequence[RunFolder]) -> Table | None:
    """Samples, time, speed and memory of each stage; None where no run has them."""
    rows: list[list[Any]] = []
    for run in runs:
        for name in dict.fromkeys([*run.training, *run.timing]):
            counts, timing = run.training.get(name, {}), run.timing.get(name, {})
            cost, answers = timing.get("training", {}), timing.get("evaluation", {})
            seconds = sum(part["seconds"] for part in answers.values())
            asked = sum(part["seconds"] * part["answers_per_second"] for part in answers.values())
            memory = cost.get("peak_memory")
            rows.append(
                [
                    run.name,
                    name.removeprefix("stage-"),
                    *(
                        None if counts.get(key) is None else f"{counts[key]:,}"
                        for key in ("samples", "steps", "trainable", "stored")
                    ),
                    cost.get("seconds"),
                    cost.get("tokens_per_second"),
                    None if memory is None else memory / 2**30,
                    seconds or None,
                    asked / seconds if seconds else None,
                ]
            )
    header = [
        *("run", "stage", "samples", "steps", "trained parameters", "stored", "training s", "tokens/s", "peak GiB"),
        *("answering s", "answers/s"),
    ]
    return Table(header, rows) if rows else None


# ---- cases


def case_parts(task: str, case: Case, judges: Sequence[Judge]) -> dict[str, Any]:
    """A case as the page shows it: its picture inside, and each run's answers stage by stage."""
    name = str(case.question.question_id)
    answers = []
    for judge in judges:
        run = judge.run
        if task not in run.tasks:
            continue
        rows: list[Answer] = []
        before: str | None = None
        for k in range(run.own_stage(task), len(run.stages)):
            text = judge.texts(k, task).get(name)
            if text is None:
                continue
            judged = judge.answers(k, task).get(name)
            notes = [] if judged is None else answer_notes(judged.score, judged.follows_format)
            parts = [(text, False)] if before is None else changed_parts(before, text)
            rows.append(Answer(run.stages[k].removeprefix("stage-"), parts, before not in (None, text), notes))
            before = text
        answers.append((run, rows))
    picture: str = case.picture if isinstance(case.picture, str) else ""
    if isinstance(case.picture, Path):
        with Image.open(case.picture) as image:
            picture = picture_uri(image)
    return {"case": case, "picture": picture, "answers": answers}


def answer_notes(score: float | None, follows_format: bool | None) -> list[Note]:
    """Remarks on an answer: what it scores, and whether it has the form that was asked for."""
    if score is None:
        return [Note("does not count", None)]
    right = {0.0: "wrong", 1.0: "right"}.get(score, f"score {100 * score:.0f}")
    return [Note(right, None if 0 < score < 1 else score > 0), *form_notes(follows_format)]


def form_notes(follows_format: bool | None) -> list[Note]:
    """The remark on an answer's form; none where nothing says what the form is."""
    return [] if follows_format is None else [Note("right form" if follows_format else "wrong form", follows_format)]


def changed_parts(before: str, after: str) -> list[tuple[str, bool]]:
    """Split a text into parts, each with whether it is new since `before`; words and the space between them count."""
    old, new = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (before, after))
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    return [
        ("".join(new[start:end]), kind != "equal") for kind, _, _, start, end in matcher.get_opcodes() if end > start
    ]


def picture_uri(image: Image.Image) -> Markup:
    """A picture as a data URI, as PNG or JPEG, whichever is smaller."""
    uris = []
    for kind, options in (("PNG", {}), ("JPEG", {"quality": 85})):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, kind, **options)
        uris.append(_uri(f"image/{kind.lower()}", buffer.getvalue()))
    return Markup(min(uris, key=len))
