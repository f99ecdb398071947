"""`smolora train RECIPE [key=value ...]`."""

from __future__ import annotations

import argparse
import json

from ..evaluate.metrics import FIGURES
from ..io.files import path_argument
from ..recipe import Recipe, load_recipe
from ..train.methods import METHODS
from .output import add_output_arguments, output_of

TASKS = {"given": ", task given", "selector": ", task found by its selector"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(
        parser,
        "key=value",
        "changes to the recipe: training.epochs=2, tasks.0.test=FILE, ...; values are YAML",
        "short for output=...: the run's folder",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, and stop")
    add_output_arguments(parser, "the figures of the run, or the plan of --dry-run,")


def add_recipe_arguments(parser: argparse.ArgumentParser, change: str, changes: str, output: str) -> None:
    """Add a recipe, changes to it, `--method` and `--output`.

    Args:
        parser: the command's.
        change: what a change looks like.
        changes, output: help on the changes and on `--output`.
    """
    parser.add_argument("recipe", type=path_argument, metavar="RECIPE", help="a YAML file, see recipes/")
    parser.add_argument("overrides", nargs="*", metavar=change, help=changes)
    parser.add_argument("--method", choices=METHODS, help="short for method=...")
    parser.add_argument("--output", metavar="DIR", help=output)


def run(args: argparse.Namespace) -> int:
    short = [f"{name}={json.dumps(value)}" for name in ("method", "output") if (value := getattr(args, name))]
    recipe = load_recipe(args.recipe, [*args.overrides, *short])
    with output_of(args):
        return _run(args, recipe)


def _run(args: argparse.Namespace, recipe: Recipe) -> int:
    from ..train.plan import make_plan, print_plan

    plan = make_plan(recipe)
    if args.dry_run:
        print(json.dumps(plan)) if args.json else print_plan(plan)
        return 0
    from ..train.run import TrainingRun

    run = TrainingRun(recipe)
    results = run()
    if run.state.is_main_process:
        print(json.dumps(figures(results)) if args.json else summary(results))
    return 0


def figures(results: dict) -> dict:
    """The figures after the last stage, in percent and unrounded, with the run's name, method and folders."""
    return {
        **{name: results[name] for name in ("name", "method", "task_source", "tasks", "stages")},
        **{name: results[name][-1] for name in FIGURES},
        "accuracy": results["matrix"][-1],
        "downstream": {
            name: {key: part[key] for key in ("tasks", "accuracy", "AP", "MIF")}
            for name, part in results["downstream"].items()
        },
    }


def summary(results: dict) -> str:
    """Format the run's figures, one line for the stream and one for each downstream list."""
    rows = {
        f"{results['name']} ({results['method']}{TASKS.get(results['task_source'], '')})": {
            name: results[name][-1] for name in FIGURES
        },
        **{name: {"AP": part["AP"], "MIF": part["MIF"]} for name, part in results["downstream"].items()},
    }
    return "\n".join(
        f"{title}: " + ", ".join(f"{name} {'-' if value is None else f'{value:.2f}'}" for name, value in cells.items())
        for title, cells in rows.items()
    )
