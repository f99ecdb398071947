"""The demo's page, in Gradio."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..data.images import BrokenImageError
from ..io.markdown import printable
from .answers import Reply, ask, num_replies
from .questions import MOST_BYTES, NO_REFERENCE, Query, TaskQuestions, check_upload, compose, known_to
from .runs import DemoRun, StageModels
from .view import answers_table, picture_view, routing_view, style_sheet

KEPT_SECONDS = 3600  # that an upload is kept for another question about it
SWEEP_SECONDS = 60
AT_ONCE = 4  # people whose answers are made in turns; the others wait in line


class Demo:
    """The demo of finished runs.

    Every event gets all that it needs from the page, so that no visitor's question reaches another's answers.

    Args:
        runs: the runs, a column of answers each.

    Raises:
        ValueError: a test set cannot be read.
    """

    def __init__(self, runs: Sequence[DemoRun]) -> None:
        self.runs, self.models = runs, StageModels()
        self.folders = [run.folder for run in runs]
        self.tests: dict[str, TaskQuestions] = {}
        for run in runs:
            for task in run.recipe.all_tasks:
                if task.name not in self.tests:
                    self.tests[task.name] = TaskQuestions(run.recipe, task)
        self.instructions = known_to([run.recipe for run in runs])

    # ---- events

    def show(self, task: str, number: float | None) -> tuple[str, str, str, str]:
        """A question of a test set, counted from 1: its picture, its text, its instruction, and what is wrong."""
        try:
            test = self._test(task)
            question = test.questions[self._place(test, number)]
            asked, instruction = test.split(question)
            name = f"The picture of question {question.question_id}"
            return picture_view(test.image(question), name), asked, instruction, self._status("")
        except ValueError as error:
            return "", "", "", self._status(str(error), fault=True)

    def show_upload(self, upload: str | None, task: str, number: float | None) -> tuple[str, str]:
        """The picture that will be asked about, and what is wrong with an upload."""
        try:
            if upload is None:
                test = self._test(task)
                question = test.questions[self._place(test, number)]
                return picture_view(test.image(question), f"The picture of question {question.question_id}"), ""
            check_upload(Path(upload))
            return picture_view(Path(upload), Path(upload).name), ""
        except ValueError as error:
            return "", self._status(str(error), fault=True)

    def answers(
        self, task: str, number: float | None, asked: str, instruction: str, upload: str | None
    ) -> Iterator[tuple[str, str, str]]:
        """The answers of all stages, one after the other: their table, the routing at the end, and how far it is."""
        try:
            query, reference = self._query(task, number, asked or "", instruction or "", upload)
            total = num_replies(self.runs, query)
            replies: list[Reply] = []
            start = time.monotonic()
            yield "", "", self._status(f"Asking {total} models.")
            for reply in ask(self.runs, self.models, query):
                replies.append(reply)
                rate = len(replies) / (time.monotonic() - start)
                status = f"{len(replies)} of {total} answers, {rate:.1f} a second"
                left = (total - len(replies)) / rate
                status += f", {left:.0f} s left: {reply.run}." if len(replies) < total else "."
                table = answers_table(self.folders, replies, reference)
                routing = routing_view(self.folders, replies) if len(replies) == total else ""
                yield table, routing, self._status(status)
        except ValueError as error:
            message = str(error)
            if isinstance(error, BrokenImageError) and upload is not None:
                message = f"{Path(upload).name} cannot be read any more: upload it again."
            yield "", "", self._status(message, fault=True)

    def _query(
        self, task: str, number: float | None, asked: str, instruction: str, upload: str | None
    ) -> tuple[Query, str | None]:
        """The question to ask, and its reference if it is a test set's as it stands."""
        test = self._test(task)
        if upload is not None:
            check_upload(Path(upload))
            return Query(task, compose(asked, instruction), Path(upload), None), None
        query = test.query(test.questions[self._place(test, number)], asked, instruction)
        references = (query.item or NO_REFERENCE).references
        return query, "; ".join(dict.fromkeys(references)) or None

    def _test(self, task: str) -> TaskQuestions:
        if task not in self.tests:
            raise ValueError(f"The task must be one of {', '.join(self.tests)}, got {task!r}.")
        return self.tests[task]

    @staticmethod
    def _place(test: TaskQuestions, number: float | None) -> int:
        """The place of a question in its test set, from 0."""
        if number is None or number != int(number) or not 1 <= number <= len(test.questions):
            raise ValueError(
                f"The number of a question of {test.task.name} must be from 1 to {len(test.questions):,}, got {number}."
            )
        return int(number) - 1

    @staticmethod
    def _status(text: str, *, fault: bool = False) -> str:
        role = "alert" if fault else "status"
        escaped = printable(text).replace("&", "&amp;").replace("<", "&lt;")
        return f'<p role="{role}" class="smolora">{escaped}</p>'

    # ---- the page

    def page(self) -> gr.Blocks:
        """The page, ready to be launched with `options`."""
        first = next(iter(self.tests))
        picture, asked, instruction, _ = self.show(first, 1)
        title = "smolora demo: " + ", ".join(run.name for run in self.runs)
        with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(SWEEP_SECONDS, KEPT_SECONDS)) as blocks:
            gr.HTML('<h1 class="smolora">What is left of each task, stage by stage</h1>')
            with gr.Row():
                with gr.Column(scale=1):
                    task = gr.Dropdown(list(self.tests), value=first, label="Task", filterable=False)
                    number = gr.Number(1, precision=0, minimum=1, label="Number of the question in its test set")
                    shown = gr.HTML(picture)
                with gr.Column(scale=2):
                    text = gr.Textbox(asked, label="Question", lines=3, max_length=8000)
                    form = gr.Dropdown(
                        [(" / ".join(text.splitlines()), text) for text in self.instructions],  # a box of one line
                        value=instruction,
                        label="Instruction",
                        info="Choose another one, or write your own.",
                        allow_custom_value=True,
                    )
                    upload = gr.File(
                        label=f"A picture of your own, at most {MOST_BYTES // 2**20} MiB",
                        file_types=["image"],
                        height=130,
                    )
                    button = gr.Button("Ask all stages", variant="primary")
            status = gr.HTML(self._status(""))
            table = gr.HTML()
            routing = gr.HTML()
            gr.on(
                [task.change, number.change],
                self.show,
                [task, number],
                [shown, text, form, status],
                show_progress="hidden",
                trigger_mode="always_last",  # two events of their own could be answered in the wrong order
                api_name=False,
            )
            upload.change(
                self.show_upload, [upload, task, number], [shown, status], show_progress="hidden", api_name=False
            )
            button.click(
                self.answers,
                [task, number, text, form, upload],
                [table, routing, status],
                show_progress="hidden",
                api_name="ask",
                concurrency_limit=AT_ONCE,
            )
        return blocks

    @staticmethod
    def options() -> dict[str, Any]:
        """Options for `launch`: nothing is shared, and what is uploaded is bounded."""
        return {
            "share": False,
            "max_file_size": MOST_BYTES,
            "head": f"<style>{style_sheet()}</style>",  # as `css`, Gradio would rewrite it, and lose the dark colours
            "footer_links": [],
            "theme": gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            "quiet": True,
            "ssr_mode": False,
            "run_history": False,
            "enable_monitoring": False,
        }
