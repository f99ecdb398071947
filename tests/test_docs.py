"""README and docs: links lead to files, and the code of a layer runs as it stands."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest

from smolora import cli
from smolora.backbones.families import FAMILIES
from smolora.evaluate.benchmarks import find_dataset
from smolora.evaluate.own import FORMATS, METRICS
from smolora.recipe import load_recipe
from support.tiny_llava import batch, tiny_llava

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path):
    """`kernels/`, `smolora/reference.py`, ...: a path in backquotes is one from the root, or from smolora/."""
    folders = "bench|csrc|docs|examples|kernels|recipes|smolora|tests|engine|methods|tuner"
    named = re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text(encoding="utf-8"))
    made = ("smolora/methods/gatedlora.py", "bench/results")  # by the reader, and by a run
    missing = [
        n for n in named if not n.startswith(made) and not any((ROOT / at / n).exists() for at in ("", "smolora"))
    ]
    assert not missing


def test_tables_are_those_of_the_results_that_are_kept():
    """No table of the pages has a figure that is not in bench/results."""
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "docs/make_tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    methods, minicvit = (page.read_text(encoding="utf-8") for page in tables.PAGES)
    for page in (methods, minicvit):
        assert tables.with_tables(page) == page and page.count("<!-- table: ") == page.count("<!-- end -->") > 1
    assert "| branchlora (3 seeds) |" in methods and "| smolora |" in minicvit


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_layer_of_the_readme():
    code, *_ = blocks("README.md", "python")
    names: dict = {}
    exec(compile(code, PAGES[0], "exec"), names)
    assert names["layer"].vu_B.grad is not None and names["layer"].base_layer.weight.grad is None


@pytest.mark.parametrize("page", ["docs/quickstart.md", "docs/layers.md"])
def test_a_layer_as_the_pages_have_it(page):
    code, *_ = blocks(page, "python")
    names: dict = {}
    exec(compile(code, page, "exec"), names)
    grads = [parameter.grad for parameter in (names["layer"].vu_B, names["layer"].if_B)]
    assert all(grad.abs().max() > 0 for grad in grads) and names["layer"].base_layer.weight.grad is None


def test_a_whole_model_as_the_page_has_it(tmp_path, monkeypatch):
    """Training, generation, routing, and the adapter that is saved, on a small LLaVA."""
    monkeypatch.chdir(tmp_path)
    inputs = batch((5, 9), answer=2)
    labels = inputs.pop("labels")
    names = {"llava": tiny_llava(), "inputs": inputs, "labels": labels}
    (code, *_) = blocks("docs/models.md", "python")
    exec(compile(code, "docs/models.md", "exec"), names)
    grads = {name: p.grad for name, p in names["model"].named_parameters() if p.requires_grad}
    assert any(grad is not None and grad.abs().max() > 0 for grad in grads.values())
    assert names["emb"].shape == (384,) and (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_the_architectures_of_the_page_are_those_of_the_table():
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (`.*?`) \|", page.partition("## Architectures")[2].partition("## Generation")[0], flags=re.M
    )
    types = [name for row in rows for name in re.findall(r"`([\w-]+)`", row)]
    assert sorted(types) == sorted(FAMILIES)


@pytest.mark.parametrize("page", ["docs/quickstart.md", "docs/recipes.md", "docs/reports.md"])
def test_commands_of_the_pages(page, two_runs, tmp_path, monkeypatch, capfd):
    """Each line that calls smolora, in a folder where small runs and their recipe have the names that the pages use.

    The demo's is tested with the demo, since it needs Gradio.
    """
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    shutil.copy(two_runs[0].parent / "recipe.yaml", "recipes/minicvit_run.yaml")
    Path("runs").mkdir()
    Path("runs/data").symlink_to(two_runs[0].parent / "data")  # where results.json says the test files are
    for folder in two_runs:
        for name in (folder.name, f"minicvit-{folder.name}"):
            shutil.copytree(folder, f"runs/{name}")
    lines = [line for block in blocks(page, "bash") for line in block.splitlines() if line.startswith("smolora ")]
    called = [shlex.split(line.partition(" > ")[0], comments=True)[1:] for line in lines]
    called = [arguments for arguments in called if arguments[0] != "demo"]
    assert called
    for arguments in called:
        assert cli.main(arguments) == 0, (arguments, capfd.readouterr().err)
    if page == "docs/reports.md":
        assert Path("runs/report/report.html").stat().st_size > 10_000


def test_the_recipe_of_ones_own_tasks(tmp_path):
    (text,) = blocks("docs/own_tasks.md", "yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    recipe = load_recipe(path)
    assert [task.benchmark_name for task in recipe.tasks] == [
        "metric exact + anls, format words 3",
        "metric relaxed, format number",
    ]
    assert all(find_dataset(task.benchmark_name) for task in recipe.tasks)
    page = (ROOT / "docs/own_tasks.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in (*METRICS, *FORMATS))


def test_the_recipe_of_the_page(tmp_path):
    (text,) = blocks("docs/recipes.md", "yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    recipe = load_recipe(path)
    assert [task.benchmark_name for task in recipe.tasks] == ["TextVQA", "Flickr30k"] and recipe.method == "smolora"
