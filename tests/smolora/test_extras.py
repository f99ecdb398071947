"""Packages of extras that are not installed: what works without them, and errors that say how to install them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from smolora import InstructionEncoder, cli, extras
from smolora.extras import MissingExtraError, modules_of, require_extra
from smolora.minicvit.prepare import minicvit
from smolora.official.assemble import assemble

ROOT = Path(__file__).parents[2]
HIDE = """
import importlib.machinery, sys

class Hide(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

sys.meta_path = [Hide if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
"""
LAYER = """
import smolora, torch
config = smolora.SMoLoRAConfig(r=4, instruction_dim=8)
layer = smolora.FusedSMoLoRA(torch.nn.Linear(8, 8), config)
layer(torch.randn(2, 3, 8), instruction=torch.randn(2, 8)).sum().backward()
from smolora import cli
"""


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch):
    """Hides modules from the check."""

    def install(*names: str) -> None:
        found = extras.importlib.util.find_spec
        monkeypatch.setattr(
            extras.importlib.util, "find_spec", lambda name, *more: None if name in names else found(name, *more)
        )

    return install


def test_the_table_is_that_of_the_packages_metadata():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    with open(ROOT / "pyproject.toml", "rb") as file:
        optional = tomllib.load(file)["project"]["optional-dependencies"]
    for extra, modules in extras.MODULES.items():
        listed = {re.split(r"[<>=!~]", name)[0] for name in optional[extra]}
        included = {f"smolora[{extras.INCLUDES[extra]}]"} if extra in extras.INCLUDES else set()
        assert listed == {*modules.values(), *included}


def test_what_is_missing_is_named(hide):
    require_extra("minicvit", user="it")
    hide("sklearn", "PIL")
    with pytest.raises(MissingExtraError) as caught:
        require_extra("minicvit", user="it")
    message = "it needs pillow, scikit-learn, which are not installed: pip install 'smolora[minicvit]'"
    assert str(caught.value) == message
    require_extra("eval", "yaml", user="it")  # which is there
    assert list(modules_of("eval")) == ["PIL", "sentence_transformers", "pydantic", "yaml"]


@pytest.mark.parametrize(
    ("command", "hidden", "extra"),
    [
        (["train", "none.yaml"], "pydantic", "eval"),
        (["train", "none.yaml"], "sentence_transformers", "eval"),
        (["evaluate", "--output", "out"], "PIL", "llava"),
        (["evaluate", "--output", "out", "--recipe", "none.yaml", "--device", "cpu"], "pydantic", "eval"),
        (["report", "none"], "matplotlib", "report"),
        (["make-minicvit", "data"], "sklearn", "minicvit"),
        (["assemble"], "PIL", "llava"),
        (["embed", "--text", "a", "--output", "o.safetensors"], "sentence_transformers", "llava"),
    ],
)
def test_commands_say_what_to_install(command, hidden, extra, hide, tmp_path, monkeypatch, capsys):
    """Before anything runs: nothing is written, and files that do not exist are not looked for."""
    monkeypatch.chdir(tmp_path)
    hide(hidden)
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"smolora {command[0]}: error: ") and error.count("\n") == 1
    assert modules_of(extra)[hidden] in error and f"pip install 'smolora[{extra}]'" in error
    assert not any(tmp_path.iterdir())


def test_functions_say_what_to_install(hide, tmp_path):
    hide("PIL", "sentence_transformers", "sklearn")
    with pytest.raises(MissingExtraError, match=r"InstructionEncoder needs sentence-transformers, .*smolora\[llava\]"):
        InstructionEncoder()
    with pytest.raises(MissingExtraError, match=r"assemble needs pillow, .*smolora\[llava\]"):
        assemble(tmp_path, tmp_path, tmp_path, tmp_path / "out")
    with pytest.raises(MissingExtraError, match=r"prepare\.minicvit needs .*smolora\[minicvit\]"):
        minicvit.planned({"data": str(tmp_path / "data"), "base": str(tmp_path / "base")})


def test_a_layer_and_three_commands_need_no_extra(tmp_path):
    """In a process that cannot import a module of any extra; YAML comes with peft."""
    hidden = {module for modules in extras.MODULES.values() for module in modules} - {"yaml"}
    (tmp_path / "matrix.json").write_text('{"tasks": ["a", "b"], "matrix": [[90], [80, 70]]}')
    commands = f"assert cli.main(['metrics', {str(tmp_path / 'matrix.json')!r}]) == 0\n"
    for command in ("score", "convert-official"):
        commands += f"try: cli.main([{command!r}, '--help'])\nexcept SystemExit as end: assert end.code == 0\n"
    code = f"HIDDEN = {hidden!r}\n{HIDE}{LAYER}{commands}assert not HIDDEN & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
