"""setup.py: what is built for which machine, and a build with a compiler that only says what it was asked."""

import json
import os
import runpy
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch

import cuda_report
from smolora.engine import cuda_build as cuda

ROOT = Path(__file__).parents[2]
KNOWN = "sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120"
NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-code ]; then echo {known} | tr ' ' '\\n'; exit; fi
for last; do :; done
echo "$last" >> {log}
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then : > "$2"; fi
  if [ "$1" = -MF ]; then echo "out: $last" > "$2"; deps="$2"; fi
  if [ "$1" = -c ]; then echo "out.o: $2" > "$deps"; fi
  shift
done
"""


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A machine with a stand-in for nvcc and no card; `setup(...)` gives the architectures of a build, or None."""

    def setup(known: str | None = KNOWN, cards: str = "", **environment: str) -> list[str] | None:
        for name in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
        shutil.rmtree(tmp_path / "cuda", ignore_errors=True)
        if known is not None:
            script(tmp_path / "cuda/bin/nvcc", NVCC.format(known=known, log=tmp_path / "log"))
        script(tmp_path / "bin/nvidia-smi", f"#!/bin/sh\nprintf '{cards}'\n")
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        captured = {}
        monkeypatch.setattr(setuptools, "setup", lambda **keywords: captured.update(keywords))
        runpy.run_path(str(ROOT / "setup.py"))
        plans = {extension.name: getattr(extension, "plan", None) for extension in captured["ext_modules"]}
        assert plans.pop("smolora._cpu") is None  # in any case
        return plans["smolora._C"][1] if plans else None

    return setup


def test_what_is_built(machine, capsys: pytest.CaptureFixture):
    """For the cards that are there; for none of them, nothing."""
    assert machine() is None
    assert machine(cards="9.0\\n8.0\\n9.0\\n") == ["80", "90+PTX"]
    assert machine(cards="9.0\\n", FORCE_CUDA="0") is None
    assert capsys.readouterr().out == ""
    assert machine(known=None, cards="9.0\\n") is None
    assert "built without CUDA C++ kernels: no nvcc" in capsys.readouterr().out  # never in silence
    assert machine(known="sm_50", cards="9.0\\n") is None
    assert "compiles for none of the cards" in capsys.readouterr().out
    assert machine(FORCE_CUDA="1") == ["80", "86", "89", "90a", "100", "120+PTX"]
    assert machine(FORCE_CUDA="1", known="sm_80 sm_86 sm_89 sm_90") == ["80", "86", "89", "90a+PTX"]
    assert machine(TORCH_CUDA_ARCH_LIST="8.0;9.0a 12.0+PTX") == ["80", "90a", "120+PTX"]
    assert machine(TORCH_CUDA_ARCH_LIST="9.0", cards="8.0\\n") == ["90"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (dict(FORCE_CUDA="yes"), "FORCE_CUDA must be 0 or 1, got 'yes'"),
        (dict(TORCH_CUDA_ARCH_LIST="Hopper"), "as 9.0 or 9.0\\+PTX, got 'Hopper'"),
        (dict(TORCH_CUDA_ARCH_LIST="9.0;5.0"), "got '5.0'"),
        (dict(TORCH_CUDA_ARCH_LIST="7.5"), "from 8.0 on"),
        (dict(FORCE_CUDA="1", known=None), "no nvcc: .*cuda/bin/nvcc does not exist"),
        (dict(TORCH_CUDA_ARCH_LIST="9.0", known=None), "no nvcc"),
    ],
)
def test_what_cannot_be_built(machine, environment: dict, message: str):
    """Asked for, it is built or an error says why."""
    with pytest.raises(RuntimeError, match=message):
        machine(**environment)


def test_rebuilds_what_changed(tmp_path: Path):
    """One file changed, one file compiled; a header changed, all that include it."""
    for name in ("setup.py", "csrc", "smolora/__init__.py"):
        target = tmp_path / "project" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
    log = tmp_path / "log"
    script(tmp_path / "cuda/bin/nvcc", NVCC.format(known=KNOWN, log=log))
    environment = {**os.environ, "CUDA_HOME": str(tmp_path / "cuda"), "TORCH_CUDA_ARCH_LIST": "9.0a", "MAX_JOBS": "1"}
    environment.pop("FORCE_CUDA", None)

    def build() -> int:
        log.write_text("")
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=tmp_path / "project", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return len(log.read_text().splitlines())

    sources = len(list(ROOT.glob("csrc/*.cu"))) + 1
    assert build() == sources + 1  # and the link
    assert list((tmp_path / "project/smolora").glob("_C.*"))
    assert build() == 0
    with open(tmp_path / "project/csrc/decode.cu", "a") as file:
        file.write("\n")
    assert build() == 2


BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def wheel_from_sdist(folder: Path, **environment: str) -> tuple[set[str], Path]:
    """What `python -m build` makes of the files that git tracks: the names in the sdist, and the wheel of these."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: (ROOT / name).exists(), listed.splitlines()):
        (folder / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "project" / name)

    def build(what: str, source: Path) -> Path:
        command = [sys.executable, "-c", BUILD, f"build_{what}", folder]
        kept = {name: value for name, value in os.environ.items() if name != "FORCE_CUDA"}
        done = subprocess.run(command, cwd=source, env={**kept, **environment}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return folder / done.stdout.splitlines()[-1]

    with tarfile.open(build("sdist", folder / "project")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(folder / "sources", filter="data")
    (source,) = (folder / "sources").iterdir()
    return names, build("wheel", source)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
def test_sdist_and_wheel(tmp_path: Path):
    """The sdist has every file of the project, and the wheel that comes from it the kernels of both kinds."""
    script(tmp_path / "cuda/bin/nvcc", NVCC.format(known=KNOWN, log=tmp_path / "log"))
    names, wheel = wheel_from_sdist(tmp_path, CUDA_HOME=str(tmp_path / "cuda"), TORCH_CUDA_ARCH_LIST="9.0a")
    tracked = {str(path.relative_to(tmp_path / "project")) for path in (tmp_path / "project").rglob("*")}
    missing = {name for name in tracked - names if name.split("/")[0] not in (".ci", ".gitignore")}
    assert {name for name in missing if not name.startswith("smolora.egg-info")} == set()
    inside = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"smolora/{path.relative_to(ROOT)}" for path in ROOT.glob("kernels/*.py")}
    extensions = {f"smolora/{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in ("_C", "_cpu")}
    assert modules | extensions <= inside
    assert not any(name.startswith(("kernels/", "csrc/", "tests/", "bench/")) for name in inside)


@pytest.mark.slow
@pytest.mark.skipif(cuda_report.find_nvcc() is None, reason="needs nvcc, and there is none")
def test_wheel_works_without_nvcc(tmp_path: Path):
    """Built here, unpacked where there is no nvcc: the kernels load, and say what else they need."""
    environment = {"CUDA_HOME": str(Path(cuda_report.find_nvcc()).parents[1])}
    _, wheel = wheel_from_sdist(tmp_path, TORCH_CUDA_ARCH_LIST="8.0", **environment)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import json, smolora; print(json.dumps([smolora.__file__, smolora.backend_info()['backends']['cuda']]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path / "site"), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    file, info = json.loads(done.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(tmp_path / "site")
    assert info["architectures"] == "80" and info["version"] and not info["available"]
    assert "NVIDIA driver" in info["reason"] or "no CUDA device" in info["reason"]


def test_runs_on():
    """Machine code runs on its generation from its minor version on, "a" on that card alone, PTX on what is newer."""
    assert cuda.runs_on((8, 0), "80 90a") and cuda.runs_on((8, 6), "80") and not cuda.runs_on((8, 0), "86")
    assert cuda.runs_on((9, 0), "90a") and not cuda.runs_on((10, 0), "90a") and not cuda.runs_on((9, 0), "80")
    assert cuda.runs_on((12, 1), "100 120+PTX") and cuda.runs_on((13, 0), "90a+PTX")
    assert not cuda.runs_on((8, 9), "90+PTX")


@pytest.mark.parametrize(
    ("driver", "cards", "reason"),
    [
        (0, [], "there is no NVIDIA driver; these kernels need 580 or newer"),
        (12080, [(9, 0)], "driver is for CUDA 12.8; these kernels need 580 or newer"),
        (13000, [], "torch sees no CUDA device"),
        (13000, [(8, 6), (8, 7)], "not for compute capability 8.6, 8.7; TORCH_CUDA_ARCH_LIST='8.6, 8.7' pip install"),
        (13000, [(7, 5), (7, 0)], "need compute capability 8.0 or newer, and the cards have 7.0, 7.5"),
        (13010, [(9, 0), (7, 5)], None),
    ],
)
def test_obstacles(driver: int, cards: list, reason: str | None, monkeypatch: pytest.MonkeyPatch):
    """What stands between the built kernels and this machine, told in words."""
    built = ModuleType("built")
    built.emulated, built.runtime_version, built.architectures = False, 13000, "89 90a 120+PTX"
    built.driver_version = lambda: driver
    monkeypatch.setattr(cuda, "extension", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: cards[i])
    found = cuda.obstacle()
    assert found is None if reason is None else reason in found
    assert cuda.info()["driver"] == "580 or newer" and cuda.info()["architectures"] == "89 90a 120+PTX"


def test_not_built(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "extension", None)
    monkeypatch.setattr(cuda, "_missing", "said by the import")
    assert cuda.obstacle() == "said by the import"
    assert cuda.info()["version"] is None and "no measurement" in cuda.info()["auto"]
