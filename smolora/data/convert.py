"""A task's samples, split into training and test by picture, and written in the benchmark's format."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..instructions.texts import IMAGE_TOKEN
from ..io.files import atomic_file, has_file, write_json
from .fields import Fields, Picture, Sample, read_sample
from .tables import Record


def read_samples(records: Sequence[Record], fields: Fields, where: str) -> list[Sample]:
    """Read the samples of a table.

    Raises:
        ValueError: a record is malformed. The message names its index, from 0.
    """
    return [read_sample(record, fields, f"{where}: record {index}") for index, record in enumerate(records)]


def split_samples(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split samples into training and test, with no picture in both, and no question without a picture in both.

    Args:
        samples: the samples.
        fraction: share of the samples to test with. It is reached or passed by the samples of one picture.
        seed: of the choice.

    Returns:
        The samples to train with and to test with, each in their order.

    Raises:
        ValueError: the fraction is not between 0 and 1, or the samples all share one picture.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"test fraction must lie between 0 and 1, got {fraction}")
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(groups_of(samples)):
        groups.setdefault(name, []).append(index)
    if len(groups) < 2:
        raise ValueError("a split needs samples of two pictures, or two questions without one")
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    chosen: set[int] = set()
    for name in order[:-1]:  # one is left to train with
        if len(chosen) >= fraction * len(samples):
            break
        chosen.update(groups[name])
    train = [sample for index, sample in enumerate(samples) if index not in chosen]
    return train, [samples[index] for index in sorted(chosen)]


def groups_of(samples: Sequence[Sample]) -> list[str]:
    """The name of the group of each sample. Those that share a picture, or all questions without one, stay together.

    Samples of several pictures join the groups of these. A group has the first of the names of what is shared in it.
    """
    parent: dict[str, str] = {}

    def first(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    shared = [_shared(sample) for sample in samples]
    for names in shared:
        for name in names[1:]:
            low, high = sorted((first(names[0]), first(name)))
            parent[high] = low
    return [first(names[0]) for names in shared]


def _shared(sample: Sample) -> list[str]:
    """What no other part may have of a sample: its pictures, or the questions of one without pictures."""
    if not sample.pictures:
        earlier = [text for speaker, text in sample.before if speaker == "human"]
        return ["\n".join(["question", *earlier, sample.question])]
    return [
        f"path {picture.path}" if picture.content is None else f"bytes {_digest(picture.content)}"
        for picture in sample.pictures
    ]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def find_images(samples: Sequence[Sample], folders: Sequence[Path]) -> Path:
    """Find the folder that the samples' image paths are relative to: the first that has the first image.

    Raises:
        ValueError: none has it, or there are both paths and images that stand in the records.
    """
    pictures = [picture for sample in samples for picture in sample.pictures]
    paths = [picture.path for picture in pictures if picture.content is None]
    if not paths:
        return folders[0]
    if len(paths) < len(pictures):
        raise ValueError(f"images must all be paths or all stand in the records, got {paths[0]!r} beside bytes")
    for folder in folders:
        if has_file(folder / str(paths[0])):
            return folder
    raise ValueError(f"image {paths[0]!r} is in none of {', '.join(map(str, folders))}")


def write_task(folder: Path, train: Sequence[Sample], test: Sequence[Sample]) -> None:
    """Write a task as `train.json` and `test.json`. Pictures that came as bytes are written to the subfolder `images`.

    A training sample gets the most frequent of its answers, the first of equally frequent ones. A question of the test
    keeps all of them as references.
    """
    write_json(folder / "train.json", [_conversation(folder, sample) for sample in train])
    write_json(folder / "test.json", [_question(folder, index, sample) for index, sample in enumerate(test)])


def _conversation(folder: Path, sample: Sample) -> dict[str, Any]:
    images = _images(folder, sample)
    value = f"{IMAGE_TOKEN}\n{sample.question}" if len(sample.pictures) == 1 and not sample.before else sample.question
    answer = Counter(sample.answers).most_common(1)[0][0]
    return {**images, "conversations": _turns([*sample.before, ("human", value), ("gpt", answer)])}


def _question(folder: Path, index: int, sample: Sample) -> dict[str, Any]:
    answer = sample.answers[0] if len(sample.answers) == 1 else list(sample.answers)
    history = {"history": _turns(sample.before)} if sample.before else {}
    images = _images(folder, sample)
    return {"question_id": index, **images, **history, "text": sample.question, "answer": answer}


def _turns(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": text} for speaker, text in turns]


def _images(folder: Path, sample: Sample) -> dict[str, str | list[str]]:
    """The images of a record, by their paths."""
    paths = [_path(folder, picture) for picture in sample.pictures]
    return {} if not paths else {"image": paths[0] if len(paths) == 1 else paths}


def _path(folder: Path, picture: Picture) -> str:
    """The path of an image. Bytes are written to a file that is named by them."""
    if picture.content is None:
        return str(picture.path)
    ending = Path(picture.path or "").suffix.lower() or ".png"  # Pillow goes by the content
    path = folder / "images" / f"{_digest(picture.content)[:32]}{ending}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_bytes(picture.content)
    return path.name
