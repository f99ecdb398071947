"""The HTML page: strict markup, escaping, nothing from a network, the report's numbers, and a browser."""

from __future__ import annotations

import base64
import html
import itertools
import json
import math
import re
import resource
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from smolora.evaluate import paper
from smolora.report import page, palette, write_report
from smolora.report.layout import read_runs
from support.reports import MATRIX, read_csv

VOID = {"meta", "img", "br", "link", "input"}


class Strict(HTMLParser):
    """Collects texts, attributes and tables; every element has to be closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert "svg" in self.open, f"{tag} closes itself outside SVG"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


def read_page(folder: Path) -> tuple[str, Strict]:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    return text, Strict(text)


@pytest.fixture(params=["one", "two", "several"])
def report(request) -> Path:
    return request.getfixturevalue(request.param)


def test_markup_is_strict_and_needs_no_network(report):
    text, parsed = read_page(report)
    assert not re.search(r"https?:|//[a-z]|url\((?!#)|@import", re.sub(r"base64,[\w+/=]+", "", text))
    for tag, attributes in parsed.elements:
        for name in ("src", "href"):
            link = attributes.get(name) or "#"
            assert link.startswith(("#", "data:")), (tag, link)
        assert not any(name.startswith("on") for name in attributes)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"] for tag, attributes in parsed.elements if tag == "a" and attributes["href"][0] == "#"}
    assert links <= {f"#{name}" for name in ids}


def test_what_readers_of_screens_need(two):
    _, parsed = read_page(two)
    for tag, attributes in parsed.elements:
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or attributes["aria-label"], attributes
        if tag == "img":
            assert attributes["alt"] and attributes["src"].startswith("data:image/")
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
        if attributes.get("tabindex") == "0":
            assert attributes["role"] == "region" and attributes["aria-label"]


def test_numbers_are_those_of_the_markdown_report(two):
    """Each Markdown table above the cases is a table of the page, cell by cell."""
    _, parsed = read_page(two)
    shown = [[[cell.strip() for cell in row] for row in table] for table in parsed.tables]
    markdown = (two / "report.md").read_text().partition("## Cases")[0]
    tables = re.findall(r"(?:^\|.*\n?)+", markdown, re.M)
    assert len(tables) == 2
    for table in tables:
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        assert [rows[0], *rows[2:]] in shown


def test_matrix_has_the_drops(one):
    _, parsed = read_page(one)
    matrix = next(table for table in parsed.tables if table[0][0] == "after stage")
    assert matrix[-1] == ["3-Flickr30k", "50.00-30.00", "40.00-20.00", "150.00"]


def test_all_data_is_inside(two):
    _, parsed = read_page(two)
    links = {a["download"]: a["href"] for tag, a in parsed.elements if tag == "a" and "download" in a}
    assert links.keys() == {file.name for file in two.glob("*.csv")}
    for name, link in links.items():
        assert base64.b64decode(link.partition("base64,")[2]) == (two / name).read_bytes()


NASTY = "</script><script>alert(1)</script><img src=x onerror=y> \"'&amp; {{ 7 * 7 }} \x1b\x00"


def test_whatever_people_wrote_is_text(make_run, tmp_path):
    """Names of tasks, folders, recipes and layers, questions, references and answers."""
    tasks = ["<script>", "a\"b'c", "{{ 7 * 7 }}"]
    runs = [make_run(name, MATRIX, tasks=tasks) for name in ("a<b>", "c&d")]
    for run in runs:
        results = json.loads((run / "results.json").read_text()) | {"name": NASTY}
        (run / "results.json").write_text(json.dumps(results))
        for stage in results["stages"]:
            for path in (run / stage / "answers").glob("*.jsonl"):
                path.write_text("".join(json.dumps({"question_id": i, "text": NASTY}) + "\n" for i in range(3)))
    questions = tmp_path / "data/<script>.json"
    records = json.loads(questions.read_text())
    for record in records:
        record.update(text=NASTY, answer=[NASTY])
    questions.write_text(json.dumps(records))
    folder = write_report(runs, tmp_path / "out", cases_per_task=3).parent
    text, parsed = read_page(folder)
    assert [tag for tag, _ in parsed.elements].count("script") == 1
    assert all(attributes["src"].startswith("data:") for tag, attributes in parsed.elements if tag == "img")
    assert "<b>" not in text and "\x1b" not in text and "\x00" not in text and "49" not in parsed.text
    assert NASTY[:40] in parsed.text and "smolora (a<b>)" in parsed.text


def test_the_papers_values_and_seeds_are_drawn(make_run, tmp_path):
    runs = [
        make_run(f"s{seed}", paper.TABLE_6["single"], tasks=list(paper.UPSTREAM), config={"seed": seed})
        for seed in (0, 1)
    ]
    folder = write_report(runs, tmp_path / "out").parent
    text, _ = read_page(folder)
    assert text.count('class="paper"') == 4 and "smolora, 2 seeds, paper: 83.44" in text
    other = make_run("b", paper.TABLE_6["single"], tasks=list(paper.UPSTREAM), benchmark="MiniCVIT")
    text, _ = read_page(write_report([other], tmp_path / "other").parent)
    assert 'class="paper"' not in text


def big_runs(make_run, tmp_path) -> list[Path]:
    """Six tasks and five methods at the size of a LLaVA: 225 layers, thousands of logged steps."""
    runs = []
    for worse, method in enumerate(("smolora", "seqlora", "moelora", "smolora-vu", "replay")):
        matrix = [[90.0 - worse - 7 * (k - j) for j in range(k + 1)] for k in range(6)]
        run = make_run(method, matrix, method=method, tasks=list(paper.UPSTREAM))
        for stage in json.loads((run / "results.json").read_text())["stages"]:
            log = [{"step": i, "loss": 1 / (i + 1)} for i in range(3000)]
            (run / stage / "log.json").write_text(json.dumps(log))
            for number, path in enumerate((run / stage / "answers").glob("*.info.json")):
                layers = [
                    {
                        "layer": f"layers.{i}",
                        "samples": 9,
                        "vu": [i % 4, 1, 2, number],
                        "if": [9, 0, 0, i],
                        "alpha": 0.4,
                    }
                    for i in range(225)
                ]
                routed = [layer | {"beta": 0.6} for layer in layers] if method.startswith("smolora") else []
                path.write_text(json.dumps({"routing": routed}))
        runs.append(run)
    return runs


def test_size_stays_small(make_run, tmp_path):
    folder = write_report(big_runs(make_run, tmp_path), tmp_path / "out", cases_per_task=3).parent
    text, parsed = read_page(folder)
    drawing = re.sub(r"base64,[\w+/=]+", "", text)
    assert len(drawing) < 1_200_000 and len(text) < 4_000_000 and len(parsed.elements) < 12_000


def test_training_and_losses(make_run, tmp_path):
    cost = {"seconds": 2.0, "tokens": 100, "tokens_per_second": 50.0, "peak_memory": 3 * 2**30}
    timing = {
        "stage-1-ScienceQA": {
            "training": cost,
            "evaluation": {
                "a": {"seconds": 1.0, "answers_per_second": 30.0},
                "b": {"seconds": 3.0, "answers_per_second": 10.0},
            },
        }
    }
    training = {"stage-1-ScienceQA": {"samples": 1600, "steps": 200, "trainable": 12345, "stored": 67890}}
    run = make_run("a", MATRIX, timing=timing, training=training)
    (run / "stage-1-ScienceQA/log.json").write_text(json.dumps([{"step": 10, "loss": 2.5}, {"train_runtime": 1.0}]))
    (read,) = read_runs([run])
    assert read.losses(0) == [(10, 2.5)] and read.losses(1) == []
    _, parsed = read_page(write_report([run], tmp_path / "out").parent)
    row = ["smolora", "1-ScienceQA", "1,600", "200", "12,345", "67,890", "2.00", "50.00", "3.00", "4.00", "15.00"]
    assert any(row in table for table in parsed.tables)


def test_what_changed_is_marked():
    assert page.changed_parts("a red dog.", "a blue dog.") == [("a ", False), ("blue", True), (" dog.", False)]
    assert "".join(text for text, _ in page.changed_parts("x\ny", " y  z!")) == " y  z!"


def test_each_stages_answer_is_shown(two):
    text, parsed = read_page(two)
    answers = next(table for table in parsed.tables if table[0][0] == "after" and len(table) == 4)
    assert [row[0] for row in answers[1:]] == ["1-ScienceQA", "2-TextVQA", "3-Flickr30k"]
    assert "stage-<mark>2</mark>-<mark>TextVQA</mark> smolora" in text and "changed" in parsed.text
    assert len(read_csv(two / "cases.csv")) < sum(len(table) - 1 for table in parsed.tables if table[0][0] == "after")


# ---- colours

# linear sRGB as people see it with the strongest form of each colour blindness (Machado, Oliveira and Fernandes, 2009)
SIGHT = {
    "full": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}


def linear(colour: str) -> list[float]:
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]


def luminance(rgb) -> float:
    return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]


def lab(rgb) -> tuple[float, float, float]:
    x = 0.4124 * rgb[0] + 0.3576 * rgb[1] + 0.1805 * rgb[2]
    z = 0.0193 * rgb[0] + 0.1192 * rgb[1] + 0.9505 * rgb[2]
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x / 0.9505, luminance(rgb), z / 1.089))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize(
    ("colours", "paper_colour"), [(palette.LIGHT, palette.LIGHT_PAGE), (palette.DARK, palette.DARK_PAGE)]
)
def test_colours_differ_for_every_sight(colours, paper_colour):
    assert len(colours) == len(palette.METHODS) == len(set(palette.MARKERS))
    for colour in colours:
        dark, light = sorted((luminance(linear(colour)), luminance(linear(paper_colour))))
        assert (light + 0.05) / (dark + 0.05) >= 3, colour
    for name, matrix in SIGHT.items():
        seen = {
            c: lab([min(1, max(0, math.fsum(map(float.__mul__, map(float, row), linear(c))))) for row in matrix])
            for c in colours
        }
        for one, other in itertools.combinations(colours, 2):
            assert math.dist(seen[one], seen[other]) >= 15, (name, one, other)


def test_a_method_has_one_place_in_the_palette():
    slots = palette.method_slots(["replay", "smolora", "ewc", "seqlora"])
    assert (slots["smolora"], slots["seqlora"]) == (0, 1) and len(set(slots.values())) == 4
    assert palette.method_slots(["seqlora"])["seqlora"] == 1
    many = palette.method_slots([*palette.METHODS, *(f"method {number}" for number in range(20))])
    styles = {palette.method_style(slot) for slot in many.values()}
    assert len(styles) == len(many) and len({style.colour for style in styles}) == len(palette.LIGHT)


# ---- a browser

CHECK = """
<script>
window.addEventListener("load", () => setTimeout(() => {
  const table = document.querySelector("table.sortable");
  const order = () => [...table.tBodies[0].rows].map((r) => r.cells[0].textContent);
  const buttons = [...table.tHead.querySelectorAll("button")], found = {before: order()};
  buttons[2].focus();
  found.focused = document.activeElement === buttons[2];
  buttons[2].click(); found.down = order(); found.sort = buttons[2].parentElement.getAttribute("aria-sort");
  buttons[2].click(); found.up = order();
  found.wide = document.documentElement.scrollWidth > innerWidth;
  found.broken = [...document.images].filter((i) => i.complete && i.naturalWidth === 0).length;
  document.documentElement.setAttribute("data-found", JSON.stringify(found));
}, 0));
</script>
"""


def browse(page: Path, profile: Path) -> tuple[str, float]:
    """A page as Chromium has it after its scripts, and the CPU seconds that this took."""
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += ["--virtual-time-budget=5000", f"--user-data-dir={profile}", page.as_uri()]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on PATH")
def test_in_a_browser(make_run, tmp_path):
    """It costs a second more than an empty page, without an error, and its tables sort; six tasks, five methods."""
    folder = write_report(big_runs(make_run, tmp_path), tmp_path / "out", cases_per_task=3).parent
    tried, empty = tmp_path / "tried.html", tmp_path / "empty.html"
    tried.write_text((folder / "report.html").read_text().replace("</body>", CHECK + "</body>"))
    empty.write_text("<!doctype html><title>empty</title>")
    profile = tmp_path / "profile"
    browse(empty, profile)  # makes the profile
    _, alone = browse(empty, profile)
    text, seconds = browse(tried, profile)
    assert seconds - alone < 1
    found = json.loads(html.unescape(re.search(r'data-found="([^"]+)"', text)[1]))
    names = ["smolora", "seqlora", "moelora", "smolora-vu", "replay"]
    before, down, up = ([name for name in found[key] if "paper" not in name] for key in ("before", "down", "up"))
    assert before == down == names and up == names[::-1]
    assert found["up"] == found["down"][::-1] != found["before"]
    assert found["focused"] and found["sort"] == "descending"
    assert not found["wide"] and found["broken"] == 0
