"""A base model for a benchmark in small: a small LLaVA (CLIP-like tower, projector, Llama), aligned on its kinds of
pictures.

It stands in for first-stage LLaVA. First the vision tower is trained with probes that classify what is in a picture,
in place of CLIP's captions. Then the projector and the language model are trained on the frozen tower, to talk about
pictures in conversations of several turns. Training has no instructions of the benchmark, none of the answer forms that
they ask for (a letter, a word, a caption), and no pictures or digits of the test files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from ..data.prompts import IGNORED_LABEL, SYSTEM, PromptEncoder, pad
from ..instructions.texts import IMAGE_TOKEN
from ..io.files import atomic_folder, locked, read_json_object, write_json
from ..io.progress import Progress, progress
from ..official.llava import llava_config
from .pictures import MINICVIT_PICTURES, PATCH, Curriculum, Picture, converse
from .scenes import SIDE, StableRandom

NUMBER_OR_MARK = r"▁?[01]\.[0-9]{2}|[^\w\s▁]"
SPECIAL = ("<pad>", "<s>", "</s>", IMAGE_TOKEN, "<unk>")


@dataclass(frozen=True)
class BaseSettings:
    """Hyperparameters of the base model."""

    seed: int = 0
    vision_hidden: int = 128
    vision_layers: int = 3
    hidden: int = 128
    layers: int = 4
    vision_steps: int = 700
    vision_batch: int = 64
    vision_learning_rate: float = 1.5e-3
    steps: int = 350
    batch: int = 32
    learning_rate: float = 2e-3
    pictures: int = 9000


def make_tokenizer(curriculum: Curriculum = MINICVIT_PICTURES) -> PreTrainedTokenizerFast:
    """Make a tokenizer of words and punctuation, each with or without a leading space.

    Vicuna's system sentence is a single token.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="never", split=True),
            pre_tokenizers.Split(Regex(NUMBER_OR_MARK), behavior="isolated")
            if curriculum.numbers
            else pre_tokenizers.Punctuation(behavior="isolated"),
            pre_tokenizers.Split("\n", behavior="isolated"),
        ]
    )
    words = sorted({word for text in curriculum.texts() for word, _ in split.pre_tokenize_str(text) if word})
    vocabulary = {
        word: index for index, word in enumerate([*SPECIAL, *(word for word in words if word not in SPECIAL)])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(SYSTEM, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_max_length=512,
    )


# ---- the model


def make_model(tokenizer: PreTrainedTokenizerFast, settings: BaseSettings) -> LlavaForConditionalGeneration:
    """Make a randomly initialised LLaVA in float32."""
    config = llava_config(
        vision={
            "image_size": SIDE,
            "patch_size": PATCH,
            "hidden_size": settings.vision_hidden,
            "intermediate_size": 2 * settings.vision_hidden,
            "num_hidden_layers": settings.vision_layers,
            "num_attention_heads": 4,
        },
        text={
            "vocab_size": len(tokenizer),
            "hidden_size": settings.hidden,
            "intermediate_size": 8 * round(settings.hidden * 2.7 / 8),
            "num_hidden_layers": settings.layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        image_token=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        feature_layer=-1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(settings.seed)
    model = LlavaForConditionalGeneration(config)
    # wider than the default initialisation, which suits large models
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            residual = name.endswith(("o_proj", "out_proj", "down_proj", "fc2"))
            nn.init.normal_(module.weight, std=(0.3 if residual else 0.8) * module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)
    return model


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Make the tokenizer's and image processor's joint processor, as `AutoProcessor` loads it."""
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


class Pictures:
    """The training set: pictures with their labels and questions.

    Attributes:
        all: all pictures.
        seen: the pictures with pixels.
        pixels: (seen, 3, 48, 48), the tower's inputs.
    """

    def __init__(self, processor: LlavaProcessor, settings: BaseSettings, curriculum: Curriculum) -> None:
        self.curriculum = curriculum
        self.all = [
            curriculum.draw(StableRandom(f"{curriculum.seed}, alignment {settings.seed}, {index}"))
            for index in progress(range(settings.pictures), "drawing", settings.pictures, "picture")
        ]
        self.seen = [picture for picture in self.all if picture.canvas is not None]
        images = [Image.fromarray(p.canvas.pixels) for p in self.seen if p.canvas is not None]
        self.pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        self._place = {id(picture): place for place, picture in enumerate(self.seen)}

    def pixels_of(self, pictures: Sequence[Picture]) -> Tensor:
        """Return the tower's inputs (n, 3, 48, 48) for some pictures."""
        return self.pixels[[self._place[id(picture)] for picture in pictures]]


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


def train_tower(tower: nn.Module, pictures: Pictures, settings: BaseSettings) -> dict[str, float]:
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
        rows = torch.tensor([rng.below(len(pictures.seen)) for _ in range(settings.vision_batch)])
        patches = tower(pictures.pixels[rows], output_hidden_states=True).hidden_states[-1][:, 1:]
        total = patches.new_zeros(())
        for name, head in probes.items():
            labels = facts[name][rows]
            if (labels != IGNORED_LABEL).any():
                logits = heads[name](patches[:, head.patches].mean(1))
                nats = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
                total = total + head.weight * nats
        return total / len(rows)

    trained = [*tower.parameters(), *heads.parameters()]
    return _optimise("training the vision tower", trained, settings.vision_learning_rate, settings.vision_steps, loss)


def align(
    model: LlavaForConditionalGeneration, encoder: PromptEncoder, pictures: Pictures, settings: BaseSettings
) -> dict[str, float]:
    """Train the projector and the language model on conversations about pictures, with the tower frozen."""
    rng = StableRandom(f"{pictures.curriculum.seed}, alignment {settings.seed}")

    def loss() -> Tensor:
        chosen = [rng.choice(pictures.all) for _ in range(settings.batch)]
        written = [converse(picture, encoder, rng) for picture in chosen]
        ids, mask = pad([ids for ids, _ in written], encoder.pad_token_id, left=False)
        labels, _ = pad([labels for _, labels in written], IGNORED_LABEL, left=False)
        seen = [picture for picture in chosen if picture.canvas is not None]
        pixels = {"pixel_values": pictures.pixels_of(seen)} if seen else {}
        return model(input_ids=ids, attention_mask=mask, labels=labels, **pixels).loss

    model.model.vision_tower.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    report = _optimise("aligning the base model", trained, settings.learning_rate, settings.steps, loss)
    model.requires_grad_(True)
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
    made = read_json_object(found)["settings"]
    if made != asdict(settings) | {"data": curriculum.seed}:
        raise ValueError(f"{folder} holds a base model of other settings ({made}): remove it or name another folder")
    return True


def _make_base(folder: Path, settings: BaseSettings, curriculum: Curriculum) -> None:
    tokenizer = make_tokenizer(curriculum)
    model, processor = make_model(tokenizer, settings), make_processor(tokenizer)
    encoder = PromptEncoder.for_model(tokenizer, model.config)
    pictures = Pictures(processor, settings, curriculum)
    model.train()
    report = {
        "tower": train_tower(model.model.vision_tower, pictures, settings),
        "alignment": align(model, encoder, pictures, settings),
    }
    model.eval()
    parameters = sum(p.numel() for p in model.parameters())
    content = {"settings": asdict(settings) | {"data": curriculum.seed}, "parameters": parameters, **report}
    with atomic_folder(folder, "folder") as part:
        model.save_pretrained(part)
        processor.save_pretrained(part)
        write_json(part / "base.json", content)
