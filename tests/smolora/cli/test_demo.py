"""`smolora demo`: where it is served, and what is refused."""

from __future__ import annotations

import pytest

from smolora import cli

pytest.importorskip("gradio", reason="needs gradio: make test-demo")
from smolora.cli import demo as command  # it imports gradio


class Page:
    """Stands for a page, and keeps how it was launched."""

    local_url = "http://127.0.0.1:7860/"

    def __init__(self) -> None:
        self.launched: dict = {}
        self.closed = False

    def launch(self, **options) -> None:
        self.launched = options

    def block_thread(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def page(monkeypatch) -> Page:
    page = Page()
    monkeypatch.setattr(command, "open_runs", lambda folders: folders)
    monkeypatch.setattr(command.Demo, "__init__", lambda self, runs: None)
    monkeypatch.setattr(command.Demo, "page", lambda self: page)
    return page


def test_only_this_machine_reaches_it_unless_told_otherwise(page, capsys):
    assert cli.main(["demo", "run"]) == 0
    assert page.launched["server_name"] == "127.0.0.1" and page.launched["share"] is False and page.closed
    assert page.launched["max_file_size"] == 10 * 2**20
    out, err = capsys.readouterr()
    assert "Open http://127.0.0.1:7860/ in a browser" in out and err == ""
    assert cli.main(["demo", "run", "--host", "0.0.0.0", "--port", "9000"]) == 0
    assert (page.launched["server_name"], page.launched["server_port"]) == ("0.0.0.0", 9000)
    assert "Whoever reaches 0.0.0.0 can ask and upload; there is no password." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("me", False)],
)
def test_loopback(host, expected):
    assert command.is_loopback(host) == expected


def test_what_is_refused(tmp_path, capsys):
    assert cli.main(["demo", str(tmp_path)]) == 1
    assert "is no finished run: it has no results.json" in capsys.readouterr().err
    assert cli.main(["demo", str(tmp_path), "--port", "0"]) == 1
    assert "--port must be from 1 to 65535, got 0" in capsys.readouterr().err
