"""Which code runs a layer, how that is chosen, and that nothing falls back in silence."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import smolora
from smolora import backends
from smolora.engine import cpu_passes
from support.marks import INTERPRETED, interpreter

# what the CUDA backend lacks without a GPU: it was not built, or it was and there is no driver or no card
NO_CUDA = r"no CUDA C\+\+ kernels|no NVIDIA driver|NVIDIA driver is for|no CUDA device"


@pytest.fixture
def layer() -> smolora.FusedSMoLoRA:
    config = smolora.SMoLoRAConfig(r=4, instruction_dim=8, num_vu_experts=2, num_if_experts=2, lora_dropout=0)
    return smolora.FusedSMoLoRA(torch.nn.Linear(6, 10), config)


def run(layer: smolora.FusedSMoLoRA, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return layer(torch.randn(2, 3, 6, dtype=dtype), instruction=torch.randn(2, 8))


def requested() -> str:
    return smolora.backend_info()["requested"]


# --------------------------------------------------------------------------------------------------- inside one process


def test_use_backend_restores():
    """Nested blocks come back one by one, also when one ends by an exception."""
    before = requested()
    with smolora.use_backend("torch"):
        assert requested() == "torch"
        with smolora.use_backend("auto"):
            assert requested() == "auto"
        assert requested() == "torch"
        with pytest.raises(KeyError), smolora.use_backend("auto"):
            raise KeyError("whatever the user's code raises")
        assert requested() == "torch"
    assert requested() == before


@pytest.mark.parametrize("name", ["Torch", "", "cpu", None])
def test_unknown_backend(name: str | None):
    """A name that is none changes nothing, and the message lists the names."""
    before = requested()
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'torch', 'triton', 'cuda', got") as raised:
        smolora.use_backend(name).__enter__()
    assert repr(name) in str(raised.value)
    assert requested() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels may run here")
def test_cuda_without_gpu():
    """Without a GPU the CUDA backend cannot run, built or not: entering says why, and leaves no trace."""
    before = requested()
    with pytest.raises(RuntimeError, match=f"'cuda' cannot run: .*({NO_CUDA})"):
        smolora.use_backend("cuda").__enter__()
    assert requested() == before


def test_backend_info_structure():
    """What is asked for, what would run, and a reason wherever something does not."""
    info = smolora.backend_info()
    assert info.keys() == {"requested", "active", "backends"}
    assert info["backends"].keys() == {"torch", "triton", "cuda"}
    for backend in info["backends"].values():
        assert backend["available"] == (backend["reason"] is None)
    assert info["backends"]["torch"]["available"] and info["backends"]["torch"]["version"] == torch.__version__
    assert info["backends"]["triton"]["interpreted"] is INTERPRETED
    assert info["active"].keys() == ({"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"})
    json.dumps(info)  # to be pasted into a bug report


def test_backend_info_follows():
    """What is "active" is what would run now."""
    with smolora.use_backend("auto"):
        assert smolora.backend_info()["active"]["cpu"] == "torch"  # auto never interprets by itself
    with smolora.use_backend("torch"):
        assert set(smolora.backend_info()["active"].values()) == {"torch"}
    if INTERPRETED:
        with smolora.use_backend("triton"):
            assert smolora.backend_info()["active"]["cpu"] == "triton"


REFUSED = [
    (torch.float64, "float32, float16 and bfloat16, not torch.float64"),  # no kernel computes in it
    (torch.bfloat16, "interpreter gets products of bfloat16 wrong"),  # silently, so it has to be refused
]


@interpreter
@pytest.mark.parametrize(("dtype", "reason"), REFUSED, ids=["float64", "bfloat16"])
def test_strict_triton_refuses_dtypes(layer: smolora.FusedSMoLoRA, dtype: torch.dtype, reason: str):
    """Asked for by name, Triton raises with the reason where its kernels cannot run, and auto runs there."""
    layer.to(dtype)
    with smolora.use_backend("triton"), pytest.raises(RuntimeError, match="'triton' cannot run: ") as raised:
        run(layer, dtype)
    assert reason in str(raised.value)
    assert run(layer, dtype).dtype == dtype


@interpreter
def test_strict_triton_goes_by_the_compute_dtype(layer: smolora.FusedSMoLoRA):
    """Under autocast a float32 x is computed in bfloat16, so it is refused like a bfloat16 x."""
    with (
        smolora.use_backend("triton"),
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match="bfloat16"),
    ):
        run(layer)


@interpreter
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backward_runs_where_the_forward_ran(layer: smolora.FusedSMoLoRA, backend: str, monkeypatch):
    """Autograd calls it later, maybe in another block: mixing backends' saved tensors would be a silent fallback."""
    from smolora.kernels import passes

    other = {"torch": "triton", "triton": "torch"}[backend]
    with torch.no_grad():
        layer.vu_B.normal_()
        layer.if_B.normal_()
    x, instruction = torch.randn(2, 3, 6), torch.randn(2, 8)
    with smolora.use_backend(backend):
        layer(x, instruction=instruction).sum().backward()
        want = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
        layer.zero_grad()
        y = layer(x, instruction=instruction)
    for name in ("grad_output", "grad_input"):
        foreign = {"torch": passes, "triton": cpu_passes}[backend]
        monkeypatch.setattr(foreign, name, lambda *_: pytest.fail("another backend's backward ran"))
    with smolora.use_backend(other):
        y.sum().backward()
    assert all(grad.any() for grad in want.values())
    for name, grad in want.items():
        assert torch.equal(layer.get_parameter(name).grad, grad), name


# what stops Triton on a GPU under "auto", and the words of the warning; none of it needs a GPU to be decided
FALLBACKS = {
    "not installed": (dict(_HAS_TRITON=False), torch.float32, "triton is not installed"),
    "no device": (dict(_interpreted=lambda: False), torch.bfloat16, "torch sees no CUDA device"),  # a broken driver
    "dtype": (dict(_unavailable_reason=lambda backend: None), torch.float64, "not torch.float64"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_fallback_warns_once(name: str, monkeypatch):
    """One warning with the reason, not one a layer and step; and where Triton was asked for, an error instead."""
    changes, dtype, reason = FALLBACKS[name]
    if name == "no device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    for attribute, value in changes.items():
        monkeypatch.setattr(backends, attribute, value)
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(backends, "_requested", "auto")
    with pytest.warns(UserWarning, match="falls back to its slower torch backend") as record:
        assert backends.resolve_backend("cuda", dtype) == "torch"
    assert len(record) == 1 and reason in str(record[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [backends.resolve_backend("cuda", dtype) for _ in range(3)] == ["torch"] * 3
    monkeypatch.setattr(backends, "_requested", "triton")
    with pytest.raises(RuntimeError, match="'triton' cannot run: ") as raised:
        backends.resolve_backend("cuda", dtype)
    assert reason in str(raised.value)


def test_each_reason_warns(monkeypatch):
    """A second reason is news: float64 layers after a warning about something else."""
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(backends, "_requested", "auto")
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    with pytest.warns(UserWarning, match="triton is not installed"):
        backends.resolve_backend("cuda", torch.float64)
    monkeypatch.setattr(backends, "_unavailable_reason", lambda backend: None)
    with pytest.warns(UserWarning, match="not torch.float64"):
        backends.resolve_backend("cuda", torch.float64)


def test_cpu_never_warns(layer: smolora.FusedSMoLoRA, monkeypatch):
    """On a CPU torch is the backend, not a fallback."""
    monkeypatch.setattr(backends, "_warned", set())
    with warnings.catch_warnings(), smolora.use_backend("auto"):
        warnings.simplefilter("error")
        run(layer)


# ----------------------------------------------------------------------------------------------- processes of their own

# a layer and one forward
LAYER = """
import torch, smolora
config = smolora.SMoLoRAConfig(r=4, instruction_dim=8, num_vu_experts=2, num_if_experts=2, lora_dropout=0)
layer = smolora.FusedSMoLoRA(torch.nn.Linear(6, 10), config)
def forward():
    y = layer(torch.randn(2, 3, 6), instruction=torch.randn(2, 8))
    y.sum().backward()
def enter(name):
    smolora.use_backend(name).__enter__()
def report(call, *arguments):
    try:
        call(*arguments)
        error = ""
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
    return [error, smolora.backend_info()]
"""

TIMED_IMPORT = """
import time
start = time.process_time()
import smolora
result = time.process_time() - start
"""

IMPORT_ERROR = """
try:
    import smolora
    result = "no error"
except Exception as problem:
    result = f"{type(problem).__name__}: {problem}"
"""

# name: (environment, code that sets `result`)
SCENARIOS = {
    **{f"import {turn}": ({}, TIMED_IMPORT) for turn in range(3)},
    "default": ({}, LAYER + "result = report(forward)"),
    "torch": ({"SMOLORA_BACKEND": "torch"}, LAYER + "result = report(forward)"),
    "triton": ({"SMOLORA_BACKEND": "triton"}, LAYER + "result = report(forward)"),
    "cuda": ({"SMOLORA_BACKEND": "cuda"}, LAYER + "result = report(forward)"),
    "use triton": ({}, LAYER + "result = report(enter, 'triton')"),
    "use cuda": ({}, LAYER + "result = report(enter, 'cuda')"),
    "misspelt": ({"SMOLORA_BACKEND": "tirton"}, IMPORT_ERROR),
    "empty": ({"SMOLORA_BACKEND": ""}, IMPORT_ERROR),
}

# importing torch and peft is most of what a process costs: one imports them, and forks for each scenario
SERVER = """
import json, os, sys, time, traceback
start = time.process_time()
import peft
results = {"import peft": time.process_time() - start}
for name, (environment, code) in json.load(sys.stdin).items():
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.environ.update(environment)
            scope = {}
            exec(code, scope)
            result = scope["result"]
        except BaseException:
            result = "crashed: " + traceback.format_exc()
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        results[name] = json.load(pipe)
    os.waitpid(child, 0)
print(json.dumps(results))
"""


def python(code: str, cwd: Path, *options: str, stdin: str = "", **environment: str) -> object:
    """What a fresh interpreter prints last, from JSON; it sees no GPU and nothing that configures smolora."""
    ours = ("TRITON_INTERPRET", "SMOLORA_BACKEND", "SMOLORA_CHECK")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        input=stdin,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**kept, "CUDA_VISIBLE_DEVICES": "", **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> dict:
    """The results of all scenarios."""
    return python(SERVER, tmp_path_factory.mktemp("elsewhere"), stdin=json.dumps(SCENARIOS))


def test_import_time(processes: dict):
    """At most a tenth of the CPU time of peft, which every user imports anyway; the best of three."""
    best = min(processes[f"import {turn}"] for turn in range(3))
    assert best <= processes["import peft"] / 10, f"import smolora took {best:.2f} s after import peft"


def test_default_without_gpu(processes: dict):
    """Everything can be tried without a GPU: torch runs, and the others say what they lack."""
    error, info = processes["default"]
    assert error == ""
    assert info["requested"] == "auto" and info["active"] == {"cpu": "torch"}
    assert not info["backends"]["triton"]["available"]
    assert "no CUDA device" in info["backends"]["triton"]["reason"]
    assert "TRITON_INTERPRET=1" in info["backends"]["triton"]["reason"]  # what a person could do about it
    assert not info["backends"]["triton"]["interpreted"]
    assert not info["backends"]["cuda"]["available"] and info["backends"]["cuda"]["reason"]


def test_environment_chooses(processes: dict):
    """SMOLORA_BACKEND is what `use_backend` would be around the whole program."""
    error, info = processes["torch"]
    assert error == ""
    assert info["requested"] == "torch" and info["active"] == {"cpu": "torch"}


@pytest.mark.parametrize(("name", "value"), [("misspelt", "'tirton'"), ("empty", "''")])
def test_environment_is_checked(processes: dict, name: str, value: str):
    """A typo there is an error when smolora is imported, not another backend for a week of training."""
    error = processes[name]
    assert error.startswith("ValueError: ") and "SMOLORA_BACKEND" in error and value in error
    assert "'auto', 'torch', 'triton', 'cuda'" in error


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("triton", "no CUDA device"),  # from the environment: the forward raises
        ("use triton", "no CUDA device"),  # by name: entering raises
        ("cuda", NO_CUDA),
        ("use cuda", NO_CUDA),
    ],
)
def test_nothing_falls_back(processes: dict, name: str, reason: str):
    """A backend that was asked for and cannot run raises with the reason, and nothing else runs instead."""
    error, info = processes[name]
    backend = name.removeprefix("use ")
    assert error.startswith(f"RuntimeError: backend {backend!r} cannot run: ") and re.search(reason, error)
    if name == backend:
        assert info["requested"] == backend and info["active"] == {"cpu": None}
    else:
        assert info["requested"] == "auto"


def test_without_triton(tmp_path: Path):
    """Off Linux on x86-64 there is no triton. Its absence is made from links to all installed packages but it: no
    import, no spec and no metadata of it can be found, by torch neither."""
    for folder in [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]:
        for package in folder.iterdir():
            hidden = package.name.startswith(("triton", "__editable__", "smolora", "__pycache__"))
            if not hidden and not (tmp_path / package.name).exists():
                (tmp_path / package.name).symlink_to(package)
    (tmp_path / "smolora").mkdir()
    for entry in [*Path(smolora.__file__).parent.iterdir(), Path(smolora.kernels.__file__).parent]:
        (tmp_path / "smolora" / entry.name).symlink_to(entry)
    code = (
        LAYER
        + "import json, sys\n"
        + "\n".join(
            [
                "results = [report(forward), report(enter, 'triton'), report(enter, 'torch')]",
                "print(json.dumps([*results, sorted(m for m in sys.modules if m.partition('.')[0] == 'triton')]))",
            ]
        )
    )
    forward, strict, torch_backend, modules = python(code, tmp_path, "-S", PYTHONPATH=str(tmp_path))
    assert modules == []  # else the test has not tested it
    assert forward[0] == "" and forward[1]["active"] == {"cpu": "torch"}
    triton = forward[1]["backends"]["triton"]
    assert not triton["available"] and "triton is not installed" in triton["reason"] and triton["version"] is None
    assert strict[0].startswith("RuntimeError: backend 'triton' cannot run: triton is not installed")
    assert torch_backend[0] == ""
