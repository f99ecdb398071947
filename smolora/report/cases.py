"""Cases: image, question, each run's answers, and the reference. Markdown has a task's own stage and the end alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.format import Question, read_questions
from ..data.images import BrokenImageError, read_image
from ..evaluate.grounding import true_boxes, written_box
from ..io.files import atomic_file
from ..io.markdown import picture
from .boxes import Box, draw_boxes
from .csv_files import write_csv
from .layout import RunFolder, file_name
from .tables import Cells, Table

GROUNDING = "Grounding"  # the dataset whose answers are boxes
SIDE = 320  # maximum width and height of an image in the report, in pixels


@dataclass(frozen=True)
class Case:
    """A question with its answers."""

    question: Question
    picture: Path | str  # the thumbnail, or the reason why there is none
    answers: dict[str, str]  # by the run and when it answered, as the tables name it

    @property
    def truth(self) -> str:
        """The reference, or all of them."""
        answer = self.question.answer
        return answer if isinstance(answer, str) else "; ".join(answer or ())


def find_cases(folder: Path, runs: Sequence[RunFolder], count: int) -> dict[str, list[Case]]:
    """Choose `count` cases for each task, those first on which the runs differ most.

    Args:
        folder: folder for the images (`cases/`) and `cases.csv`.
        runs: the runs. Tasks whose test file none of them has are left out.
        count: number of cases per task.

    Raises:
        ValueError: a run's answers or test files cannot be read.
    """
    cases: dict[str, list[Case]] = {}
    for task in dict.fromkeys(task for run in runs for task in run.tasks):
        having = [run for run in runs if task in run.tasks]
        source = next((run for run in having if task in run.tests), None)
        if source is None:
            continue
        test = source.tests[task]
        images = source.folder / test["images"]
        answers = {}  # by column title
        for run in having:
            own, last = run.own_stage(task), len(run.stages) - 1
            if own != last:
                answers[f"{run.name}, after {run.stages[own].removeprefix('stage-')}"] = run.answers(own, task)
            answers[f"{run.name}, at the end"] = run.answers(last, task)
        questions = [
            q
            for q in read_questions(source.folder / test["questions"], broken=[])  # broken ones have no answers
            if all(str(q.question_id) in of_run for of_run in answers.values())
        ]
        chosen = sorted(questions, key=lambda q: (-_differing(q, answers.values()), q.index))[:count]
        boxes = true_boxes(source.folder / test["questions"]) if test.get("dataset", task) == GROUNDING else None
        cases[task] = []
        for question in chosen:
            given = {column: of_run[str(question.question_id)] for column, of_run in answers.items()}
            box = None if boxes is None else written_box(boxes[question.index])
            shown = _thumbnail(question, images, folder / "cases", task, box, given)
            cases[task].append(Case(question, shown, given))
    rows = [
        (task, str(case.question.question_id), case.question.text, column, text, case.truth)
        for task, of_task in cases.items()
        for case in of_task
        for column, text in case.answers.items()
    ]
    write_csv(folder / "cases.csv", ("task", "question_id", "question", "run", "answer", "truth"), rows)
    return cases


def case_tables(cases: dict[str, list[Case]]) -> dict[str, Table]:
    """A table of each task's cases."""
    tables = {}
    for task, of_task in cases.items():
        columns = list(of_task[0].answers) if of_task else []
        rows: list[Cells] = [
            [_shown(case, task), case.question.text, *case.answers.values(), case.truth] for case in of_task
        ]
        tables[task] = Table(["image", "question", *columns, "truth"], rows)
    return tables


def _differing(question: Question, answers: Iterable[dict[str, str]]) -> int:
    """The number of different answers to a question."""
    return len({of_run[str(question.question_id)].strip().lower() for of_run in answers})


def _shown(case: Case, task: str) -> str:
    """A case's thumbnail in Markdown, or the reason why there is none."""
    if isinstance(case.picture, str):
        return case.picture
    return picture(f"{task} {case.question.index}", f"{case.picture.parent.name}/{case.picture.name}")


def _thumbnail(
    question: Question, images: Path, folder: Path, task: str, box: Box | None, answers: dict[str, str]
) -> Path | str:
    """Save a thumbnail of a question's image and return its path, or the reason why there is none.

    With the true box, the boxes that were answered are drawn beside it.
    """
    if question.image is None:
        return "no image"
    try:
        image = read_image(images / question.image)
    except BrokenImageError as error:
        return str(error)
    if box is None:
        image.thumbnail((SIDE, SIDE))
    else:
        image = draw_boxes(image, box, answers, SIDE)
    path = folder / f"{file_name(task)}-{question.index}.png"
    with atomic_file(path) as temporary:
        image.save(temporary)
    return path
