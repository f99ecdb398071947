"""Chromium, driven by Playwright, for pages that have to work for people."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def browser_page(**options: Any) -> Iterator[Any]:
    """A page of a headless Chromium. The test is skipped where there is no browser or no Playwright.

    The page has a list `faults` of what its console and its scripts complained about, and of addresses outside of this
    machine that it asked for.

    Args:
        options: of Playwright's `new_page`.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-demo")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium on PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(**options)
        page.faults = faults = []
        page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda r: None if _is_local(r.url) else faults.append(f"asked for {r.url}"))
        try:
            yield page
        finally:
            browser.close()


def _is_local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:", "blob:", "file:"))


def tab_to(page: Any, name: str) -> None:
    """Press the tabulator until the element with an accessible name has the focus."""
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(FOCUSED))
        if seen[-1].startswith(name):
            return
    raise AssertionError(f"the tabulator never comes to {name!r}, only to {seen}")


FOCUSED = """() => {
  const e = document.activeElement;
  return (e.ariaLabel || e.labels?.[0]?.textContent || e.textContent || "").trim();
}"""
