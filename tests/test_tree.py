"""The tree: imports go down in one order and never in circles, files stay short, and tests mirror the package."""

from __future__ import annotations

import ast
import subprocess
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each folder or module of smolora/ imports only from rows below its own. "smolora" is the package's __init__.py, and
# "kernels" the top-level folder, which installs as smolora.kernels.
LAYERS = """
    cli
    doctor
    demo
    report
    train
    minicvit
    evaluate
    smolora
    tuner
    official
    recipe
    methods
    backends
    engine
    kernels
    config
    peft_compat
    backbones
    data
    instructions
    io
    routing arguments extras launch spec reference
""".strip().splitlines()
DEPTH = {name: row for row, names in enumerate(LAYERS) for name in names.split()}

MAX_LINES = 600
MAX_FORMATTER_SKIPS = 9
SOURCES = (".py", ".cu", ".cuh", ".cpp", ".h")


@cache
def tracked() -> list[Path]:
    """Source files that git tracks, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [Path(name) for name in listed.splitlines() if name.endswith(SOURCES)]
    return [path for path in paths if (ROOT / path).exists()]


def modules() -> dict[str, Path]:
    """Modules of the package by name, smolora.kernels included."""
    found = {}
    for folder, package in (("smolora", "smolora"), ("kernels", "smolora.kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


@cache
def import_graph() -> dict[str, set[str]]:
    """For each module, the modules that it imports anywhere: at its top, in a function, or for type checking."""
    known = modules()
    graph = {name: set() for name in known}
    for name, path in known.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    above = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*above, base]).removesuffix(".")
                inside = [f"{base}.{alias.name}" for alias in node.names]
                imported = [full if full in known else base for full in inside]
            graph[name].update(module for module in imported if module in known and module != name)
    return graph


def layer(module: str) -> str:
    """The folder or module of smolora/ that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def test_no_import_circles():
    try:
        TopologicalSorter(import_graph()).prepare()
    except CycleError as error:
        pytest.fail("imports go in a circle: " + " <- ".join(error.args[1]))


def test_imports_go_down():
    graph = import_graph()
    assert set(map(layer, graph)) == set(DEPTH), "LAYERS must name the folders and modules of smolora/, each once"
    upward = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if layer(name) != layer(other) and DEPTH[layer(name)] >= DEPTH[layer(other)]
    ]
    assert not upward, "\n".join(sorted(upward))


def test_reference_imports_nothing_of_ours():
    """An oracle that shared a line with the fast code would share its faults."""
    assert import_graph()["smolora.reference"] == set()


def test_files_are_short():
    lines = {str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in tracked()}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_the_formatter_decides():
    """A table of data may be laid out by hand, code may not."""
    marks = ("# fmt: " + "skip", "# fmt: " + "off")
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in tracked() if path.suffix == ".py"}
    counts = {str(path): sum(map(text.count, marks)) for path, text in texts.items()}
    assert sum(counts.values()) <= MAX_FORMATTER_SKIPS, {name: count for name, count in counts.items() if count}


def test_tests_mirror_the_package():
    """Each folder of smolora/ has its folder of tests, and the other way round."""
    packages = {path.parent for path in tracked() if path.parts[0] == "smolora"}
    folders = {path.parent for path in tracked() if path.parts[:2] == ("tests", "smolora")}
    assert {folder.relative_to("tests") for folder in folders} == packages
