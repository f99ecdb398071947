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
from support.project import ROOT, add_packages, copy_project, empty_environment

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


# no compiler for the CPU: its extension is optional, takes longer than all else here, and is installed before any test
NO_CPU = {"CC": "false", "CXX": "false"}
LINKS_NOTHING = """#!/bin/sh
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then : > "$2"; fi
  shift
done
"""


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A machine with a stand-in for nvcc and no card; `setup(...)` gives the architectures of a build, the reason why
    there is none, or None where none is wanted."""

    def setup(known: str | None = KNOWN, cards: str = "", **environment: str) -> list[str] | str | None:
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
        setup.namespace = runpy.run_path(str(ROOT / "setup.py"))
        plans = {extension.name: getattr(extension, "plan", None) for extension in captured["ext_modules"]}
        assert plans.pop("smolora._cpu") is None  # in any case
        return plans["smolora._C"][1] if plans else captured["cmdclass"]["build_ext"].log or None

    return setup


def test_what_is_built(machine):
    """For the cards that are there; for none of them, nothing."""
    assert machine() is None
    assert machine(cards="9.0\\n8.0\\n9.0\\n") == ["80", "90+PTX"]
    assert machine(cards="9.0\\n", FORCE_CUDA="0") is None
    assert machine(cards="7.5\\n") is None and machine(cards="7.5\\n8.6\\n") == ["86+PTX"]
    assert "no nvcc: " in machine(known=None, cards="9.0\\n")  # never in silence
    assert "compiles for none of sm_90" in machine(known="sm_50", cards="9.0\\n")
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
        (dict(FORCE_CUDA="1", known="sm_50"), "compiles for none of sm_80, sm_86"),
        (dict(TORCH_CUDA_ARCH_LIST="9.0", known=None), "no nvcc"),
    ],
)
def test_what_cannot_be_built(machine, environment: dict, message: str):
    """Asked for, it is built or an error says why."""
    with pytest.raises(SystemExit, match=message):
        machine(**environment)


def test_rebuilds_what_changed(tmp_path: Path):
    """One file changed, one file compiled; a header changed, all that include it."""
    for name in ("setup.py", "csrc", "smolora/__init__.py"):
        target = tmp_path / "project" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
    log = tmp_path / "log"
    script(tmp_path / "cuda/bin/nvcc", NVCC.format(known=KNOWN, log=log))
    environment = {**os.environ, **NO_CPU, "CUDA_HOME": str(tmp_path / "cuda"), "TORCH_CUDA_ARCH_LIST": "9.0a"}
    environment["MAX_JOBS"] = "1"
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
        kept = {n: value for n, value in os.environ.items() if n not in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST")}
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
    script(tmp_path / "bin/cc", LINKS_NOTHING)
    compilers = {"CC": f"{tmp_path}/bin/cc", "CXX": f"{tmp_path}/bin/cc", "LDSHARED": f"{tmp_path}/bin/cc"}
    names, wheel = wheel_from_sdist(
        tmp_path, CUDA_HOME=str(tmp_path / "cuda"), TORCH_CUDA_ARCH_LIST="9.0a", **compilers
    )
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
    """Built here for every architecture, unpacked where there is no nvcc: the kernels load, and say what they need."""
    environment = {"CUDA_HOME": str(Path(cuda_report.find_nvcc()).parents[1])}
    _, wheel = wheel_from_sdist(tmp_path, FORCE_CUDA="1", **environment)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import json, smolora; print(json.dumps([smolora.__file__, smolora.backend_info()['backends']['cuda']]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path / "site"), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    file, info = json.loads(done.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(tmp_path / "site")
    assert info["architectures"] == "80 86 89 90a 100 120+PTX" and info["version"] and not info["available"]
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
def test_unavailable_reasons(driver: int, cards: list, reason: str | None, monkeypatch: pytest.MonkeyPatch):
    """What stands between the built kernels and this machine, told in words."""
    built = ModuleType("built")
    built.emulated, built.runtime_version, built.architectures = False, 13000, "89 90a 120+PTX"
    built.driver_version = lambda: driver
    monkeypatch.setattr(cuda, "extension", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: cards[i])
    found = cuda.unavailable_reason()
    assert found is None if reason is None else reason in found
    assert cuda.info()["driver"] == "580 or newer" and cuda.info()["architectures"] == "89 90a 120+PTX"


def test_not_built(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "extension", None)
    monkeypatch.setattr(cuda, "_missing", "said by the import")
    assert cuda.unavailable_reason() == "said by the import"
    assert cuda.info()["version"] is None and "no measurement" in cuda.info()["auto"]


# ------------------------------------------------------------------------------------------------- builds that fail

ERROR = "decode.cu(98): error: calling a __device__ function is not allowed"
FAILS = (
    "if [ \"$(basename $last)\" = decode.cu.o ]; then echo 'warning: odd'; echo '{error}' >&2; echo '  ^'; exit 2; fi\n"
)


@pytest.fixture
def failing(tmp_path: Path):
    """A copy of the project where nvcc does not compile one source, and there is a card; `run(command, ...)` in it."""
    project = copy_project(tmp_path / "project")
    lines = NVCC.format(known=KNOWN, log=tmp_path / "log").splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.startswith("for last"))
    script(tmp_path / "cuda/bin/nvcc", "".join([*lines[: at + 1], FAILS.format(error=ERROR), *lines[at + 1 :]]))
    script(tmp_path / "bin/nvidia-smi", "#!/bin/sh\necho 9.0\n")
    kept = {n: v for n, v in os.environ.items() if n not in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS")}
    kept |= {"CUDA_HOME": str(tmp_path / "cuda"), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    kept |= NO_CPU

    def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            list(map(str, command)),
            cwd=project,
            env=kept | environment,
            text=True,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    run.project, run.nvcc = project, tmp_path / "cuda/bin/nvcc"
    return run


SETUP = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
IN_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


def test_a_failed_build_leaves_the_extension_out(failing, tmp_path: Path):
    """pip installs all else, says so on the terminal, and what the compiler said is found from the installation."""
    python = empty_environment(tmp_path / "environment")
    done = failing(sys.executable, "-c", IN_TERMINAL, python, "-m", "pip", "install", "--no-deps", "-e", ".")
    assert done.returncode == 0, done.stdout
    add_packages(python)
    frame = [line for line in done.stdout.splitlines() if line.startswith(("|", "+-"))]
    assert frame[0] == frame[-1] == "+" + "-" * 98 + "+" and {len(line) for line in frame} == {100}
    assert "WITHOUT its CUDA C++ kernels" in frame[1] and ERROR in frame[2] and "smolora doctor" in frame[3]
    code = "import json, smolora; print(json.dumps(smolora.backend_info()['backends']['cuda']))"
    info = json.loads(failing(python, "-c", code).stdout.splitlines()[-1])
    assert not info["available"] and info["build_error"] == ERROR and ERROR in info["reason"]
    log = Path(info["build_log"])
    assert log == failing.project / "smolora/_C.log" and "FAILED: " in log.read_text() and "^" in log.read_text()


def test_a_failed_build_that_was_asked_for_fails(failing):
    """With the compiler's error as the last line, and no traceback after it."""
    for environment in (dict(FORCE_CUDA="1"), dict(TORCH_CUDA_ARCH_LIST="9.0")):
        done = failing(*SETUP, **environment)
        assert done.returncode == 1 and done.stdout.splitlines()[-1] == ERROR, done.stdout
        assert "Traceback" not in done.stdout and "FORCE_CUDA=0" in done.stdout
    assert not list(failing.project.glob("smolora/_C.*"))


def test_no_installation_has_what_an_earlier_one_built(failing):
    """After a failure, or without CUDA, there is no extension; after a success no log of a failure."""
    built = lambda: {path.suffix for path in failing.project.glob("smolora/_C.*")}  # noqa: E731
    broken, works = failing.nvcc.read_text(), failing.nvcc.read_text().replace("exit 2", ":")
    for nvcc, environment, left in (
        (works, {}, {".so"}),
        (broken, {}, {".log"}),
        (works, {}, {".so"}),
        (works, {"FORCE_CUDA": "0"}, set()),
        (broken, {}, {".log"}),
        (broken, {"FORCE_CUDA": "0"}, set()),
    ):
        failing.nvcc.write_text(nvcc)
        shutil.rmtree(failing.project / "build", ignore_errors=True)
        assert failing(*SETUP, **environment).returncode == 0
        assert built() == left


@pytest.mark.parametrize(
    ("output", "error"),
    [
        ("[1/7] nvcc a.cu\nFAILED: a.o\nnvcc a.cu\na.cu(9): warning: x\na.cu(8): error: y\n  ^", "a.cu(8): error: y"),
        ("a.cu(8): error: y\nb.cu(7): error: z", "a.cu(8): error: y"),
        ("FAILED: a.o\nh.h:13:2: error: #error -- unsupported", "h.h:13:2: error: #error -- unsupported"),
        ("a.cu(7): error #20: y", "a.cu(7): error #20: y"),
        ("nvcc fatal   : Unsupported gpu architecture", "nvcc fatal   : Unsupported gpu architecture"),
        ("a.cu:1:10: fatal error: b.h: No such file", "a.cu:1:10: fatal error: b.h: No such file"),
        ("FAILED: a.o\nnvcc /error/a.cu\nKilled\nninja: build stopped: subcommand failed.", "Killed"),
        ("", "the compiler says nothing"),
    ],
)
def test_the_first_error(machine, output: str, error: str):
    machine()
    assert machine.namespace["first_error"](output) == error
