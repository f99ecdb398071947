"""What holds for every test: where kernels run, and memory that is never quietly zero."""

import os
import sys
from pathlib import Path

import pytest
import torch

from support import interpreter

if not torch.cuda.is_available():  # before any kernel is imported: Triton decides then
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS may give other bits the next time
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would not survive the forks of some tests


def pytest_configure() -> None:
    interpreter.quicken()


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of finished runs of two small tasks by `smolora` and `seqlora`, beside their `recipe.yaml`."""
    import yaml

    from smolora.recipe import load_recipe
    from smolora.train.run import TrainingRun
    from support.train_world import make_world

    recipe = make_world(tmp_path_factory.mktemp("runs"), ask=3)
    content = yaml.safe_load(recipe.read_text())
    content["downstream"] = {}
    content["training"].update(batch_size=12, per_device_batch_size=12, epochs=1)
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    made = []
    for method in ("smolora", "seqlora"):
        made.append(recipe.parent / method)
        TrainingRun(load_recipe(recipe, [f"method={method}", f"output={made[-1]}"]))()
    return made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    """After an illegal address nothing runs on a GPU in this process: with pytest-xdist another one goes on."""
    if call.excinfo is not None and "PYTEST_XDIST_WORKER" in os.environ and "CUDA error" in str(call.excinfo.value):
        print(f"{item.nodeid}: {call.excinfo.value}", file=sys.__stderr__, flush=True)
        os._exit(3)


@pytest.fixture(autouse=True)
def poison():
    """Fill fresh memory with NaN, so that reading what nobody wrote shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
