"""A stream of tasks in small: a random LLaVA with its tokenizer, drawn images, and a recipe for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from small_llava import save_base, small_llava
from smolora.train.data import Collator, StageSamples
from smolora.train.methods import Stage, StageWork
from smolora.train.run import TrainingRun

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 230), "white": (240, 240, 240)}
WORD = "Answer the question using a single word or phrase."
OBJECT = "What is the object in the image?\nAnswer the question using a single word or phrase."
SENTENCE = "What is happening in the presented picture?\nPlease describe it in one complete sentence."


def draw(path: Path, colour: str, seed: int) -> None:
    """A noisy picture of one colour, not square."""
    noise = np.random.default_rng(seed).integers(-20, 20, size=(30, 24, 3))
    Image.fromarray(np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)).save(path)


def write_task(root: Path, name: str, test: str, question: str, instruction: str, train: int, ask: int, seed: int):
    """A task's files: what colour it is, asked with one of several instructions."""
    rng = np.random.default_rng(seed)
    (root / name / "images").mkdir(parents=True, exist_ok=True)
    caption = instruction is SENTENCE
    records: dict[str, list] = {"train.json": [], test: []}
    for place in range(train + ask):
        colour = str(rng.choice(list(COLOURS)))
        image = f"{name}/images/{place // 2 if place < train else place}.png"  # two training samples share an image
        if place >= train or place % 2 == 0:
            draw(root / image, colour, seed * 1000 + place)
        text = f"{question}\n{instruction}".strip()
        answer = f"It is a {colour} wall." if caption else colour
        if place < train:
            turns = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": answer}]
            records["train.json"].append({"image": image, "conversations": turns})
        else:
            record = {"question_id": place, "image": image, "text": text, "answer": [answer] if caption else answer}
            records[test].append(record)
    for file, content in records.items():
        (root / name / file).write_text(json.dumps(content))


def make_world(root: Path, *, train: int = 12, ask: int = 4, dtype: str = "float32") -> Path:
    """Data, a base model and `recipe.yaml` in a folder; two upstream tasks, one few-shot, one zero-shot.

    Returns:
        The recipe's path.
    """
    data = root / "data"
    write_task(data, "ImageNet", "test.json", "", OBJECT, train, ask, 1)
    write_task(data, "Flickr30k", "val.json", "", SENTENCE, train, ask, 2)
    write_task(data, "Places365", "val.json", "Which background?", WORD, 4, ask, 3)
    write_task(data, "OCRVQA", "test.json", "Which colour?", WORD, 2, ask, 4)
    save_base(root / "base", small_llava())
    recipe = {
        "name": "small",
        "output": str(root / "run"),
        "model": {"path": str(root / "base"), "dtype": dtype},
        "data": {"root": str(data)},
        "adapter": {"r": 4, "lora_alpha": 8, "num_vu_experts": 2, "num_if_experts": 2},
        "tasks": [
            {
                "name": "ImageNet",
                "train": "ImageNet/train.json",
                "test": "ImageNet/test.json",
                "instructions": [OBJECT],
            },
            {
                "name": "Flickr30k",
                "train": "Flickr30k/train.json",
                "test": "Flickr30k/val.json",
                "instructions": [SENTENCE],
            },
        ],
        "downstream": {
            "zero-shot": [{"name": "OCRVQA", "test": "OCRVQA/test.json", "instructions": [WORD]}],
            "few-shot": [
                {
                    "name": "Places365, 2-shot",
                    "dataset": "Places365",
                    "train": "Places365/train.json",
                    "test": "Places365/val.json",
                    "instructions": [WORD],
                }
            ],
        },
        "training": {
            "batch_size": 4,
            "per_device_batch_size": 2,
            "learning_rate": 0.03,
            "warmup_ratio": 0.1,
            "save_steps": 2,
            "logging_steps": 1,
            "workers": 0,
            "epochs": 2,
        },
        "evaluation": {"max_new_tokens": 6, "workers": 0, "token_budget": 300},
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def work_of(run: TrainingRun, stage: Stage, kept: tuple[Path, ...] = (), batch_size: int = 5) -> StageWork:
    """A stage's data as its hooks are given it, for a run whose processors are loaded."""
    samples = StageSamples([run._task_samples(task) for task in stage.train])
    collate = Collator(run.backbone, run.recipe.training.max_length, run.dtype)
    return StageWork(stage, kept, samples, collate, batch_size, run.state)
