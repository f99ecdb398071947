"""Where the packages lie, and the CUDA C++ extension; everything else about the project is in pyproject.toml.

The Triton kernels live in the top-level folder kernels/ and install as `smolora.kernels`: a top-level
`kernels` is a Hugging Face library that transformers looks for.

`smolora._C` comes from csrc/ by nvcc and ninja, and needs no torch: it is built for the cards that are present, and not
at all where there is none. In the environment:

    FORCE_CUDA            1: build it in any case, or fail; 0: do not build it
    TORCH_CUDA_ARCH_LIST  build for these, as in "8.0;9.0a;12.0+PTX"
    CUDA_HOME             where nvcc is, else nvcc on PATH, else /usr/local/cuda
    MAX_JOBS              compilers at a time

`smolora._cpu`, the passes of the torch backend for a CPU, comes from csrc/cpu* by the C++ compiler; where there is
none, torch's own operators compute the same, slower.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/*.cu"), ROOT / "csrc/bindings.cpp"])
CPU_SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu*.cpp"))
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")  # of FORCE_CUDA=1


class BuildError(RuntimeError):
    """The extension cannot be built here; the message says why."""


def find_nvcc() -> Path:
    """The CUDA compiler."""
    home = os.environ.get("CUDA_HOME")
    found = Path(home, "bin/nvcc") if home else shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc")
    if not Path(found).exists():
        raise BuildError(f"no nvcc: {found} does not exist (set CUDA_HOME to a CUDA toolkit)")
    return Path(found)


def known_architectures(nvcc: Path) -> set[str]:
    """What an nvcc can compile for, such as "80"."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"sm_(\d+)", listed))


def present_architectures() -> list[str]:
    """Compute capabilities of the cards in this machine, such as "90"."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    return sorted({line.replace(".", "") for line in listed.split() if re.fullmatch(r"\d+\.\d", line)}, key=int)


def number(architecture: str) -> int:
    return int(re.match(r"\d+", architecture)[0])


def choose_architectures(nvcc: Path) -> list[str]:
    """Architectures to build for, as in "80", "90a", "120+PTX"; none where the machine has no card."""
    known = known_architectures(nvcc)
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        chosen = []
        for name in re.split(r"[;,\s]+", asked.strip()):
            match = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", name)
            if match is None or match[1] + match[2] not in known or int(match[1]) < 8:
                raise BuildError(
                    f"TORCH_CUDA_ARCH_LIST must name architectures from 8.0 on that {nvcc} knows, as 9.0 or 9.0+PTX, "
                    f"got {name!r}"
                )
            chosen.append(f"{match[1]}{match[2]}{match[3]}{match[4] or ''}")
        return chosen
    wanted = ARCHITECTURES if os.environ.get("FORCE_CUDA") == "1" else present_architectures()
    chosen = [name for name in wanted if str(number(name)) in known and number(name) >= 80]
    if not chosen:
        return []
    return [*chosen[:-1], f"{chosen[-1]}+PTX"]  # of the newest, for cards to come


def code_options(architectures: list[str]) -> list[str]:
    """nvcc's options for machine code of each, and PTX where that is asked for."""
    options = []
    for name in architectures:
        plain = name.removesuffix("+PTX")
        options.append(f"-gencode=arch=compute_{plain},code=sm_{plain}")
        if name.endswith("+PTX"):
            options.append(f"-gencode=arch=compute_{number(plain)},code=compute_{number(plain)}")
    return options


def plan() -> tuple[Path, list[str]] | None:
    """The compiler and the architectures, or None for no extension.

    Raises:
        BuildError: it has to be built and cannot be.
    """
    force = os.environ.get("FORCE_CUDA")
    if force not in (None, "", "0", "1"):
        raise BuildError(f"FORCE_CUDA must be 0 or 1, got {force!r}")
    if force == "0":
        return None
    needed = force == "1" or bool(os.environ.get("TORCH_CUDA_ARCH_LIST"))
    if not needed and not present_architectures():
        return None
    try:
        nvcc = find_nvcc()
    except BuildError as error:
        if needed:
            raise
        print(f"smolora: built without CUDA C++ kernels: {error}")
        return None
    architectures = choose_architectures(nvcc)
    if not architectures:
        print(f"smolora: built without CUDA C++ kernels: {nvcc} compiles for none of the cards here")
        return None
    return nvcc, architectures


class NinjaBuild(build_ext):
    """Builds the CUDA extension with ninja: what did not change since the last time is not built again."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        if ext.name == "smolora._cpu":
            ext.include_dirs.append(pybind11.get_include())
            return super().build_extension(ext)
        nvcc, architectures = ext.plan
        names = " ".join(architectures)
        folder = Path(self.build_temp).absolute() / "csrc"
        folder.mkdir(parents=True, exist_ok=True)
        built_for = folder / "architectures.h"  # nvcc and quotes in a -D do not go together
        definition = f'#define SMOLORA_ARCHITECTURES "{names}"\n'
        if not built_for.exists() or built_for.read_text() != definition:
            built_for.write_text(definition)
        includes = [f"-I{path}" for path in (folder, pybind11.get_include(), sysconfig.get_path("include"))]
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        common = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -MD -MF $out.d"
        lines = [
            "rule cuda",
            f"  command = {nvcc} {common} {' '.join(code_options(architectures))} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule host",
            f"  command = {nvcc} {common} -DSMOLORA_MODULE=_C {' '.join(includes)} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {nvcc} -shared -cudart static $in -o $out",
        ]
        objects = []
        for source in ext.sources:
            out = folder / (Path(source).name + ".o")
            objects.append(str(out))
            lines.append(f"build {out}: {'cuda' if source.endswith('.cu') else 'host'} {ROOT.absolute() / source}")
        lines.append(f"build {target}: link {' '.join(objects)}")
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = os.environ.get("MAX_JOBS")
        command = [ninja(), "-C", str(folder), *(["-j", jobs] if jobs else [])]
        print(f"smolora: CUDA C++ kernels for {names}, with {nvcc}")
        if subprocess.run(command, check=False).returncode:
            raise BuildError("the CUDA C++ kernels did not compile; FORCE_CUDA=0 installs smolora without them")


def ninja() -> str:
    """The ninja of the Python package, or the one on PATH."""
    try:
        import ninja as package
    except ModuleNotFoundError:
        return "ninja"
    return os.path.join(package.BIN_DIR, "ninja")


planned = plan()
cpu = Extension(
    "smolora._cpu",
    CPU_SOURCES,
    depends=[str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu*.h")],
    extra_compile_args=["-std=c++17", "-O3", "-Wno-psabi", "-ffp-contract=fast"],
    optional=True,
)
extensions = [cpu]
if planned is not None:
    extensions.append(Extension("smolora._C", SOURCES))
    extensions[1].plan = planned

setup(
    packages=[*find_packages(include=["smolora", "smolora.*"]), "smolora.kernels"],
    package_dir={"smolora.kernels": "kernels"},
    ext_modules=extensions,
    cmdclass={"build_ext": NinjaBuild},
)
