"""Progress on a terminal, in a pipe, and for who wants none."""

from __future__ import annotations

import io
import itertools
import re
import sys

import pytest

from smolora.io import progress as module
from smolora.io.progress import Progress, progress, reporting_to, say


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by ten seconds at every look."""
    times = itertools.count(0.0, 10.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))


def test_a_pipe_gets_a_line_now_and_then(clock, capsys):
    with Progress("training", 100, "step", done=20) as shown:
        for _ in range(8):
            shown.update(5, "loss 1.250")
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) < 8 and not any("\r" in line for line in lines)
    assert re.fullmatch(r"training: \d+ of 100 steps, 0\.\d+ a second, \d+ (s|min) left, loss 1\.250", lines[0])


def test_short_work_says_nothing_in_a_pipe(capsys):
    assert list(progress([1, 2], "drawing", 2, "task")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("answering GQA", 10, "question") as shown:
        shown.update(10, "loss 0.5")
    drawn = sys.stderr.getvalue()
    assert "answering GQA: 100%" in drawn and "10/10" in drawn and "loss 0.5" in drawn


@pytest.mark.parametrize("hidden", [True, False])
def test_nobody_gets_nothing(monkeypatch, clock, hidden):
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


@pytest.mark.parametrize(("left", "text"), [(59, "59 s"), (150, "2 min"), (7300, "2 h 1 min")])
def test_time_left(monkeypatch, left, text):
    times = iter([0.0, 10.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    shown = Progress("x", 10 + left, "step", hidden=True)
    shown.update(10)
    assert shown.line() == f"x: 10 of {10 + left:,} steps, 1 a second, {text} left"
