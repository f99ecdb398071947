"""The demo's page: what it says, in a server and in a browser."""

from __future__ import annotations

import html
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from smolora.io.markdown import printable
from support.browser import browser_page, tab_to
from support.train_world import SENTENCE

gr = pytest.importorskip("gradio", reason="needs gradio: make test-demo")
from smolora.demo import app  # noqa: E402  # it imports gradio
from smolora.demo.app import Demo  # noqa: E402


@pytest.fixture(scope="module")
def demo(runs) -> Demo:
    return Demo(runs)


@pytest.fixture(scope="module")
def url(demo, tmp_path_factory):
    """The address of a running server, with all of its files in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        patch.setattr(app, "KEPT_SECONDS", 2)
        patch.setattr(app, "SWEEP_SECONDS", 1)
        blocks = demo.page()
        blocks.launch(prevent_thread_lock=True, server_name="127.0.0.1", **demo.options())
        yield blocks.local_url
        blocks.close()


def texts(table: str) -> list[str]:
    """The answers in a table, row by row."""
    cells = re.findall(r'<td class="answer">(.*?)<br>', table, re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]+>", "", cell)).strip() for cell in cells]


def last(demo: Demo, *arguments) -> tuple[str, str, str]:
    return list(demo.answers(*arguments))[-1]


def test_a_table_of_stages_and_runs_with_what_each_answer_is_worth(demo, runs):
    _, asked, instruction, fault = demo.show("ImageNet", 1)
    assert "role" in fault and "alert" not in fault
    steps = list(demo.answers("ImageNet", 1, asked, instruction, None))
    assert "Asking 4 models" in steps[0][2] and "1 of 4 answers" in steps[1][2] and "s left" in steps[1][2]
    table, routing, status = steps[-1]
    name = str(demo.tests["ImageNet"].questions[0].question_id)
    given = [run.folder.answers(stage, "ImageNet")[name] for stage in range(2) for run in runs]  # row by row
    assert texts(table) == [printable(text) or "(empty)" for text in given]
    assert "Reference:" in table and ("right form" in table or "wrong form" in table)
    assert "4 of 4 answers" in status and "left" not in status
    assert routing.count("<h3>") == 1 and "layers.0.mlp.up_proj" in routing and "α 0." in routing


def test_what_is_wrong_is_said_in_a_sentence(demo, tmp_path):
    bad = tmp_path / "notes.png"
    bad.write_text("no picture")
    for arguments, sentence in (
        (("ImageNet", 4, "", "x", None), "The number of a question of ImageNet must be from 1 to 3, got 4."),
        (("ImageNet", None, "", "x", None), "must be from 1 to 3, got None."),
        (("GQA", 1, "", "x", None), "The task must be one of ImageNet, Flickr30k"),
        (("ImageNet", 1, " ", "", None), "There is nothing to answer"),
        (("ImageNet", 1, "", "x", str(bad)), "notes.png is no picture that can be read."),
    ):
        table, routing, status = last(demo, *arguments)
        assert sentence in status and 'role="alert"' in status and table == routing == ""
    assert "must be from 1 to 3" in demo.show("ImageNet", 0)[3]
    assert "notes.png is no picture" in demo.show_upload(str(bad), "ImageNet", 1)[1]


def test_whatever_is_typed_is_text(demo):
    _, _, status = last(demo, "<b>x</b>", 1, "", "", None)
    assert "<b>" not in status and "&lt;b>" in status


def test_two_people_at_once_get_their_own_answers(demo, url):
    client = pytest.importorskip("gradio_client")
    visits = [(task, 1, *demo.show(task, 1)[1:3], None) for task in ("ImageNet", "Flickr30k")]
    alone = [texts(last(demo, *visit)[0]) for visit in visits]
    assert alone[0] != alone[1]

    def visit(number: int) -> list[str]:
        visitor = client.Client(url, verbose=False)
        return texts(visitor.predict(*visits[number % 2], api_name="/ask")[0])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(visit, range(4))) == alone * 2


def test_uploads_are_bounded_and_deleted(demo, url, monkeypatch):
    httpx = pytest.importorskip("httpx")
    sent = httpx.post(f"{url}gradio_api/upload", files={"files": ("big.png", bytes(11 * 2**20))})
    assert sent.status_code == 413
    sent = httpx.post(f"{url}gradio_api/upload", files={"files": ("small.png", bytes(2**10))})
    (name,) = sent.json()
    assert name.endswith("small.png")
    path = app.Path(name)
    assert path.is_file()
    end = time.monotonic() + 20
    while path.exists() and time.monotonic() < end:
        time.sleep(0.2)
    assert not path.exists()


def test_files_of_the_server_are_not_read(demo, url, folders):
    """A visitor who names a file instead of uploading one gets an error."""
    httpx = pytest.importorskip("httpx")
    picture = next((folders[0].parent / "data").rglob("*.png"))
    file = {"path": str(picture), "meta": {"_type": "gradio.FileData"}}
    call = httpx.post(f"{url}gradio_api/call/ask", json={"data": ["ImageNet", 1, "", "x", file]})
    told = httpx.get(f"{url}gradio_api/call/ask/{call.json()['event_id']}").text
    assert told.startswith("event: error") and "answers" not in told


def test_in_a_browser_by_the_keyboard_alone(demo, url):
    """A question of the second task is asked as it stands: choosing, counting, passing through every field, asking."""
    with browser_page() as page:
        page.goto(url)
        tab_to(page, "Task")
        page.get_by_role("option", name="Flickr30k").wait_for()  # focus opens the list, a moment later
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('[role=combobox], input').value === 'Flickr30k'")
        tab_to(page, "Number of the question")
        page.keyboard.press("ArrowUp")
        page.get_by_role("img", name="The picture of question 13").wait_for()
        tab_to(page, "Ask all stages")
        page.keyboard.press("Enter")
        page.get_by_text("4 of 4 answers").wait_for()
        shown = page.get_by_role("region", name="Answers").inner_html()
        expected = last(demo, "Flickr30k", 2, *demo.show("Flickr30k", 2)[1:3], None)[0]
        assert texts(shown) == texts(expected) and len(texts(shown)) == 4
        assert "Reference:" in page.content()
        assert page.faults == []


def test_in_a_browser_every_control_has_a_name(url):
    with browser_page(color_scheme="dark") as page:
        page.goto(url)
        page.get_by_role("button", name="Ask all stages").click()
        page.get_by_text("4 of 4 answers").wait_for()
        tree = page.locator("body").aria_snapshot()
        controls = re.findall(r"- (button|combobox|spinbutton|textbox|link|region|heading|table)\b(.*)", tree)
        assert {kind for kind, _ in controls} >= {"button", "combobox", "spinbutton", "textbox", "region", "table"}
        assert [kind for kind, rest in controls if '"' not in rest] == []
        colour = page.evaluate("getComputedStyle(document.querySelector('.smolora')).backgroundColor")
        assert colour == "rgb(22, 24, 28)"  # the dark page's
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_in_a_browser_with_a_picture_of_ones_own(demo, url, tmp_path):
    bad, good = tmp_path / "notes.png", tmp_path / "mine.png"
    bad.write_text("no picture")
    Image.new("RGB", (40, 30), (200, 30, 30)).save(good)
    with browser_page() as page:
        page.goto(url)
        chooser = page.locator("input[type=file]")
        chooser.set_input_files(bad)
        page.get_by_role("alert").get_by_text("notes.png is no picture that can be read.").wait_for()
        page.get_by_role("button", name="Remove").or_(page.get_by_role("button", name="Clear")).first.click()
        chooser.set_input_files(good)
        page.get_by_role("img", name="mine.png").wait_for()
        page.get_by_role("textbox", name="Question").fill("Which colour is it?")
        page.get_by_role("button", name="Ask all stages").click()
        page.get_by_text("4 of 4 answers").wait_for()
        shown = page.get_by_role("region", name="Answers").inner_html()
        instruction = demo.show("ImageNet", 1)[2]
        assert texts(shown) == texts(last(demo, "ImageNet", 1, "Which colour is it?", instruction, str(good))[0])
        assert "Reference:" not in page.content() and SENTENCE not in instruction
        assert page.faults == []
