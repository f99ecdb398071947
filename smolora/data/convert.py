"""A task's samples, split into training and test by picture, and written in the benchmark's format."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..io.files import atomic_file, has_file, write_json
from .fields import Fields, Sample, read_sample
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
    for index, sample in enumerate(samples):
        groups.setdefault(group_of(sample), []).append(index)
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


def group_of(sample: Sample) -> str:
    """What the samples that stay together share: the picture, or the question of one without a picture."""
    if sample.picture is None:
        return f"question {sample.question}"
    if sample.picture.content is not None:
        return f"bytes {_digest(sample.picture.content)}"
    return f"path {sample.picture.path}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def find_images(samples: Sequence[Sample], folders: Sequence[Path]) -> Path:
    """Find the folder that the samples' image paths are relative to: the first that has the first sample's image.

    Raises:
        ValueError: none has it.
    """
    paths = [s.picture.path for s in samples if s.picture is not None and s.picture.content is None]
    if not paths:
        return folders[0]
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
    image = _image(folder, sample)
    value = sample.question if not image else f"<image>\n{sample.question}"
    answer = Counter(sample.answers).most_common(1)[0][0]
    return {**image, "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]}


def _question(folder: Path, index: int, sample: Sample) -> dict[str, Any]:
    answer = sample.answers[0] if len(sample.answers) == 1 else list(sample.answers)
    return {"question_id": index, **_image(folder, sample), "text": sample.question, "answer": answer}


def _image(folder: Path, sample: Sample) -> dict[str, str]:
    """The image of a record, by its path. Bytes are written to a file that is named by them."""
    if sample.picture is None:
        return {}
    content = sample.picture.content
    if content is None:
        return {"image": str(sample.picture.path)}
    ending = Path(sample.picture.path or "").suffix.lower() or ".png"  # Pillow goes by the content
    path = folder / "images" / f"{_digest(content)[:32]}{ending}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
    return {"image": path.name}
