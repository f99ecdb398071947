"""Progress of long work: a bar on a terminal, a line now and then elsewhere, nothing for who wants quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Literal, TypeVar

from tqdm import tqdm

LINE_SECONDS = 30.0  # between two lines where there is no terminal

Audience = Literal["people", "program", "nobody"]
Element = TypeVar("Element")

_audience: ContextVar[Audience] = ContextVar("audience", default="people")


@contextmanager
def reporting_to(audience: Audience) -> Iterator[None]:
    """Report progress to people, to people besides a program that reads stdout, or to nobody, inside a `with` block."""
    token = _audience.set(audience)
    try:
        yield
    finally:
        _audience.reset(token)


def say(text: str) -> None:
    """Print what was done: on stdout, on stderr if a program reads stdout, or not at all."""
    if _audience.get() != "nobody":
        print(text, file=sys.stdout if _audience.get() == "people" else sys.stderr, flush=True)


def shows_bars() -> bool:
    """Return whether progress is drawn as bars, which need a terminal."""
    return _audience.get() != "nobody" and sys.stderr.isatty()


class Progress:
    """Progress of a piece of work, on stderr.

    Args:
        what: what is being done.
        total: its number of units.
        unit: the name of a unit.
        done: units that were done before.
        hidden: show nothing, as on processes other than the main one.
    """

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0, hidden: bool = False) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.remark = ""
        self._first = done
        self._start = self._last = time.monotonic()
        self._silent = hidden or _audience.get() == "nobody"
        self._bar = None
        if not self._silent and shows_bars():
            self._bar = tqdm(desc=what, total=total, unit=unit, initial=done, smoothing=0.05)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int = 1, remark: str = "") -> None:
        """Count units that are done, with a remark such as the loss, which stays until the next one."""
        self.done += count
        self.remark = remark or self.remark
        if self._bar is not None:
            if remark:
                self._bar.set_postfix_str(remark, refresh=False)
            self._bar.update(count)
        elif not self._silent and time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """How far the work is, at what rate, and how long it will take."""
        text = f"{self.what}: {self.done:,} of {self.total:,} {self.unit}s"
        rate = (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)
        if rate:
            text += f", {rate:.3g} a second, {_duration((self.total - self.done) / rate)} left"
        return text + (f", {self.remark}" if self.remark else "")


def progress(elements: Iterable[Element], what: str, total: int, unit: str) -> Iterator[Element]:
    """Iterate over elements while showing progress."""
    with Progress(what, total, unit) as shown:
        for element in elements:
            yield element
            shown.update()


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds) // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes >= 2 else f"{round(seconds)} s"
