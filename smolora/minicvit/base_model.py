"""A base model for a benchmark in small: a small LLaVA, Qwen2.5-VL or InternVL (see `kinds`), aligned on its kinds of
pictures.

It stands in for first-stage LLaVA. First the vision tower is trained with probes that classify what is in a picture,
in place of CLIP's captions. Then the projector and the language model are trained on the frozen tower, to talk about
pictures in conversations of several turns. Training has no instructions of the benchmark, none of the answer forms that
they ask for (a letter, a word, a caption), and no pictures or digits of the test files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from ..data.prompts import IGNORED_LABEL, pad
from ..io.files import atomic_folder, locked, read_json_object, write_json
from ..io.progress import Progress, progress
from .kinds import KINDS, Base, BaseSettings
from .pictures import MINICVIT_PICTURES, Curriculum, Picture
from .scenes import StableRandom


class Pictures:
    """The training set: pictures with their labels and questions.

    Attributes:
        all: all pictures.
        seen: the pictures with pixels.
    """

    def __init__(self, base: Base, settings: BaseSettings, curriculum: Curriculum) -> None:
        self.curriculum = curriculum
        self.all = [
            curriculum.draw(StableRandom(f"{curriculum.seed}, alignment {settings.seed}, {index}"))
            for index in progress(range(settings.pictures), "drawing", settings.pictures, "picture")
        ]
        self.seen = [picture for picture in self.all if picture.canvas is not None]
        self._inputs = {
            id(picture): base.read(Image.fromarray(picture.canvas.pixels))
            for picture in self.seen
            if picture.canvas is not None
        }

    def inputs_of(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        """Return the arguments of the model's forward for some pictures with pixels."""
        found = [self._inputs[id(picture)] for picture in pictures]
        return {name: torch.cat([inputs[name] for inputs in found]) for name in found[0]} if found else {}


def _optimise(
    what: str, parameters: Sequence[nn.Parameter], rate: float, steps: int, loss_of_batch: Callable[[], Tensor]
) -> dict[str, float]:
    """Train with AdamW, warm-up and a cosine schedule.

    Returns:
        The mean loss over the last tenth of the steps, and the seconds of the training.
    """
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.02},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ],
        rate,
        betas=(0.9, 0.98),
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    start, losses = time.perf_counter(), []
    with Progress(what, steps, "step") as shown:
        for _ in range(steps):
            loss = loss_of_batch()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            shown.update(remark=f"loss {losses[-1]:.3f}")
    last = losses[-max(1, steps // 10) :]
    return {"loss": sum(last) / len(last), "seconds": time.perf_counter() - start}


def train_tower(base: Base, pictures: Pictures, settings: BaseSettings) -> dict[str, float]:
    """Train the vision tower through linear probes, each on the mean of its patches."""
    hidden, probes = settings.vision_hidden, pictures.curriculum.heads
    torch.manual_seed(settings.seed)
    heads = nn.ModuleDict(
        {name: nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, len(head.names))) for name, head in probes.items()}
    )
    facts = {
        name: torch.tensor(
            [
                head.names.index(picture.facts[name]) if name in picture.facts else IGNORED_LABEL
                for picture in pictures.seen
            ]
        )
        for name, head in probes.items()
    }
    rng = StableRandom(f"{pictures.curriculum.seed}, tower {settings.seed}")

    def loss() -> Tensor:
        rows = [rng.below(len(pictures.seen)) for _ in range(settings.vision_batch)]
        patches = base.patches(pictures.inputs_of([pictures.seen[row] for row in rows]))
        total = patches.new_zeros(())
        for name, head in probes.items():
            labels = facts[name][rows]
            if (labels != IGNORED_LABEL).any():
                logits = heads[name](patches[:, head.patches].mean(1))
                nats = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
                total = total + head.weight * nats
        return total / len(rows)

    trained = [*base.tower().parameters(), *heads.parameters()]
    return _optimise("training the vision tower", trained, settings.vision_learning_rate, settings.vision_steps, loss)


def align(base: Base, pictures: Pictures, settings: BaseSettings) -> dict[str, float]:
    """Train the projector and the language model on conversations about pictures, with the tower frozen."""
    rng = StableRandom(f"{pictures.curriculum.seed}, alignment {settings.seed}")

    def loss() -> Tensor:
        chosen = [rng.choice(pictures.all) for _ in range(settings.batch)]
        written = [base.converse(picture, rng, pictures.curriculum.turns) for picture in chosen]
        ids, mask = pad([sample.input_ids for sample in written], base.pad_token_id, left=False)
        labels, _ = pad([sample.labels for sample in written], IGNORED_LABEL, left=False)
        seen = pictures.inputs_of([picture for picture in chosen if picture.canvas is not None])
        inputs = {**seen, **base.token_inputs(ids)}
        return base.model(input_ids=ids, attention_mask=mask, labels=labels, **inputs).loss

    base.freeze_tower()
    trained = [p for p in base.model.parameters() if p.requires_grad]
    report = _optimise("aligning the base model", trained, settings.learning_rate, settings.steps, loss)
    base.model.requires_grad_(True)
    return report


# ---- the folder


def make_base(
    folder: str | Path, settings: BaseSettings | None = None, curriculum: Curriculum = MINICVIT_PICTURES
) -> Path:
    """Train the base model and save it with its processor, unless it is there already.

    Args:
        folder: the destination, which `from_pretrained` reads.
        settings: hyperparameters.
        curriculum: what it learns from.

    Returns:
        The folder. Its `base.json` has the settings, the number of parameters, and the losses and seconds of training.

    Raises:
        ValueError: the folder holds something else, or a base model of other settings.
    """
    folder, settings = Path(folder), settings or BaseSettings()
    if not _is_made(folder, settings, curriculum):
        with locked(folder.with_name(f"{folder.name}.lock"), str(folder), wait=True):  # another run may be making it
            if not _is_made(folder, settings, curriculum):
                _make_base(folder, settings, curriculum)
    return folder


def _is_made(folder: Path, settings: BaseSettings, curriculum: Curriculum) -> bool:
    if not folder.exists() or not any(folder.iterdir()):
        return False
    found = folder / "base.json"
    if not found.is_file():
        raise ValueError(f"{folder} must be empty, or hold a base model that was made here, got other files")
    made = {"backbone": "llava", **read_json_object(found)["settings"]}
    if made != asdict(settings) | {"data": curriculum.seed}:
        raise ValueError(f"{folder} holds a base model of other settings ({made}): remove it or name another folder")
    return True


def _make_base(folder: Path, settings: BaseSettings, curriculum: Curriculum) -> None:
    base = KINDS[settings.backbone](settings, curriculum)
    pictures = Pictures(base, settings, curriculum)
    base.model.train()
    report = {"tower": train_tower(base, pictures, settings), "alignment": align(base, pictures, settings)}
    base.model.eval()
    parameters = sum(p.numel() for p in base.model.parameters())
    content = {"settings": asdict(settings) | {"data": curriculum.seed}, "parameters": parameters, **report}
    with atomic_folder(folder, "folder") as part:
        base.model.save_pretrained(part)
        base.processor.save_pretrained(part)
        write_json(part / "base.json", content)
