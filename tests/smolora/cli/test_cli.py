"""The command `smolora` itself: its help, its subcommands and its exit status."""

import importlib
import re
import runpy
import subprocess
import sys

import pytest

from smolora import cli
from smolora.extras import modules_of


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_subcommand_has_a_module_and_help(name: str, capsys):
    extra = cli.COMMANDS[name].extra
    for module in () if extra is None else modules_of(extra):
        pytest.importorskip(module)  # gradio has an environment of its own
    module = importlib.import_module(f"smolora.cli.{name.replace('-', '_')}")
    assert callable(module.add_arguments) and callable(module.run)
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and cli.COMMANDS[name].help in printed


@pytest.mark.parametrize("argv", [[], ["trian"], ["score", "--no-such-option"]])
def test_usage_errors(argv: list[str], capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2 and "usage: smolora" in capsys.readouterr().err


def test_help_imports_no_subcommand():
    """Nor what subcommands need: `smolora --help` takes no longer than `import smolora`."""
    code = (
        "import sys, smolora\n"
        "before = set(sys.modules)\n"
        "from smolora import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(*sorted(name for name in set(sys.modules) - before if name.startswith('smolora')), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(re.search(rf"^ +{name}\b", done.stdout, re.M) for name in cli.COMMANDS)
    assert done.stderr.split() == ["smolora.cli"]


@pytest.mark.filterwarnings("ignore:'smolora.cli.__main__' found in sys.modules")
def test_python_m(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["smolora", "doctor", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("smolora.cli", run_name="__main__", alter_sys=True)
    assert end.value.code == 0 and "usage: smolora doctor" in capsys.readouterr().out
