"""`smolora init DATA...`: files of one's own to the benchmark's format, and a recipe for them."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ..data.convert import find_images, read_samples, split_samples, write_task
from ..data.fields import Fields, Sample, guess_fields
from ..data.tables import TEST, TRAIN, read_table, splits_of
from ..io.files import atomic_write_text, path_argument
from ..recipe import load_recipe
from ..train.drafts import Draft, instructions_in, metric_and_format, recipe_text

Files = tuple[Path, ...]
KINDS = ("question", "answer", "image", "instruction")
LOOKED_AT = 200  # records that fields are guessed from
SPLIT_ENDING = re.compile(rf"(?:^|[-_. ])({'|'.join((*TRAIN, *TEST))})(?:-\d+-of-\d+)?$", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "data",
        nargs="+",
        type=path_argument,
        metavar="DATA",
        help="a task's file (.json, .jsonl, .csv, .tsv, .parquet) or folder (of datasets, or with train.* and test.*); "
        "NAME_train.* and NAME_test.* are one task",
    )
    add("--model", type=path_argument, default=Path("models/llava-1.5-7b-hf"), help="the base (default: %(default)s)")
    add("--recipe", type=path_argument, default=Path("recipe.yaml"), help="the file to write (default: %(default)s)")
    add(
        "--folder",
        type=path_argument,
        default=Path("data/own"),
        metavar="DIR",
        help="where the tasks are written in the benchmark's format (default: %(default)s)",
    )
    add("--images", type=path_argument, metavar="DIR", help="the folder that image paths are relative to")
    for kind in KINDS:
        add(f"--{kind}", metavar="FIELD", help=f"the field of the records with the {kind}")
    add("--test-fraction", type=float, default=0.1, help="to test with, of a task without a test file (default: 0.1)")
    add("--seed", type=int, default=0, help="of the choice of those (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    if args.recipe.exists():
        raise ValueError(f"--recipe {args.recipe} is there already: remove it, or name another")
    if not 0 < args.test_fraction < 1:
        raise ValueError(f"--test-fraction must lie between 0 and 1, got {args.test_fraction}")
    found = tasks_of(args.data)
    taken = [name for name in found if (args.folder / name).exists()]
    if taken:
        raise ValueError(f"--folder {args.folder} has {', '.join(taken)} already: remove it, or name another")
    # everything is read before anything is written
    used: set[str] = set()
    tasks = {name: _read_task(args, used, name, *files) for name, files in found.items()}
    for kind in KINDS:
        if getattr(args, kind) is not None and kind not in used:
            raise ValueError(f"--{kind} must be a field of the records, got {getattr(args, kind)!r}, which no file has")
    drafts = []
    for name, (train, test, images) in tasks.items():
        write_task(args.folder / name, train, test)
        metric, form = metric_and_format(test)
        drafts.append(Draft(name, images, metric, form, instructions_in([*train, *test]), train, test))
    text = recipe_text(args.recipe.stem, str(args.model), str(args.folder), drafts)
    atomic_write_text(args.recipe, text)
    load_recipe(args.recipe)
    for draft in drafts:
        print(
            f"{draft.name}: {len(draft.train)} to train with, {len(draft.test)} to test with{draft.most}; "
            f"metric {draft.metric}, format {draft.format or '-'}; {len(draft.instructions) or 'no'} instruction(s)"
        )
    print(f"wrote {args.recipe}; next: smolora train {args.recipe} --dry-run")
    return 0


def tasks_of(paths: Sequence[Path]) -> dict[str, tuple[Files, Files]]:
    """The training and the test files of each task, by name; none for a test that is split off.

    Raises:
        ValueError: there is no such file, two are the same part of a task, or a task has no part to train with.
    """
    parts: dict[str, dict[str, Files]] = {}
    for path in paths:
        splits = splits_of(path)
        for split, files in splits.items():
            ending = SPLIT_ENDING.search(path.stem) if not split else None
            part = split or (ending[1].lower() if ending else "train")
            if part in TEST[1:] and "test" in splits:
                continue  # of a folder's test and validation, the test
            kind = "train" if part in TRAIN else "test"
            base = path.stem[: ending.start()] if ending else path.stem
            name = re.sub(r"[^A-Za-z0-9 ,._+-]+|^[^A-Za-z0-9]+", "-", base or path.resolve().parent.name).strip("-")
            task = parts.setdefault(name, {})
            if kind in task:
                raise ValueError(f"{files[0]} and {task[kind][0]} are both for {kind} of the task {name}")
            task[kind] = files
    for name, task in parts.items():
        if "train" not in task:
            raise ValueError(f"{name} has a test file, {task['test'][0]}, and nothing to train with")
    return {name: (task["train"], task.get("test", ())) for name, task in parts.items()}


def _read_task(
    args: argparse.Namespace, used: set[str], name: str, train: Files, test: Files
) -> tuple[list[Sample], list[Sample], str]:
    """Read a task's samples and split them. Returns the folder of the images too.

    The options of fields that were used are added to `used`.
    """
    samples = _read_samples(args, used, name, train)
    if test:
        tested = _read_samples(args, used, name, test)
    else:
        try:
            samples, tested = split_samples(samples, args.test_fraction, args.seed)
        except ValueError as error:
            raise ValueError(f"{train[0]}: {error}") from error
    home = train[0].parent
    folders = [home, home / "images", home.parent, Path(".")] if args.images is None else [args.images]
    images = find_images([*samples, *tested], folders)
    inside = any(picture.content is not None for sample in samples for picture in sample.pictures)
    return samples, tested, str(args.folder / name / "images" if inside else images)


def _read_samples(args: argparse.Namespace, used: set[str], name: str, files: Files) -> list[Sample]:
    """Read the samples of some files of one form, and show what was taken for what."""
    tables = {path: read_table(path) for path in files}
    path, records = next(iter(tables.items()))
    known = list(dict.fromkeys(field for record in records[:LOOKED_AT] for field in record))
    # an option is for the files that have its field, since files of several forms may be given
    given = {kind: getattr(args, kind) for kind in KINDS if getattr(args, kind) in known}
    used.update(given)
    found, missing = guess_fields(records[:LOOKED_AT], given)
    for kind in missing:
        found[kind] = _ask(path, kind, known)
    print(f"{name}: {sum(map(len, tables.values()))} records of {', '.join(map(str, files))}")
    for kind in KINDS:
        if kind in found:
            print(f"  {kind:<12} {found[kind]}: {records[0].get(found[kind])!r:.90}")
    fields = Fields(**found)
    return [sample for path, table in tables.items() for sample in read_samples(table, fields, str(path))]


def _ask(path: Path, kind: str, known: Sequence[str]) -> str:
    """Ask which field is meant, on a terminal; elsewhere say which option to give."""
    if sys.stdin.isatty():
        while True:
            answer = input(f"{path}: which field has the {kind}? ({', '.join(known)}) ").strip()
            if answer in known:
                return answer
    raise ValueError(f"{path}: cannot tell which field has the {kind}: give --{kind}, one of {', '.join(known)}")
