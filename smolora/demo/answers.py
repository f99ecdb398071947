"""The answers of all stages of all runs to one question, as `generate` gives them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..backends import use_backend
from ..data.format import Question
from ..evaluate.benchmarks import find_dataset
from ..evaluate.generate import BatchGenerator, BatchImages, Embed, GenerationSettings
from ..evaluate.instructions import TaskInstructions
from ..evaluate.routing import Layers, RoutingRecorder
from ..recipe import TaskRecipe
from ..train.methods import Stage
from .questions import NO_REFERENCE, Query, form_rule, instructions_of
from .runs import DemoRun, StageModels


class Reply(NamedTuple):
    """A stage's answer."""

    run: str
    stage: str
    text: str
    follows: bool | None  # whether it has the form that the instruction asks for; None where nothing says what that is
    score: float | None  # from 0 to 1, of a test set's question whose metric judges each answer by itself
    taken_for: str | None  # the task that it was given or that a selector found, for an adapter that needs one
    layers: Layers  # the routing of each layer, see `RoutingRecorder.samples`
    experts: dict[str, tuple[int, int]]  # numbers of VU and IF experts by layer


def num_replies(runs: Sequence[DemoRun], query: Query) -> int:
    """How many answers a question gets: one of each stage of each run that has its task."""
    return sum(len(run.stages) for run in runs if run.task(query.task) is not None)


def ask(runs: Sequence[DemoRun], models: StageModels, query: Query) -> Iterator[Reply]:
    """Ask every stage of every run that has the question's task.

    Raises:
        ValueError: the text cannot be tokenised, or the image cannot be read.
    """
    for run in runs:
        task = run.task(query.task)
        if task is not None:
            for stage in run.stages:
                yield _reply(run, models, stage, task, query)


def _reply(run: DemoRun, models: StageModels, stage: Stage, task: TaskRecipe, query: Query) -> Reply:
    training, evaluation = run.training, run.recipe.evaluation
    dataset = find_dataset(task.benchmark_name, evaluation.protocol)
    settings = GenerationSettings(max_new_tokens=evaluation.max_new_tokens or dataset.max_new_tokens)
    square = evaluation.padding == "all" or dataset.released_square
    backbone = training.backbone if square else training.backbone.cropping()
    question = Question(0, 0, query.text, None if query.image is None else str(query.image))
    prompt = backbone.prompt(question.messages)
    images = BatchImages.read(backbone, [[] if query.image is None else [query.image]])
    if images.faults[0] is not None:
        raise images.faults[0]
    with models.lock, use_backend(run.recipe.backend):
        model = models.get(run, stage)
        with RoutingRecorder(model) as recorder:
            embed, told = _embed(run, task, query.text), training.method.adapter.answers_as(task)
            generator = BatchGenerator(model, backbone, embed, told, settings, recorder)
            (text,), routing, tasks = generator([question], [prompt], images)
            layers, experts = routing[0] if routing else [], dict(recorder.experts)
    scoring = dataset.scoring(evaluation.protocol)
    rule = scoring.follows_format if query.item is not None else form_rule(run.recipe, task, query.text)
    follows = None if rule is None else bool(rule(query.item or NO_REFERENCE, text))
    score = None
    if query.item is not None and not scoring.metric.startswith("cider"):  # which compares with the other pictures
        (score,) = scoring.score([query.item], [text])
    taken_for = None if tasks is None else _task_name(run, tasks[0])
    return Reply(run.name, stage.name.removeprefix("stage-"), text, follows, score, taken_for, layers, experts)


def _task_name(run: DemoRun, task_id: int) -> str:
    """The name of a task by its id: upstream tasks, then one id for those of few-shot stages; -1 is none."""
    if task_id < 0:
        return "none of the tasks"
    names = [task.name for task in run.recipe.tasks]
    return names[task_id] if task_id < len(names) else "few-shot"


def _embed(run: DemoRun, task: TaskRecipe, text: str) -> Embed | None:
    """What embeds a question: as in the evaluation, but an instruction that is none of the task's by itself."""
    if run.training.texts is None:
        return None
    own = run.training.texts[task.name]
    known = instructions_of(task)
    if (
        not isinstance(own, TaskInstructions)
        or own.mean_of is None
        or any(text.strip().endswith(instruction) for instruction in known)
    ):
        return own
    return TaskInstructions(own.encoder, own.templates)
