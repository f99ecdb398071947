"""Write tables and a plot of methods.md and minicvit.md from the results of the small benchmarks in `bench/results`.

    python docs/make_tables.py

A result's file is named after its setting, method and seed, with what a run changes of the recipe in between:
`single-branchlora-0.json`, `minicoin-branchlora-keys=trained-0.json`. A table is written between two comments that name
it. Methods stand in the order of `smolora train --method`, and seeds are averaged. Rows with options have the tables
"ablation" and "options" to themselves.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smolora.evaluate.metrics import COIN_FIGURES, FIGURES, continual_metrics
from smolora.io.markdown import Markup, table
from smolora.report.figures import over_values
from smolora.train.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs/methods.md", ROOT / "docs/minicvit.md"]
RESULTS = ROOT / "bench/results"
FILE = re.compile(r"(?P<setting>[a-z0-9]+)-(?P<method>[a-z-]+?)(?:-(?P<options>[^-]*=.*))?-(?P<seed>\d+)\.json")

Results = Mapping[str, Any]
Groups = Mapping[str, Sequence[Results]]  # the runs of a row, one a seed, by the row's name

# BranchLoRA's ablation in its paper's order: what is added, and the row that has it
ABLATION = {
    "moelora": "moelora",
    "+ shared A": "branchlora, top_k=8,freeze=false,routers=shared",
    "+ top-k": "branchlora, freeze=false,routers=shared",
    "+ freezing": "branchlora, routers=shared",
    "+ a router and keys per task": "branchlora",
}


def main() -> None:
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    plot_weights(ROOT / "docs/weights.png")


def with_tables(page: str) -> str:
    """A page with the tables that its comments name."""
    return re.sub(
        r"(<!-- table: (\w+) (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{TABLES[found[3]](rows_of(found[2], found[3]))}\n\n{found[4]}",
        page,
        flags=re.DOTALL,
    )


def plot_weights(path: Path) -> None:
    """Plot the sweeps of `weight`, on `minicvit_run`, with a line for each method."""
    means = {}
    for name, runs in groups("run").items():
        method, _, option = name.partition(", weight=")
        means[option, method] = {figure: statistics.mean(one[figure][-1] for one in runs) for figure in FIGURES}
    over_values(path, ["λ", "method"], dict(sorted(means.items(), key=lambda item: float(item[0][0]))))


def rows_of(setting: str, kind: str) -> Groups:
    """The rows of a table."""
    found = groups(setting)
    if kind == "ablation":
        return {name: found[row] for name, row in ABLATION.items() if row in found}
    if kind.startswith("options"):
        shown = {name for name in found if ", " in name and name not in ABLATION.values()}
        return {name: runs for name, runs in found.items() if name in shown | {row.split(", ")[0] for row in shown}}
    return {name: runs for name, runs in found.items() if ", " not in name}


def groups(setting: str) -> Groups:
    """The results of a setting, "single", "multi", "run", "minicoin" or another base's, grouped over seeds."""
    found: dict[tuple[int, str], list[Results]] = {}
    order = list(METHODS)
    for path in sorted(RESULTS.glob(f"mini*/{setting}-*.json")):
        parts = FILE.fullmatch(path.name)
        if parts is None:
            raise ValueError(f"{path} must be named SETTING-METHOD[-OPTIONS]-SEED.json")
        name = ", ".join(filter(None, (parts["method"], parts["options"])))
        results = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault((order.index(parts["method"]), name), []).append(results)
    return {name: found[place, name] for place, name in sorted(found)}


def spread(values: Sequence[float | None]) -> str:
    """A mean to one decimal, with the standard deviation of several."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values) or not numbers:
        return "-"
    if len(numbers) == 1:
        return f"{numbers[0]:.1f}"
    return f"{statistics.mean(numbers):.1f} ± {statistics.stdev(numbers):.1f}"


def row_name(name: str, runs: Sequence[Results]) -> str:
    """A row's name, with its seeds if they are several, and whether it is told the task."""
    notes = [f"{len(runs)} seeds"] if len(runs) > 1 else []
    notes += ["task given"] if runs[0]["task_source"] == "given" else []
    return name + (f" ({', '.join(notes)})" if notes else "")


def rows(found: Groups, header: Sequence[str], cells: Callable[[Results], Iterable[float | None]]) -> str:
    """A table with a row of spreads for each group; groups without figures are left out."""
    lines = []
    for name, runs in found.items():
        columns = list(zip(*map(cells, runs), strict=True))
        if any(value is not None for column in columns for value in column):
            lines.append([Markup(row_name(name, runs)), *map(spread, columns)])
    return table(["", *header], lines)


def own_task(results: Results) -> list[float | None]:
    """What each task reaches right after it was learned; None where all are learned at once, or none is."""
    matrix = results["matrix"]
    if len(matrix) < len(results["tasks"]):
        return [None] * len(results["tasks"])
    return [row[place] for place, row in enumerate(matrix)]


def last_stage(results: Results) -> dict[str, float]:
    """The score of each task after the last stage."""
    return dict(zip(results["tasks"], results["matrix"][-1], strict=True))


def final(found: Groups) -> str:
    """Each task after the last stage, and the figures of the last stage; runs may have the tasks in another order."""
    tasks = next(iter(found.values()))[0]["tasks"]

    def cells(results: Results) -> list[float | None]:
        scores = last_stage(results)
        return [*(scores[task] for task in tasks), *(results[figure][-1] for figure in FIGURES)]

    return rows(found, [*tasks, *FIGURES], cells)


def parts(found: Groups) -> str:
    """As `final`, with the mean over the tasks that are parts of a dataset, "dataset-part"."""
    datasets = dict.fromkeys(task.partition("-")[0] for task in next(iter(found.values()))[0]["tasks"])

    def cells(results: Results) -> list[float | None]:
        scores = last_stage(results).items()
        means = [statistics.mean(v for task, v in scores if task.startswith(f"{dataset}-")) for dataset in datasets]
        return [*means, *(results[figure][-1] for figure in FIGURES)]

    return rows(found, [*datasets, *FIGURES], cells)


def own(found: Groups) -> str:
    """Each task right after its own stage."""
    return rows(found, next(iter(found.values()))[0]["tasks"], own_task)


def selector(found: Groups) -> str:
    """The share of each task's questions that a selector took for their task, after the last stage, in percent."""

    def cells(results: Results) -> list[float | None]:
        tasks = results["tasks"]
        if not results["selected"]:
            return [None] * len(tasks)
        counts = results["selected"][-1]
        return [100 * counts[task][place] / sum(counts[task]) for place, task in enumerate(tasks)]

    return rows(found, next(iter(found.values()))[0]["tasks"], cells)


def coin(found: Groups) -> str:
    """CoIN's figures: ACC, MAA, and its BWT, which divides by the number of tasks."""

    def cells(results: Results) -> list[float | None]:
        method = "dirlora" if results["course"] == "one-per-task" else None
        figures = continual_metrics(results["tasks"], results["matrix"], method=method, convention="coin")
        return [figures[name][-1] for name in COIN_FIGURES]

    return rows(found, COIN_FIGURES, cells)


def downstream(found: Groups) -> str:
    """Zero-shot and few-shot evaluation after the last stage."""
    names = ("zero-shot", "few-shot")

    def cells(results: Results) -> list[float | None]:
        parts = [results["downstream"].get(name, {}) for name in names]
        return [part.get(figure) for part in parts for figure in ("AP", "MIF")]

    return rows(found, [f"{name} {figure}" for name in names for figure in ("AP", "MIF")], cells)


def cost(found: Groups) -> str:
    """Numbers that the first and the last stage train, and that answering after the last stage needs.

    Results from before "stored" was counted have no row.
    """
    lines = []
    for name, runs in found.items():
        results = next((one for one in runs if one["training"] and "stored" in one["training"][one["stages"][0]]), None)
        if results is not None:
            counts = [results["training"][stage] for stage in results["stages"]]
            kept = counts if results["course"] == "one-per-task" else counts[-1:]
            ends = counts[0]["trainable"], counts[-1]["trainable"], sum(count["stored"] for count in kept)
            lines.append([Markup(row_name(name, [results])), *(f"{number:,}" for number in ends)])
    return table(["", "trained in the first stage", "in the last", "stored"], lines)


def pace(found: Groups) -> str:
    """Milliseconds of a training step, over all stages; for runs of one seed beside which nothing else ran."""

    def milliseconds(results: Results) -> float:
        stages = results["stages"]
        seconds = sum(results["timing"][stage]["training"]["seconds"] for stage in stages)
        return 1000 * seconds / sum(results["training"][stage]["steps"] for stage in stages)

    lines = [[name, ", ".join(f"{milliseconds(results):.0f}" for results in runs)] for name, runs in found.items()]
    return table(["", "ms a step, each run"], lines)


TABLES: dict[str, Callable[[Groups], str]] = {
    table.__name__: table for table in (final, parts, own, selector, coin, downstream, cost, pace)
} | {"ablation": final, "options": final, "options_selector": selector, "options_downstream": downstream}

if __name__ == "__main__":
    main()
