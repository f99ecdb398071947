"""Progress on a terminal, in a pipe, and for who wants none."""

from __future__ import annotations

import io
import sys

import pytest

from smolora.io.progress import Progress, progress, reporting_to, say


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_nothing(capsys):
    assert list(progress([1, 2], "drawing", 2, "task")) == [1, 2]
    with Progress("training", 100, "step", done=20) as shown:
        shown.update(80, "loss 1.250")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("answering GQA", 10, "question") as shown:
        shown.update(10, "loss 0.5")
    drawn = sys.stderr.getvalue()
    assert "answering GQA: 100%" in drawn and "10/10" in drawn and "loss 0.5" in drawn


@pytest.mark.parametrize("hidden", [True, False])
def test_nobody_gets_nothing(monkeypatch, hidden):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with reporting_to("people" if hidden else "nobody"), Progress("x", 10, "step", hidden=hidden) as shown:
        for _ in range(10):
            shown.update()
    assert sys.stderr.getvalue() == ""


def test_what_is_said_leaves_stdout_to_a_program(capsys):
    for audience, expected in (("people", ("done\n", "")), ("program", ("", "done\n")), ("nobody", ("", ""))):
        with reporting_to(audience):
            say("done")
        assert capsys.readouterr() == expected
    say("done")  # the audience before
    assert capsys.readouterr().out == "done\n"
