"""A recipe drafted from the samples of tasks of one's own: metric, format and instructions by their answers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import yaml

from ..data.fields import Sample
from ..evaluate.own import FORMATS, METRICS, option_letter, written_box

SHORT = 3  # words of an answer that is given in a word or a phrase
MOST_INSTRUCTIONS = 20
SHARE = 0.9  # of the samples, of which a rule is taken to hold


class Draft(NamedTuple):
    """A task of a drafted recipe."""

    name: str
    images: str
    metric: str
    format: str | None
    instructions: list[str]
    train: list[Sample]
    test: list[Sample]

    @property
    def most(self) -> str:
        """The most images and questions of a sample, where one has several, as an addition to its counts."""
        samples = [*self.train, *self.test]
        images = max(len(sample.pictures) for sample in samples)
        turns = max(1 + sum(speaker == "human" for speaker, _ in sample.before) for sample in samples)
        parts = [f"{images} images"] * (images > 1) + [f"{turns} questions"] * (turns > 1)
        return f", up to {' and '.join(parts)} each" if parts else ""


def metric_and_format(samples: Sequence[Sample]) -> tuple[str, str | None]:
    """The metric and the format that the answers of the test suggest."""
    answers = [answer.strip() for sample in samples for answer in sample.answers]
    words = sorted(len(answer.split()) for answer in answers)
    typical = words[int(SHARE * (len(words) - 1))]
    captions = sum(len(sample.answers) > 1 for sample in samples) >= SHARE * len(samples)
    if _most(bool(re.fullmatch("[A-Z]", answer)) for answer in answers):
        return "letter", "letter"
    if _most(option_letter(answer) is not None for answer in answers):
        return "letter", None
    if _most(written_box(answer) is not None and re.fullmatch(r"[\s\[\](),\d.-]*", answer) for answer in answers):
        return "iou", "box"
    if _most(answer.startswith(("{", "[")) and _is_json(answer) for answer in answers):
        return "exact", "json"
    if typical <= SHORT:
        return "vqa" if captions else "exact", f"words {max(typical, 2)}"
    form = "sentence" if _most(answer.endswith(".") for answer in answers) else None
    return "cider" if captions else "rougeL", form


def _most(held: Iterable[object]) -> bool:
    found = [bool(value) for value in held]
    return sum(found) >= SHARE * len(found)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def instructions_in(samples: Sequence[Sample]) -> list[str]:
    """The instructions that questions end with: a few last lines that nearly all of them have; empty if there are none.

    The only line of a question is one if several questions have it.
    """
    lines = Counter(sample.text.rpartition("\n")[2].strip() for sample in samples)
    repeated = [line for line, count in lines.most_common(MOST_INSTRUCTIONS) if count > 1]
    return repeated if sum(lines[line] for line in repeated) >= SHARE * len(samples) else []


def recipe_text(name: str, model: str, folder: str, drafts: Sequence[Draft]) -> str:
    """The YAML of a recipe for some tasks, with comments."""
    lines = [
        "# Drafted by `smolora init` from the data; every line may be changed.",
        "# smolora train RECIPE --dry-run checks it and shows the plan.",
        f"name: {_scalar(name)}",
        "",
        "model:",
        f"  path: {_scalar(model)}  # a folder with a vision-language model of transformers",
        "  dtype: bfloat16  # or float32, without a GPU that has bfloat16",
        "",
        "data:",
        f"  root: {_scalar(folder)}  # the tasks' files, as `smolora init` wrote them",
        "",
        "training:",
        "  epochs: 1",
        "  batch_size: 64  # samples a step, over all devices",
        "  per_device_batch_size: 8  # smaller with less memory",
        "  learning_rate: 1.0e-4",
        "",
        "evaluation:",
        "  max_new_tokens: 128  # of an answer",
        "",
        "# In the order of training.",
        f"# metric: {', '.join(METRICS)} or python:FILE:FUNCTION, or a list,",
        "# of which the first is the matrix's.",
        f"# format, for MIF: words N, {', '.join(FORMATS)}, json:SCHEMA, regex:PATTERN",
        "# or python:FILE:FUNCTION; without it there is no MIF.",
        "tasks:",
    ]
    for draft in drafts:
        counts = f"{len(draft.train)} training samples, {len(draft.test)} questions{draft.most}"
        lines += [
            f"  - name: {_scalar(draft.name)}  # {counts}",
            f"    train: {_scalar(f'{draft.name}/train.json')}",
            f"    test: {_scalar(f'{draft.name}/test.json')}",
            f"    images: {_scalar(draft.images)}",
            f"    metric: {_scalar(draft.metric)}",
        ]
        lines += [f"    format: {_scalar(draft.format)}"] if draft.format else ["    # format: none was found"]
        if draft.instructions:
            lines += ["    instructions:", *(f"      - {_scalar(text)}" for text in draft.instructions)]
        else:
            lines += ["    # instructions: none was found, so the last line of each question counts as one"]
    return "\n".join(lines) + "\n"


def _scalar(text: str) -> str:
    """A text as YAML writes it in one line."""
    style = '"' if "\n" in text else None
    written = yaml.safe_dump(text, width=10**6, allow_unicode=True, default_style=style)
    return written.removesuffix("\n...\n").strip()
