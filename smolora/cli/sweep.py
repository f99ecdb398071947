"""`smolora sweep RECIPE key=a,b,c [key=value ...]`."""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import require_extra
from ..io.files import read_text
from ..io.progress import say
from .output import add_output_arguments, output_of
from .train import add_recipe_arguments, figures

if TYPE_CHECKING:
    from ..train.sweep import Point


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(
        parser,
        "key=a,b,c",
        "values to sweep, all combinations of several keys; key=value is a change for all runs, as in train",
        "folder of the sweep, with one for each run (default: the recipe's and -sweep)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs at a time, each on a GPU of its own where there are several",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the runs, and stop")
    add_output_arguments(parser, "the figures of all runs, or the plans of --dry-run,")


def run(args: argparse.Namespace) -> int:
    require_extra("report", user="this command")
    if args.jobs < 1:
        raise ValueError(f"--jobs must be 1 or more, got {args.jobs}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("smolora sweep must be started without a launcher: it starts a process for each run itself")
    from ..train.sweep import read_grid

    method = [f"method={json.dumps(args.method)}"] if args.method else []
    points = read_grid(args.recipe, [*args.overrides, *method], args.output)
    with output_of(args):
        return _dry_run(args, points) if args.dry_run else _run(args, points)


def _dry_run(args: argparse.Namespace, points: list[Point]) -> int:
    from ..train.plan import make_plan
    from ..train.run import TrainingRun

    plans = [make_plan(point.recipe) for point in points]
    if args.json:
        runs = [{"values": point.values, "plan": plan} for point, plan in zip(points, plans, strict=True)]
        print(json.dumps({"output": str(_folder(points)), "runs": runs}))
        return 0
    print(f"{len(points)} runs, into {_folder(points)}")
    for point, plan in zip(points, plans, strict=True):
        steps = sum(stage["steps"] for kind in ("stages", "downstream") for stage in plan[kind])
        memory = "" if plan["memory"] is None else f", {plan['memory']['total_gib']:.2f} GiB"
        state = ", finished" if TrainingRun(point.recipe).is_finished else ""
        print(f"{point.name}: {steps} steps{memory}{state}")
    return 0


def _run(args: argparse.Namespace, points: list[Point]) -> int:
    from ..report.sweep import write_sweep
    from ..train.plan import make_plan
    from ..train.prepare import prepare
    from ..train.run import TrainingRun
    from ..train.sweep import run_points

    for point in points:
        make_plan(point.recipe)
    for point in points:  # now, or runs at the same time would make the same files
        prepare(point.recipe.prepare)
    left = [point for point in points if not TrainingRun(point.recipe).is_finished]
    if len(left) < len(points):
        say(f"{len(points) - len(left)} of {len(points)} runs are finished")
    failed = []
    before = signal.signal(signal.SIGTERM, _end)
    try:
        for number, (point, status) in enumerate(run_points(args.recipe, left, jobs=args.jobs, quiet=args.quiet), 1):
            say(f"{point.name}: {'done' if status == 0 else f'failed with status {status}'} ({number} of {len(left)})")
            failed += [point] if status else []
    finally:
        signal.signal(signal.SIGTERM, before)
    done = [point for point in points if point not in failed]
    folder = _folder(points)
    if done:
        table = write_sweep(folder, [(p.values, p.recipe.folder) for p in done], [p.name for p in failed])
        print(json.dumps(_figures(folder, points, failed)) if args.json else f"{table}\n\n{folder / 'sweep.md'}")
    if failed:
        raise ValueError(
            f"{', '.join(point.name for point in failed)}: not finished; the same command goes on with them"
        )
    return 0


def _end(*_: Any) -> None:
    """End the sweep, and its runs with it."""
    raise SystemExit(128 + signal.SIGTERM)


def _figures(folder: Path, points: list[Point], failed: list[Point]) -> dict[str, Any]:
    """The figures of all runs, for a program."""
    return {
        "markdown": str(folder / "sweep.md"),
        "plot": str(folder / "sweep.png"),
        "csv": str(folder / "sweep.csv"),
        "runs": [
            {
                "values": point.values,
                "folder": str(point.recipe.folder),
                "figures": None
                if point in failed
                else figures(json.loads(read_text(point.recipe.folder / "results.json"))),
            }
            for point in points
        ],
    }


def _folder(points: list[Point]) -> Path:
    """The sweep's folder."""
    return points[0].recipe.folder.parent
