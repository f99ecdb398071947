"""What somebody with a GPU runs first, for real and as far as it goes without one."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import cuda_report
from support.project import ROOT, add_packages, copy_project, empty_environment

NVCC = cuda_report.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc, and there is none")
NO_CARD = {"CUDA_VISIBLE_DEVICES": ""}
# no extension for the CPU, which every test's own installation has compiled; nvcc finds its host compiler by itself
NO_CPU = {"CC": "false", "CXX": "false"}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints; it has to succeed."""
    kept = {n: v for n, v in os.environ.items() if n not in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "TRITON_INTERPRET")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**kept, **NO_CARD, **environment},
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fresh checkout."""
    folder = tmp_path_factory.mktemp("first") / "project"
    yield copy_project(folder)
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="module")
def set_up(project: Path) -> str:
    """What `make gpu-setup` prints."""
    variables = (f"PYTHON={sys.executable}", "SEES_GPU=-c pass", "PIP_FLAGS=")
    return run("make", "gpu-setup", *variables, cwd=project, FORCE_CUDA="0", **NO_CPU)


@pytest.fixture(scope="module")
def built(project: Path, set_up: str) -> Path:
    """The Python of an environment with nothing but pip, into which pip has installed the checkout, built by nvcc."""
    python = empty_environment(project.parent / "empty")
    run(
        *(python, "-m", "pip", "install", "--no-deps", "-e", "."),
        cwd=project,
        CUDA_HOME=str(Path(NVCC).parents[1]),
        FORCE_CUDA="1",
        TORCH_CUDA_ARCH_LIST="9.0",
        **NO_CPU,
    )
    add_packages(python)  # torch, and what else smolora needs to run
    return python


def test_gpu_setup(project: Path, set_up: str):
    """smolora over the packages of a Python that sees a GPU, and what would run."""
    info = json.loads(set_up[set_up.index("\n{\n") :])
    assert info["backends"]["torch"]["version"] == torch.__version__
    assert "no CUDA C++ kernels" in info["backends"]["cuda"]["reason"]
    file = run(project / ".venv-gpu/bin/python", "-c", "import smolora; print(smolora.__file__)", cwd="/")
    assert Path(file.strip()) == project / "smolora/__init__.py"


ENTRIES = """
import json, smolora, smolora._C as built
said = {}
for name in dir(built):
    entry = getattr(built, name)
    if name.startswith("_") or not callable(entry) or name == "driver_version":
        continue
    said[name] = []
    for fields in ({}, {"typo": 1}, {"banks": [{"A": (64, 4)}]}):
        try:
            said[name].append(entry(fields))
        except Exception as error:
            said[name].append(f"{type(error).__name__}: {error}")
try:
    built.decode()
except Exception as error:
    said["decode()"] = f"{type(error).__name__}: {error}"
try:
    smolora.use_backend("cuda").__enter__()
except Exception as error:
    said["use_backend"] = f"{type(error).__name__}: {error}"
print(json.dumps([built.__file__, built.driver_version(), smolora.backend_info()["backends"]["cuda"], said]))
"""


@needs_nvcc
def test_installed_with_nvcc(project: Path, built: Path):
    """All sources compile for a card, the module loads without one, and every entry answers as far as it can."""
    file, driver, info, said = json.loads(run(built, "-c", ENTRIES, cwd="/").splitlines()[-1])
    assert Path(file).parent == project / "smolora"
    assert info["architectures"] == "90" and not info["available"] and "build_error" not in info
    reason = "there is no NVIDIA driver" if driver == 0 else "torch sees no CUDA device|driver is for CUDA"
    assert any(text in info["reason"] for text in reason.split("|"))
    assert said.pop("use_backend") == f"RuntimeError: backend 'cuda' cannot run: {info['reason']}"
    assert said.pop("decode()") == "ValueError: decode takes 1 to 4 projections, got 0"
    assert said.keys() == {"decode", "route_shrink", "fuse_expand", "grad_output", "grad_input"}
    for name, (nothing, typo, dtype) in said.items():
        assert nothing.startswith("RuntimeError: cudaSetDevice: cudaError"), name
        assert typo.startswith("TypeError: unknown field among {'typo': 1}"), name
        assert "must be float32, float16, bfloat16 or float64" in dtype, name


@pytest.fixture
def until_card(project: Path, set_up: str, request: pytest.FixtureRequest) -> str:
    """The Python of `make gpu-setup`, for programs that run as far as they come without a card."""
    if NVCC is not None:
        request.getfixturevalue("built")  # in the same checkout
    return f"{project}/.venv-gpu/bin/python {project}/tests/lib/support/until_card.py"


def make(project: Path, target: str, *variables: str, **environment: str) -> str:
    """What one of the Makefile's parts for a GPU prints."""
    support = {"PYTHONPATH": "tests/lib", "OMP_NUM_THREADS": "1"}
    return run("make", target, "GPU_WORKERS=0", *variables, cwd=project, **support, **environment)


def test_gpu_tests(project: Path, until_card: str):
    """Every test for a GPU comes as far as asking for it."""
    output = make(project, "gpu-tests", f"ON_GPU={until_card}")
    asked = sum(map(int, re.findall(r"^SKIPPED \[(\d+)\] .*: asks for a card$", output, re.M)))
    passed = sum(map(int, re.findall(r"(\d+) passed", output)))
    assert asked > 400 and passed < 5 and "failed" not in output, output  # as those few do that refuse something


def test_gpu_sanitizer(project: Path, until_card: str, tmp_path: Path):
    """So do those under compute-sanitizer, with the options it is called with."""
    stand_in = tmp_path / "compute-sanitizer"
    stand_in.write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift 2; done\nexec "$@"\n')  # options have values
    stand_in.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    make(project, "gpu-sanitizer", f"GPU={until_card}", "SANITIZERS=memcheck", PATH=path)
    log = (project / "bench/results/gpu-memcheck.log").read_text()
    assert re.search(r"^=+ \d+ skipped, \d+ deselected in", log, re.M) and "asks for a card" in log, log


@pytest.mark.parametrize("part", ["gpu-bench", "gpu-train", "gpu-decode", "gpu-evaluate"])
def test_gpu_benches(project: Path, until_card: str, part: str):
    """Every benchmark takes its arguments, and comes as far as asking for a card."""
    output = make(project, part, f"ON_GPU={until_card}")
    commands = output.count("until_card.py bench/")
    assert commands > 0 and output.splitlines().count("asks for a card") == commands, output


@pytest.mark.parametrize("there", [True, False])
def test_ci_wants_what_nvcc_makes_possible(there: bool, tmp_path: Path):
    """A run whose build was skipped for lack of nvcc fails where there is one."""
    (tmp_path / "bin").mkdir()
    for name, line in {
        "make": "echo 'SKIPPED [1] tests/csrc/test_first_run.py:98: needs nvcc, and there is none'",
        "nvcc": "",
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    home = tmp_path if there else tmp_path / "nowhere"
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CUDA_HOME": str(home)}
    done = subprocess.run([ROOT / ".ci/run"], env=environment, capture_output=True, text=True)
    assert done.returncode == there and "SKIPPED" in done.stdout
    assert ("there is an nvcc" in done.stderr) == there
