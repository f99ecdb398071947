"""Make the pictures of report and demo in these pages, from finished runs.

    make run
    make .venv-demo/.ready
    .venv-demo/bin/python docs/make_pictures.py runs/minicvit-seqlora runs/minicvit-smolora

It needs Debian's `chromium` on PATH.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from smolora.demo.app import Demo
from smolora.demo.runs import open_runs
from smolora.report import write_report

PARTS = {  # of the report: the sections, each down to its first element of a kind
    "stages.png": ("stages", ".panels"),
    "forgetting.png": ("forgotten", "table"),
    "routing.png": ("routing", ".heat"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="DIR")
    parser.add_argument("--task", default="TextVQA", help="task of the demo's question (default: %(default)s)")
    parser.add_argument("--question", type=int, default=1, help="its number (default: %(default)s)")
    args = parser.parse_args()
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as folder:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 800})
        take_report(page, write_report(args.runs, Path(folder), cases_per_task=1).with_suffix(".html"), args.output)
        take_demo(page, args.runs, args.task, args.question, args.output / "demo.png")
        browser.close()


def take_report(page: Page, report: Path, output: Path) -> None:
    """Take the top of a report, and parts of it."""
    page.goto(report.as_uri())
    page.screenshot(path=output / "report.png")
    for name, (section, last) in PARTS.items():
        start = box(page, f"#{section}")
        end = box(page, f"section[aria-labelledby={section}] {last}")
        height = end["y"] + end["height"] - start["y"] + 12
        clip = {"x": 0, "y": start["y"] - 12, "width": 1100, "height": height + 12}
        page.screenshot(path=output / name, clip=clip, full_page=True)


def box(page: Page, selector: str) -> dict[str, Any]:
    """The first element of a selector, in pixels of the whole page."""
    return page.locator(selector).first.evaluate(
        "e => { const b = e.getBoundingClientRect();"
        " return {x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height}; }"
    )


def take_demo(page: Page, runs: list[Path], task: str, question: int, path: Path) -> None:
    """Ask a question in the demo, and take the page."""
    demo = Demo(open_runs(runs))
    blocks = demo.page()
    blocks.launch(prevent_thread_lock=True, server_name="127.0.0.1", **demo.options())
    page.goto(blocks.local_url)
    page.get_by_role("combobox", name="Task").click()
    page.get_by_role("option", name=task, exact=True).click()
    page.get_by_role("spinbutton").fill(str(question))
    page.keyboard.press("Tab")
    page.get_by_role("img", name="The picture of question").wait_for()
    page.wait_for_timeout(1000)  # for the texts
    page.get_by_role("button", name="Ask all stages").click()
    page.get_by_text("Experts and shares", exact=False).first.wait_for(timeout=120_000)
    page.screenshot(path=path, full_page=True)
    blocks.close()


if __name__ == "__main__":
    main()
