"""Answer the questions of a test file: batched, sharded over processes, and resumable at any moment.

Batches are planned from the whole file, so they depend neither on earlier answers nor on the number of processes. Each
process appends one line per batch to its own file under `<output>.parts/`; a torn last line counts as not written. The
lock `<output>.lock` keeps out a second start. When all batches are finished, the main process writes

    answers.jsonl           {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}, as released
    answers.info.json       {"run": its settings, "count", "skipped", "routing": one entry per layer}; of adapters with
                            parts for each task also "tasks": that of each answer, given or found by a selector
    answers.skipped.jsonl   {"index", "question_id", "reason"}, if questions were skipped
    answers.routes.jsonl    {"question_id", "layers"}, if the routes of each sample were asked for

in the question file's order. The answers come last, so they exist only once everything is done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ..arguments import is_int
from ..backbones.base import Backbone, ImageInput
from ..data.format import Question, Skipped, instruction_source, read_json, read_questions
from ..data.images import BrokenImageError
from ..data.prompts import pad
from ..instructions.texts import IMAGE_TOKEN
from ..io.files import atomic_write_text, has_file, locked, write_json
from ..io.progress import Progress
from .routing import RoutingRecorder, summary, tally
from .score import skipped_path
from .shards import AnswerShards, check_same_run

# embeds the instructions of questions; its attribute `where`, if it has one, tells which text of each it is given
Embed = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of the generation, which is always greedy, whatever the model's own `generation_config` asks for.

    Args:
        max_new_tokens: maximum length of an answer.
        token_budget: maximum number of prompt tokens in a batch, padding included. A longer prompt gets its own batch.
        image_workers: processes that decode images; 0 to decode in this process.
        skip_broken: leave out and list questions that cannot be answered; otherwise they are an error.
        routes_per_sample: save the routes of every sample in addition to their summary.
    """

    max_new_tokens: int = 128
    token_budget: int = 16384
    image_workers: int = 2
    skip_broken: bool = False
    routes_per_sample: bool = False

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("token_budget", 1), ("image_workers", 0)):
            value = getattr(self, name)
            if not is_int(value, low):
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")


class AnswerJob(NamedTuple):
    """A test file to answer."""

    dataset: str
    questions: Path
    images: Path  # folder that the records' image paths are relative to
    output: Path  # the answers file
    model_id: str
    instructions: str | None = None  # source of the instruction embeddings, where there is a choice
    task_id: int | None = None  # of all its questions, for a model that is told


def read_answerable_questions(
    file: Path, images: Path, *, skip_broken: bool = False
) -> tuple[list[Question], list[Skipped]]:
    """Read the questions of a test file, and check that their images exist.

    Args:
        file: the test file.
        images: folder that its records' image paths are relative to.
        skip_broken: leave out records that are malformed or lack their image.

    Returns:
        The questions, and the records that were left out.

    Raises:
        ValueError: a record is malformed or lacks its image. The message names file and index.
    """
    skipped: list[Skipped] = []
    questions = []
    for question in read_questions(file, broken=skipped if skip_broken else None):
        path = next((path for path in _image_paths(question, images) if not has_file(path)), None)
        if path is None:
            questions.append(question)
            continue
        reason = f"{file}: record {question.index}: there is no image {_shortened(str(path))}"
        if not skip_broken:
            raise ValueError(reason)
        skipped.append(Skipped(question.index, question.question_id, reason))
    return questions, skipped


def _shortened(text: str) -> str:
    """Shorten a long name, such as image data written in place of a path."""
    return text if len(text) <= 400 else f"{text[:200]}...{text[-100:]}"


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Plan batches of positions in `lengths`, longest first, so that running out of memory shows at once.

    A batch of n sequences, the longest of L tokens, has n L <= token_budget, or n = 1.
    """
    batches: list[list[int]] = []
    longest = 0
    for position in sorted(range(len(lengths)), key=lambda p: (-lengths[p], p)):
        if not batches or (len(batches[-1]) + 1) * longest > token_budget:
            batches.append([])
            longest = lengths[position]
        batches[-1].append(position)
    return batches


def answer_id(question_id: int | str, model_id: str) -> str:
    """An id that is the same in every run."""
    return hashlib.sha256(json.dumps([question_id, model_id]).encode()).hexdigest()[:22]


def process_state(*, on_cpu: bool) -> PartialState:
    """The process state by the launcher's variables (torchrun, accelerate). Call it before loading a model."""
    # processes wait for each other at the end of a task, and one may have hours more to do
    return PartialState(cpu=on_cpu, timeout=timedelta(days=7))


def generate_answers(
    model: nn.Module,
    backbone: Backbone,
    job: AnswerJob,
    *,
    embed: Embed | None = None,
    settings: GenerationSettings | None = None,
) -> dict[str, Any]:
    """Answer all questions of a test file. A second call continues where the first one was stopped.

    Args:
        model: a model, with or without adapters, in eval mode and on its device.
        backbone: makes its prompts and images.
        job: the test file and the answers file.
        embed: makes instruction embeddings (n, e) of n questions, for a model that takes `instruction_embeds`.
        settings: settings of the generation.

    Returns:
        The content of the info file (see the module), the same on every process.

    Raises:
        ValueError: a record is malformed, an image is missing or broken (the message names file and index), or the
            output belongs to a run with another model, file or settings.
        BlockingIOError: another run is writing the output.
    """
    settings = settings or GenerationSettings()
    state = process_state(on_cpu=all(parameter.device.type == "cpu" for parameter in model.parameters()))
    with _exclusive(job.output, state):
        return _answer_all(model, backbone, job, embed, settings, state)


def _exclusive(output: Path, state: PartialState) -> AbstractContextManager[None]:
    """The lock of an answers file that is still to be written. The main process holds it for all processes."""
    lock = output.with_name(output.name + ".lock")
    if not state.is_main_process:
        return nullcontext()
    if output.exists() and not AnswerShards(output, {}).folder.exists():  # finished: it is only read
        if lock.exists():
            with suppress(OSError), locked(lock, str(output)):
                pass  # a run that was killed at its very end left it, and letting go of it removes it
        return nullcontext()
    return locked(lock, str(output))


def _answer_all(
    model: nn.Module,
    backbone: Backbone,
    job: AnswerJob,
    embed: Embed | None,
    settings: GenerationSettings,
    state: PartialState,
) -> dict[str, Any]:
    state.wait_for_everyone()  # the main process has the lock
    run = _run_settings(job, settings, backbone, model, embed is not None)
    if job.output.exists():
        info = read_json(_info_path(job.output))
        check_same_run(info["run"], run, job.output)
        if state.is_main_process:
            AnswerShards(job.output, run).remove()  # left by a run that was killed between its last two steps
        return info
    questions, skipped = read_answerable_questions(job.questions, job.images, skip_broken=settings.skip_broken)
    questions, prompts, lengths = _tokenised(job, questions, skipped, backbone, settings)
    plan = plan_batches(lengths, settings.token_budget)
    # a plan can differ with equal settings: by another tokenizer, or an image that was missing before
    parts = AnswerShards(job.output, {**run, "plan": hashlib.sha256(json.dumps([prompts, plan]).encode()).hexdigest()})
    done = parts.read()
    state.wait_for_everyone()  # all have read the shards before anyone appends
    mine = [batch for batch in range(len(plan)) if batch not in done][state.process_index :: state.num_processes]
    share = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
    with (
        RoutingRecorder(model) as recorder,
        parts.writer(state.process_index) as write,
        Progress(
            f"answering {job.dataset}{share}",
            sum(len(plan[batch]) for batch in mine),
            "question",
            hidden=not state.is_main_process,
        ) as progress,
    ):
        answerer = BatchGenerator(model, backbone, embed, job.task_id, settings, recorder)
        for batch, read in _load_images(mine, plan, questions, job.images, backbone, settings):
            chosen, broken = [], []
            for position, fault in zip(plan[batch], read.faults, strict=True):
                if fault is not None:
                    question = questions[position]
                    reason = f"{job.questions}: record {question.index}: {fault}"
                    if not settings.skip_broken:
                        raise ValueError(reason)
                    broken.append(Skipped(question.index, question.question_id, reason))
                else:
                    chosen.append(position)
            answers, layers, tasks = answerer([questions[p] for p in chosen], [prompts[p] for p in chosen], read)
            write(
                {
                    "batch": batch,
                    "answers": [[p, text] for p, text in zip(chosen, answers, strict=True)],
                    "skipped": broken,
                    "tally": tally(layers, recorder.experts),
                    "routes": layers if settings.routes_per_sample else [],
                    **({} if tasks is None else {"tasks": tasks}),
                }
            )
            progress.update(len(plan[batch]))
    state.wait_for_everyone()
    if state.is_main_process:
        done = parts.read()
        missing = [batch for batch in range(len(plan)) if batch not in done]
        if missing:
            raise ValueError(
                f"{parts.folder} lacks {len(missing)} of {len(plan)} batches, the first is {missing[0]}: something "
                "removed or changed it; the same command goes on with what is there"
            )
        _merge(job, run, questions, skipped, [done[batch] for batch in range(len(plan))])
        parts.remove()
    state.wait_for_everyone()
    return read_json(_info_path(job.output))


def _tokenised(
    job: AnswerJob,
    questions: Sequence[Question],
    skipped: list[Skipped],
    backbone: Backbone,
    settings: GenerationSettings,
) -> tuple[list[Question], list[list[int]], list[int]]:
    """Tokenise the questions; also returns their lengths with images. Those that cannot be tokenised, or have an image
    that had to be looked at and is broken, raise an error, or are added to `skipped`.
    """
    asked, prompts, lengths = [], [], []
    for question in questions:
        try:
            prompt = backbone.prompt(question.messages)
            length = backbone.length(prompt, _image_paths(question, job.images))
        except ValueError as error:
            reason = f"{job.questions}: record {question.index}: {error}"
            if not settings.skip_broken:
                raise ValueError(reason) from error
            skipped.append(Skipped(question.index, question.question_id, reason))
        else:
            asked.append(question)
            prompts.append(prompt)
            lengths.append(length)
    return asked, prompts, lengths


class BatchImages(NamedTuple):
    """The images of a batch's samples; of those with a fault none is here.

    Attributes:
        ids: of each sample without a fault, for each of its images the ids that stand for it.
        tensors: the images' tensors, joined.
        faults: for each sample what is wrong with an image, or None.
    """

    ids: list[list[list[int]]]
    tensors: dict[str, Tensor]
    faults: list[BrokenImageError | None]

    @classmethod
    def read(cls, backbone: Backbone, samples: Sequence[Sequence[Path]]) -> BatchImages:
        """Read the images of each sample."""
        images: list[ImageInput] = []
        ids: list[list[list[int]]] = []
        faults: list[BrokenImageError | None] = []
        for paths in samples:
            try:
                own = [backbone.read(path) for path in paths]
            except BrokenImageError as error:
                faults.append(error)
                continue
            faults.append(None)
            ids.append([image.ids for image in own])
            images += own
        return cls(ids, backbone.join(images), faults)


class BatchGenerator:
    """Generates the answers to batches greedily.

    Args:
        model: a model, with or without adapters, in eval mode and on its device.
        backbone: makes its inputs, and reads its answers.
        embed: makes instruction embeddings (n, e) of n questions, for a model that takes `instruction_embeds`.
        task_id: the task of all questions, for a model that is told.
        settings: settings of the generation.
        recorder: the recorder of the model's routing, inside its `with` block.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: Backbone,
        embed: Embed | None,
        task_id: int | None,
        settings: GenerationSettings,
        recorder: RoutingRecorder,
    ) -> None:
        self.model, self.backbone, self.embed, self.recorder = model, backbone, embed, recorder
        self.task_id = task_id
        self.config = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            bos_token_id=backbone.tokenizer.bos_token_id,
            eos_token_id=backbone.stop_token_ids,
            pad_token_id=backbone.pad_token_id,
        )

    @torch.inference_mode()
    def __call__(
        self, questions: Sequence[Question], prompts: Sequence[list[int]], images: BatchImages
    ) -> tuple[list[str], list[list[dict[str, Any]]], list[int] | None]:
        """Answer a batch.

        Args:
            questions: n questions.
            prompts: their tokens, from `Backbone.prompt`.
            images: their images.

        Returns:
            The n answers, the routing of each sample as `RoutingRecorder.samples` gives it, and the samples' tasks as
            `RoutingRecorder.tasks` gives them.
        """
        if not questions:
            return [], [], None
        # parameters of an offloaded base are on the meta device; accelerate moves the inputs itself
        there = (p.device for p in self.model.parameters() if p.is_floating_point() and not p.is_meta)
        device = next(there, torch.device("cpu"))
        expanded = [self.backbone.expand(p, own) for p, own in zip(prompts, images.ids, strict=True)]
        ids, mask = pad(expanded, self.backbone.pad_token_id, left=True)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **self.backbone.token_inputs(ids)}
        for name, tensor in images.tensors.items():
            inputs[name] = tensor.to(self.model.dtype) if tensor.is_floating_point() else tensor
        if self.embed is not None:
            where = getattr(self.embed, "where", "last_line")
            inputs["instruction_embeds"] = self.embed([instruction_source(question, where) for question in questions])
        if self.task_id is not None:
            inputs["task_ids"] = torch.full((len(questions),), self.task_id)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        self.recorder.start()
        stops = StoppingCriteriaList([StopTexts(self.backbone, ids.shape[1])] if self.backbone.stop_texts else [])
        with plain_generation(self.model):
            sequences = self.model.generate(**inputs, generation_config=self.config, stopping_criteria=stops)
        layers = self.recorder.samples(mask)
        answers = [self.backbone.decode(sequence) for sequence in sequences[:, ids.shape[1] :].tolist()]
        return answers, layers, self.recorder.tasks()


class StopTexts(StoppingCriteria):
    """Ends a sequence once its answer holds one of the backbone's `stop_texts`.

    `stop_strings` of transformers would, too, but needs a tokenizer that can spell every text.

    Args:
        backbone: has the tokenizer and the texts.
        prompt: length of the prompts, which may hold these texts.
    """

    def __init__(self, backbone: Backbone, prompt: int) -> None:
        self.backbone, self.prompt = backbone, prompt
        self.reach = max(len(text.encode()) for text in backbone.stop_texts)  # a token is a byte or more

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return whether each sequence (n, L) has ended, bool (n,)."""
        newest = input_ids[:, self.prompt :][:, -self.reach :].tolist()
        texts = self.backbone.tokenizer.batch_decode(newest)
        ended = [any(stop in text for stop in self.backbone.stop_texts) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


@contextmanager
def plain_generation(model: nn.Module) -> Iterator[None]:
    """Hide a model's own `generation_config`, from which `generate` takes every option that it is not given.

    A repetition penalty, suppressed tokens or a time limit would change the answers.
    """
    before = {module: vars(module).get("generation_config") for module in model.modules()}
    before = {module: config for module, config in before.items() if config is not None}
    for module in before:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, config in before.items():
            module.generation_config = config


# ---- images


class _Batches(Dataset):
    """The images of each batch. Those of one are few tensors, since each tensor sent between processes costs a file
    descriptor.
    """

    def __init__(self, batches: list[list[list[Path]]], backbone: Backbone) -> None:
        self.batches, self.backbone = batches, backbone

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> BatchImages:
        return BatchImages.read(self.backbone, self.batches[index])


def _load_images(
    batches: list[int],
    plan: list[list[int]],
    questions: Sequence[Question],
    folder: Path,
    backbone: Backbone,
    settings: GenerationSettings,
) -> Iterator[tuple[int, BatchImages]]:
    """Iterate over the batches with their images, which other processes decode ahead."""
    paths = [[_image_paths(questions[p], folder) for p in plan[batch]] for batch in batches]
    workers = min(settings.image_workers, len(batches)) if any(map(any, paths)) else 0
    loader = DataLoader(_Batches(paths, backbone), batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    yield from zip(batches, loader, strict=True)


def _as_it_is(batch: BatchImages) -> BatchImages:
    return batch


def _image_paths(question: Question, folder: Path) -> list[Path]:
    return [folder / image for image in question.images]


# ---- files


def _merge(
    job: AnswerJob,
    run: dict[str, Any],
    questions: Sequence[Question],
    skipped: list[Skipped],
    lines: list[dict[str, Any]],
) -> None:
    """Merge the finished batches into the output files; see the module."""
    skipped = sorted([*skipped, *(Skipped(*record) for line in lines for record in line["skipped"])])
    texts = {position: text for line in lines for position, text in line["answers"]}
    routes = {
        position: layers
        for line in lines
        for (position, _), layers in zip(line["answers"], line["routes"], strict=bool(line["routes"]))
    }
    of_samples = [{"question_id": questions[p].question_id, "layers": routes[p]} for p in sorted(routes)]
    for path, records in (
        (skipped_path(job.output), [record._asdict() for record in skipped]),
        (job.output.with_suffix(".routes.jsonl"), of_samples),
    ):
        if records:
            _write_lines(path, records)
        else:
            path.unlink(missing_ok=True)  # left by a run whose answers were removed
    info = {
        "run": run,
        "count": len(texts),
        "skipped": len(skipped),
        "routing": summary(line["tally"] for line in lines),
    }
    tasks = {
        position: task
        for line in lines
        if "tasks" in line
        for (position, _), task in zip(line["answers"], line["tasks"], strict=True)
    }
    if tasks:
        info["tasks"] = [tasks[position] for position in sorted(tasks)]
    write_json(_info_path(job.output), info)
    _write_lines(job.output, (_answer(questions[p], texts[p], job) for p in sorted(texts)))


def _answer(question: Question, text: str, job: AnswerJob) -> dict[str, Any]:
    """A line of the answers file. As released, only ScienceQA's prompts show the place of the image."""
    place = f"{IMAGE_TOKEN}\n" if job.dataset == "ScienceQA" and question.image is not None else ""
    return {
        "question_id": question.question_id,
        "prompt": place + question.text,
        "text": text,
        "answer_id": answer_id(question.question_id, job.model_id),
        "model_id": job.model_id,
        "metadata": {},
    }


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    atomic_write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def _info_path(output: Path) -> Path:
    return output.with_suffix(".info.json")


def _run_settings(
    job: AnswerJob, settings: GenerationSettings, backbone: Backbone, model: nn.Module, embedded: bool
) -> dict[str, Any]:
    """The settings that the answers depend on."""
    return {
        "dataset": job.dataset,
        "questions": hashlib.sha256(job.questions.read_bytes()).hexdigest(),
        "model_id": job.model_id,
        "weights": weights_digest(model),
        **backbone.settings(),
        "instruction_embeds": embedded,
        "instructions": job.instructions,
        **({} if job.task_id is None else {"task_id": job.task_id}),
        **{name: value for name, value in asdict(settings).items() if name != "image_workers"},
    }


def weights_digest(model: nn.Module) -> str:
    """Hash up to 256 numbers of every parameter, what selectors choose by, and which adapters are active."""
    digest = hashlib.sha256()
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    in_use = {(tuple(layer.active_adapters), layer.disable_adapters) for layer in layers}
    if in_use - {(("default",), False)}:
        digest.update(repr(sorted(in_use)).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:  # an offloaded base is not in memory
            values = parameter.detach().flatten()
            values = values[:: max(1, len(values) // 256)][:256]
            digest.update(values.double().cpu().numpy().tobytes())
    for name, buffer in model.named_buffers():
        if "_selector." in name:
            digest.update(f"{name} {tuple(buffer.shape)}".encode() + buffer.cpu().numpy().tobytes())
    return digest.hexdigest()
