"""Cases: image, question, each run's answers after the task's own stage and at the end, and the reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..data.format import Question, read_questions
from ..data.images import BrokenImageError, read_image
from ..io.files import atomic_file
from ..io.markdown import picture
from .figures import write_csv
from .layout import RunFolder, file_name
from .tables import markdown

SIDE = 320  # maximum width and height of an image in the report, in pixels


def case_tables(folder: Path, runs: Sequence[RunFolder], count: int) -> dict[str, str]:
    """A table of `count` cases for each task, those first on which the runs differ most.

    Args:
        folder: folder for the images (`cases/`) and `cases.csv`.
        runs: the runs. Tasks whose test file none of them has are left out.
        count: number of cases per task.

    Raises:
        ValueError: a run's answers or test files cannot be read.
    """
    tables, data = {}, []
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
        rows: list[list[str | float | None]] = []
        for question in chosen:
            name = str(question.question_id)
            shown = _thumbnail(question, images, folder / "cases", task)
            texts = [of_run[name] for of_run in answers.values()]
            rows.append([shown, question.text, *texts, _truth(question)])
            data += [
                (task, name, question.text, column, text, _truth(question))
                for column, text in zip(answers, texts, strict=True)
            ]
        tables[task] = markdown(["image", "question", *answers, "truth"], rows)
    write_csv(folder / "cases.csv", ("task", "question_id", "question", "run", "answer", "truth"), data)
    return tables


def _differing(question: Question, answers: Iterable[dict[str, str]]) -> int:
    """The number of different answers to a question."""
    return len({of_run[str(question.question_id)].strip().lower() for of_run in answers})


def _truth(question: Question) -> str:
    return question.answer if isinstance(question.answer, str) else "; ".join(question.answer or ())


def _thumbnail(question: Question, images: Path, folder: Path, task: str) -> str:
    """Save a thumbnail of a question's image and return its Markdown."""
    if question.image is None:
        return "no image"
    try:
        image = read_image(images / question.image)
    except BrokenImageError as error:
        return str(error)
    image.thumbnail((SIDE, SIDE))
    path = folder / f"{file_name(task)}-{question.index}.png"
    with atomic_file(path) as temporary:
        image.save(temporary)
    return picture(f"{task} {question.index}", f"{folder.name}/{path.name}")
