"""Where the packages lie, and the CUDA C++ extension; everything else about the project is in pyproject.toml.

The Triton kernels live in the top-level folder kernels/ and install as `smolora.kernels`: a top-level
`kernels` is a Hugging Face library that transformers looks for.

`smolora._C` comes from csrc/ by nvcc and ninja, and needs no torch: it is built for the cards that are present, and not
at all where there is none. If that fails, smolora installs without it, and `smolora/_C.log` keeps the reason, in its
first line, and what the compiler said. In the environment:

    FORCE_CUDA            1: build it in any case, or fail; 0: do not build it
    TORCH_CUDA_ARCH_LIST  build for these, as in "8.0;9.0a;12.0+PTX", or fail
    CUDA_HOME             where nvcc is, else nvcc on PATH, else /usr/local/cuda
    MAX_JOBS              compilers at a time

`smolora._cpu`, the passes compiled for a CPU, comes from csrc/cpu/ by the C++ compiler; where there is none, torch
computes the same more slowly.
"""

import atexit
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from contextlib import suppress
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("csrc/*.cu"), ROOT / "csrc/bindings.cpp"])
CPU_SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp"))
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")  # of FORCE_CUDA=1


class BuildError(SystemExit):
    """The extension cannot be built here; ends the installation with the reason as the last line, and no traceback.

    Args:
        reason: why.
        output: what the compilers said.
    """

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


def find_nvcc() -> Path:
    """The CUDA compiler."""
    home = os.environ.get("CUDA_HOME")
    found = Path(home, "bin/nvcc") if home else shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc")
    if not Path(found).exists():
        raise BuildError(f"no nvcc: {found} does not exist (set CUDA_HOME to a CUDA toolkit)")
    return Path(found)


def known_architectures(nvcc: Path) -> set[str]:
    """What an nvcc can compile for, such as "80"."""
    try:
        listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{nvcc} does not run: {getattr(error, 'stderr', '').strip() or error}") from None
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


def forced() -> bool:
    """Whether the extension was asked for, so that it is built or the installation fails."""
    return os.environ.get("FORCE_CUDA", "") not in ("", "0") or bool(os.environ.get("TORCH_CUDA_ARCH_LIST"))


def choose_architectures(nvcc: Path, cards: list[str]) -> list[str]:
    """Architectures to build for, as in "80", "90a", "120+PTX"."""
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
    wanted = ARCHITECTURES if forced() else cards
    chosen = [name for name in wanted if str(number(name)) in known]
    if not chosen:
        raise BuildError(f"{nvcc} compiles for none of sm_{', sm_'.join(wanted)}: a newer CUDA toolkit does")
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
    """The compiler and the architectures; None where no extension is wanted.

    Raises:
        BuildError: it is wanted, and cannot be built.
    """
    force = os.environ.get("FORCE_CUDA")
    if force not in (None, "", "0", "1"):
        raise BuildError(f"FORCE_CUDA must be 0 or 1, got {force!r}")
    cards = [name for name in present_architectures() if number(name) >= 80]
    if force == "0" or not (forced() or cards):
        return None
    nvcc = find_nvcc()
    return nvcc, choose_architectures(nvcc, cards)


def run_ninja(command: list[str]) -> tuple[bool, str]:
    """Whether a build succeeds, and what it prints, which is printed as it comes."""
    lines = []
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    with subprocess.Popen(command, **pipes) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode == 0, "".join(lines)


def first_error(output: str) -> str:
    """The line with a compiler's first error, or the last line where none is called so."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith(("[", "ninja: "))]
    errors = (line for line in lines if re.search(r"\b(error|fatal)( #\S+)?\s*:", line))
    return next(errors, lines[-1] if lines else "the compiler says nothing")


def framed(reason: str) -> str:
    """What is said of an extension that was left out."""
    paragraphs = (
        "smolora is installed WITHOUT its CUDA C++ kernels, which could not be built:",
        reason,
        "It runs without them. `smolora doctor` says what to do and where all that the compiler said is kept. With "
        "FORCE_CUDA=1 the installation fails instead, with FORCE_CUDA=0 it does not try.",
    )
    lines = [line for text in paragraphs for line in textwrap.wrap(text, 96)]
    return "\n".join(["+" + "-" * 98 + "+", *(f"| {line:96} |" for line in lines), "+" + "-" * 98 + "+"])


def tell(text: str) -> None:
    """Print, also to the terminal behind pip, which shows nothing of a build that succeeds."""
    print(text, flush=True)
    if not sys.stdout.isatty():
        with suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(f"\n{text}\n")


class NinjaBuild(build_ext):
    """Builds the CUDA extension with ninja: what did not change since the last time is not built again.

    Attributes:
        log: the reason why the extension was left out, and after it what the compiler said; "" if it was not.
    """

    log = ""

    def run(self) -> None:
        super().run()
        target = Path(self.get_ext_fullpath("smolora._C"))  # of an editable installation, among the sources
        if self.log or "smolora._C" not in self.ext_map:
            target.unlink(missing_ok=True)  # from an earlier installation
        target.with_name("_C.log").unlink(missing_ok=True)
        if self.log:
            target.with_name("_C.log").write_text(self.log, encoding="utf-8")
            atexit.register(tell, framed(self.log.partition("\n")[0]))  # so that it is said last

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        if ext.name == "smolora._cpu":
            ext.include_dirs.append(pybind11.get_include())
            return super().build_extension(ext)
        try:
            self.build_cuda(ext, *ext.plan, pybind11.get_include())
        except BuildError as error:
            if forced():
                print("smolora: FORCE_CUDA=0 installs it without its CUDA C++ kernels", flush=True)
                raise
            self.log = f"{error}\n\n{error.output}"

    def build_cuda(self, ext: Extension, nvcc: Path, architectures: list[str], pybind11: str) -> None:
        """Compile and link the CUDA extension.

        Raises:
            BuildError: a compiler says no.
        """
        names = " ".join(architectures)
        folder = Path(self.build_temp).absolute() / "csrc"
        folder.mkdir(parents=True, exist_ok=True)
        built_for = folder / "architectures.h"  # nvcc and quotes in a -D do not go together
        definition = f'#define SMOLORA_ARCHITECTURES "{names}"\n'
        if not built_for.exists() or built_for.read_text() != definition:
            built_for.write_text(definition)
        includes = [f"-I{path}" for path in (folder, pybind11, sysconfig.get_path("include"))]
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
        command = [find_ninja(), "-C", str(folder), *(["-j", jobs] if jobs else [])]
        print(f"smolora: CUDA C++ kernels for {names}, with {nvcc}")
        built, output = run_ninja(command)
        if not built:
            raise BuildError(first_error(output), output)


def find_ninja() -> str:
    """The ninja of the Python package, or the one on PATH."""
    with suppress(ModuleNotFoundError):
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("no ninja: pip install ninja, or build with isolation")
    return found


extensions = [
    Extension(
        "smolora._cpu",
        CPU_SOURCES,
        depends=[str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.h")],
        extra_compile_args=["-std=c++17", "-O3", "-Wno-psabi"],
        optional=True,
    ),
    Extension("smolora._C", SOURCES, optional=not forced()),
]
try:
    extensions[1].plan = plan()
except BuildError as error:
    if forced():
        raise
    extensions[1].plan, NinjaBuild.log = None, str(error)
if extensions[1].plan is None:
    del extensions[1]

setup(
    packages=[*find_packages(include=["smolora", "smolora.*"]), "smolora.kernels"],
    package_dir={"smolora.kernels": "kernels"},
    ext_modules=extensions,
    cmdclass={"build_ext": NinjaBuild},
)
