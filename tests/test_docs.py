"""README and docs: links lead to files, and the code of a layer runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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


def test_the_layer_of_the_readme():
    code, *_ = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict = {}
    exec(compile(code, PAGES[0], "exec"), names)
    assert names["layer"].vu_B.grad is not None and names["layer"].base_layer.weight.grad is None
