"""Progress of long work: a bar on a terminal, and nothing in a pipe or for who wants quiet."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Literal, TypeVar

from tqdm import tqdm

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
    """Progress of a piece of work, a bar on stderr if that is a terminal.

    Args:
        what: what is being done.
        total: its number of units.
        unit: the name of a unit.
        done: units that were done before.
        hidden: show nothing, as on processes other than the main one.
    """

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0, hidden: bool = False) -> None:
        shown = shows_bars() and not hidden
        self._bar = tqdm(desc=what, total=total, unit=unit, initial=done, smoothing=0.05) if shown else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int = 1, remark: str = "") -> None:
        """Count units that are done, with a remark such as the loss, which stays until the next one."""
        if self._bar is not None:
            if remark:
                self._bar.set_postfix_str(remark, refresh=False)
            self._bar.update(count)


def progress(elements: Iterable[Element], what: str, total: int, unit: str) -> Iterator[Element]:
    """Iterate over elements while showing progress."""
    with Progress(what, total, unit) as shown:
        for element in elements:
            yield element
            shown.update()
