"""Reports on one or more runs: one HTML page, Markdown with PNG figures, and all data as CSV."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..evaluate.datasets import DATASETS
from ..io.files import atomic_write_text
from ..io.markdown import escape, picture
from . import cases, figures, tables
from .forgetting import Judge, forgetting_table
from .layout import RunFolder, file_name, read_runs
from .page import write_page
from .routing import write_layers
from .selector import confusion_table, task_source

FATES = (
    "Questions that were answered after the task's own stage, by their answers at the end: kept; still understood, but "
    "in the wrong form; in the right form, but wrong; wrong in both."
)
CAPTIONS = [name for name, dataset in DATASETS.items() if dataset.scoring("smolora").metric == "cider"]


def write_report(runs: Sequence[Path], output: Path | None = None, *, cases_per_task: int = 0) -> Path:
    """Write a report on runs, whose folders `smolora.report.layout` describes.

    Args:
        runs: folders of the runs, which are compared if there are several.
        output: folder for the report; None for `report/` in the first run's folder.
        cases_per_task: number of questions of each task to show with all answers.

    Returns:
        Path of the Markdown file. It includes means over runs that differ only in their seed. Figures, CSV files and
        `report.html`, which has everything inside, are in the same folder.

    Raises:
        ValueError: a folder holds no finished run.
    """
    found = read_runs(list(runs))
    output = output or found[0].folder / "report"
    output.mkdir(parents=True, exist_ok=True)
    final, stages = tables.final_table(output / "final.csv", found), tables.stage_table(output / "stages.csv", found)
    seeds, downstream = tables.seeds_table(output / "seeds.csv", found), tables.downstream_tables(output, found)
    remarks = _remarks(found[0])
    parts = [f"# {' and '.join(escape(run.name) for run in found)}", _about(found)]
    parts += ["## After the last stage", str(final), *remarks]
    data = ["final"]
    if seeds is not None:
        parts += ["## Over seeds", "After the last stage, mean ± standard deviation of a sample.", str(seeds)]
        data.append("seeds")
    for name, table in downstream.items():
        parts += [f"## Downstream, {escape(name)}", str(table)]
        data.append(f"downstream-{file_name(name)}")
    parts += ["## Stage by stage", str(stages)]
    figures.accuracy_over_stages(output / "accuracy.png", found)
    figures.matrices(output / "matrices.png", found)
    parts += [_picture("Accuracy over the stages", "accuracy.png"), _picture("Accuracy matrices", "matrices.png")]
    data += ["stages", "accuracy", "matrices"]
    if len({run.experts for run in found} - {None}) > 1:
        figures.over_experts(output / "experts.png", [run for run in found if run.experts is not None])
        parts += [_picture("Figures against the number of experts", "experts.png")]
        data.append("experts")
    judges = [Judge(run) for run in found]
    forgetting = forgetting_table(output / "forgetting.csv", judges)
    if forgetting is not None:
        parts += ["## What was forgotten", FATES, str(forgetting)]
        data.append("forgetting")
    for run, slug in zip(found, _slugs(found), strict=True):
        if run.routing:
            parts += _routing(output, run, slug)
            data += [f"{kind}-{slug}" for kind in ("routing", "layers", "shares")]
    for run, slug in zip(found, _slugs(found), strict=True):
        selected = confusion_table(output / f"selector-{slug}.csv", run)
        if selected is not None:
            parts += [f"## Tasks that the selector of {escape(run.name)} chose", str(selected)]
            data.append(f"selector-{slug}")
    of_tasks = cases.find_cases(output, found, cases_per_task) if cases_per_task else {}
    if of_tasks:
        parts.append("## Cases")
        data.append("cases")
    for task, table in cases.case_tables(of_tasks).items():
        parts += [f"### {escape(task)}", str(table)]
    path = output / "report.md"
    atomic_write_text(path, "\n\n".join(parts) + "\n")
    write_page(
        output / "report.html",
        found,
        {"final": final, "stages": stages, "seeds": seeds, "downstream": downstream, "forgetting": forgetting},
        of_tasks,
        judges,
        remarks=remarks,
        data=[output / f"{name}.csv" for name in data],
    )
    return path


def _remarks(run: RunFolder) -> list[str]:
    """Remarks on the final table."""
    captions = [task for task in run.tasks if task in CAPTIONS]
    if not captions or len(captions) == len(run.tasks):
        return []
    return [
        f"Accuracies in percent, {' and '.join(captions)} in CIDEr as released, where a reference itself gives "
        "1000. AP, MAP and BWT average both, as the paper's do: captions weigh most."
    ]


def _about(runs: Sequence[RunFolder]) -> str:
    """Describe each run in a line."""
    lines = []
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        line = f"{run.name}: {run.benchmark}, {run.setting}-type instructions, protocol {run.protocol}"
        line += "".join(
            f", {key} {value}" for key, value in (("recipe", run.recipe), ("seed", run.seed)) if value is not None
        )
        source = task_source(run)
        line += f", {source}" if source else ""
        lines.append("- " + escape(line + (f"; {versions}" if versions else "")))
    return "\n".join(lines)


def _slugs(runs: Sequence[RunFolder]) -> list[str]:
    """A distinct file name part for each run."""
    slugs: list[str] = []
    for run in runs:
        slug = re.sub(r"[^a-z0-9]+", "-", run.name.lower()).strip("-") or "run"
        names = [slug, *(f"{slug}-{number}" for number in range(2, len(runs) + 1))]
        slugs.append(next(name for name in names if name not in slugs))
    return slugs


def _routing(output: Path, run: RunFolder, slug: str) -> list[str]:
    """The sections on a run's routing and fusion weights."""
    figures.routing(output / f"routing-{slug}.png", run)
    write_layers(output / f"layers-{slug}.csv", run)
    alpha, beta = figures.shares(output / f"shares-{slug}.png", run)
    return [
        _picture(f"Routing of {run.name}", f"routing-{slug}.png"),
        _picture(f"Alpha and beta of {run.name}", f"shares-{slug}.png"),
        f"Mean over the layers: alpha {alpha:.3f}, beta {beta:.3f}, ratio {alpha / beta:.3f}."
        if beta
        else f"Mean over the layers: alpha {alpha:.3f}, beta {beta:.3f}.",
    ]


def _picture(title: str, name: str) -> str:
    return f"## {escape(title)}\n\n{picture(title, name)}"
