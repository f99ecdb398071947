"""Where the CUDA kernels run: emulated on the CPU, and for real where there is a GPU."""

import pytest

from smolora.engine import cuda_build
from support import emulation


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch):
    """The backend "cuda" is the emulation, which takes CPU tensors."""
    module = emulation.load()
    module.set_order(False)
    monkeypatch.setattr(cuda_build, "extension", module)
    return module


@pytest.fixture(params=[pytest.param("cpu", id="emulated"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device of a test that runs both ways."""
    if request.param == "cpu":
        request.getfixturevalue("emulated")
    elif (reason := cuda_build.unavailable_reason()) is not None:
        pytest.fail(f"backend 'cuda' cannot run on this GPU: {reason}")
    return request.param
