"""The examples on whole models run from end to end with a tiny one, and do what they say."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """An example as a module, by name; its imports from the folder work as they do when it is run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("tiny", None)


def is_trained(folder: Path) -> bool:
    """Whether an adapter's B have left zero."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return all(tensor.any() for name, tensor in tensors.items() if name.endswith("_B"))


def test_generate(example, tmp_path, capsys):
    answers = example("generate").main(["--tokens", "5"])
    out = capsys.readouterr().out
    assert len(answers) == 4 and all(answer in out for answer in answers)
    assert len(set(answers)) > 1
    assert "model.multi_modal_projector.linear_1: VU experts" in out


def test_generate_for_a_picture_of_ones_own(example, tmp_path):
    module, tiny = example("generate"), sys.modules["tiny"]
    base = tiny.save_tiny_llava(tmp_path / "base")
    adapter = module.save_random_adapter(base, tmp_path / "adapter")
    tiny.squares(1)[0]["image"].save(tmp_path / "red.png")
    given = ["--model", str(base), "--adapter", str(adapter), "--image", str(tmp_path / "red.png"), "--tokens", "5"]
    (answer,) = module.main(
        [*given, "--prompt", r"What colour is it?\nAnswer the question using a single word or phrase."]
    )
    assert answer == module.main(["--tokens", "5"])[0]  # the first of the built-in batch
    with pytest.raises(SystemExit):
        module.main(given)


def test_sft(example, tmp_path):
    pytest.importorskip("trl", reason="trl is not installed")
    losses = example("sft").main(["--steps", "12", "--output", str(tmp_path)])
    assert len(losses) == 12 and sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert is_trained(tmp_path)


def test_qlora(example, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    losses = example("qlora").main(["--steps", "12", "--output", str(tmp_path)])
    assert len(losses) == 12 and sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert is_trained(tmp_path)
