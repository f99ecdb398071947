"""A copy of the project, and environments that it is installed into."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests/golden"  # outputs of released codes
MADE = ("__pycache__", "*.egg-info", "*.so", "_C.log", "results")
MADE_AT_TOP = ("build", "data", "dist", "runs", ".*")


def copy_project(folder: Path) -> Path:
    """The project as a fresh checkout has it, without the measurements."""
    below, top = shutil.ignore_patterns(*MADE), shutil.ignore_patterns(*MADE, *MADE_AT_TOP)
    return Path(shutil.copytree(ROOT, folder, ignore=lambda at, names: (top if Path(at) == ROOT else below)(at, names)))


def empty_environment(folder: Path) -> Path:
    """The Python of a new environment with pip and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder / "bin/python"


def add_packages(python: Path) -> None:
    """Let an environment see the packages of this one after its own."""
    (place,) = python.parents[1].glob("lib/python*/site-packages")
    paths = site.getsitepackages() + [site.getusersitepackages()] * bool(site.ENABLE_USER_SITE)
    lines = [f"import site; site.addsitedir({path!r})" for path in paths]
    (place / "underneath.pth").write_text("\n".join(lines) + "\n")
