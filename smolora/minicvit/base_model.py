"""MiniCVIT's base model: a small LLaVA (CLIP-like tower, projector, Llama), aligned on pictures of MiniCVIT's kinds.

It stands in for first-stage LLaVA. First the vision tower is trained with probes that classify what is in a picture,
in place of CLIP's captions. Then the projector and the language model are trained on the frozen tower, to talk about
pictures in conversations of several turns. Training has no instructions of the benchmark, none of the answer forms that
they ask for (a letter, a word, a caption), and no pictures or digits of the test files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from ..data.prompts import IGNORED_LABEL, SYSTEM, PromptEncoder, pad
from ..instructions.texts import IMAGE_TOKEN, MULTI_TYPE, SINGLE_TYPE
from ..io.files import atomic_folder, locked, read_json_object, write_json
from ..official.llava import llava_config
from . import scenes, tasks
from .scenes import COLOURS, COMPANIONS, DIGITS, OBJECTS, PLACES, SHAPES, SIDE, WORDS, StableRandom
from .tasks import KINDS, QUIZ, WHERE, options

PATCH = 12
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


# ---- pictures and conversations about them


class ProbeHead(NamedTuple):
    """A linear probe on the tower: it classifies among names from the mean over some patches."""

    names: tuple[str, ...]
    patches: tuple[int, ...]


PATCHES = SIDE // PATCH  # along a side
_EVERYWHERE = tuple(range(PATCHES * PATCHES))
PROBE_HEADS: dict[str, ProbeHead] = {
    "colour": ProbeHead(tuple(COLOURS), _EVERYWHERE),
    "digit": ProbeHead(DIGITS, _EVERYWHERE),
    "object": ProbeHead(OBJECTS, _EVERYWHERE),
    "shape": ProbeHead(SHAPES, _EVERYWHERE),
    "word": ProbeHead(WORDS, _EVERYWHERE),
    "place": ProbeHead(PLACES, _EVERYWHERE),
    "companion": ProbeHead(COMPANIONS, _EVERYWHERE),
    "upper_word": ProbeHead(WORDS, _EVERYWHERE[: len(_EVERYWHERE) // 2]),
    "lower_word": ProbeHead(WORDS, _EVERYWHERE[len(_EVERYWHERE) // 2 :]),
}
for _cell in range(4):
    _here = tuple(p for p in _EVERYWHERE if (p // PATCHES // 2, p % PATCHES // 2) == divmod(_cell, 2))
    PROBE_HEADS[f"shape_{_cell}"] = ProbeHead((*SHAPES, "nothing"), _here)
    PROBE_HEADS[f"colour_{_cell}"] = ProbeHead((*COLOURS, "nothing"), _here)


class Picture:
    """A picture, or None, with questions and answers about it.

    Attributes:
        pixels: uint8 (48, 48, 3), or None.
        turns: (question, short answer, sentence).
        facts: labels for the probes, an index among the names of each.
    """

    def __init__(self, canvas: scenes.Canvas | None, **facts: str) -> None:
        self.pixels = None if canvas is None else canvas.pixels
        self.turns: list[tuple[str, str, str]] = []
        self.facts = {head: PROBE_HEADS[head].names.index(name) for head, name in facts.items()}

    def ask(self, question: str, answer: str, sentence: str) -> None:
        """Add a question, and its multiple-choice form if it is one of ScienceQA's."""
        self.turns.append((question, answer, sentence))
        for choices in QUIZ.get(question, ()):
            if answer in choices:
                self.choose(question, answer, choices)

    def choose(self, question: str, answer: str, choices: Sequence[str]) -> None:
        """Add a multiple-choice question."""
        self.turns.append((question + options(choices), "ABCDE"[choices.index(answer)], "The answer is {}."))


# how often each kind is drawn: more often if it takes longer to learn
KIND_WEIGHTS = {
    "digit": 3,
    "object": 1,
    "shape": 1,
    "grid": 2,
    "sign": 2,
    "book": 1,
    "person": 2,
    "place": 1,
    "words": 1,
}
KINDS_OF_PICTURES = tuple(kind for kind, weight in KIND_WEIGHTS.items() for _ in range(weight))


def draw_picture(rng: StableRandom) -> Picture:
    """Draw a picture of a random kind, with all questions about it."""
    kind = rng.choice(KINDS_OF_PICTURES)
    colour = rng.choice(list(COLOURS))
    say = "Describe the picture."
    if kind == "digit":
        number = rng.below(10)
        picture = Picture(scenes.draw_digit(number, colour, rng, False), colour=colour, digit=DIGITS[number])
        name = DIGITS[number]
        picture.ask(say, name, f"I see the number {{}} in {colour}.")
        for question in ("Which number is written here?", "What is this?"):
            picture.ask(question, name, "The number is {}.")
        picture.ask("What number is written here?", str(number), "The number is {}.")
        picture.ask("Is the number larger than 4?", "yes" if number > 4 else "no", "I would say {}.")
    elif kind == "object":
        name = rng.choice(OBJECTS)
        picture = Picture(scenes.draw_object(name, colour, rng), colour=colour, object=name)
        picture.ask(say, name, f"I see a {{}} with {colour}.")
        for question in ("What is shown in the picture?", "What is this?"):
            picture.ask(question, name, "It is a {}.")
    elif kind == "shape":
        name = rng.choice(SHAPES)
        picture = Picture(scenes.draw_one_shape(name, colour, rng), colour=colour, shape=name)
        picture.ask(say, name, f"I see a {{}} in {colour}.")
        picture.ask("Which shape is it?", name, "It is a {}.")
        picture.ask("Which colour is the shape?", colour, "The colour is {}.")
    elif kind == "grid":
        picture = _grid(say, rng)
    elif kind == "sign":
        word = rng.choice(WORDS)
        picture = Picture(scenes.draw_sign(word, colour, rng), colour=colour, word=word)
        picture.ask(say, word, f"I see a {colour} sign that says {{}}.")
        for question in ("What word is on the sign?", "What does the sign say?", "Which word is written here?"):
            picture.ask(question, word, "The word is {}.")
    elif kind == "book":
        words = rng.sample(WORDS, 2)
        picture = Picture(scenes.draw_book(words, colour, rng), colour=colour, upper_word=words[0], lower_word=words[1])
        picture.ask(say, " ".join(words), f"I see a {colour} book with the title {{}}.")
        for question in ("What is the title of this book?", "What is the book called?"):
            picture.ask(question, " ".join(words), "The title is {}.")
    elif kind == "person":
        companion, where = rng.choice(COMPANIONS), rng.choice(PLACES)
        picture = Picture(
            scenes.draw_person(colour, companion, where, rng), colour=colour, companion=companion, place=where
        )
        picture.ask(say, colour, f"I see someone in {{}}, {_a(companion)} and a {where}.")
        picture.ask("Where is it?", where, "It is a {}.")
        picture.ask("Which colour is the shirt?", colour, "The colour is {}.")
        picture.ask("What is there besides?", companion, "I see {}.")
    elif kind == "place":
        where = rng.choice(PLACES)
        picture = Picture(scenes.draw_place(where, rng), place=where)
        picture.ask(say, where, "I see a {}.")
        picture.ask("Where is it?", where, "It is a {}.")
    else:
        picture = _words(rng)
    return picture


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _grid(say: str, rng: StableRandom) -> Picture:
    """Draw shapes in cells, with questions on their kind, number and position."""
    cells = sorted(rng.sample(range(4), rng.choice([1, 2, 2, 2, 2, 3, 4])))
    shown = {cell: (rng.choice(SHAPES), rng.choice(list(COLOURS))) for cell in cells}
    if len(cells) == 2:
        pairs = zip(rng.sample(SHAPES, 2), rng.sample(list(COLOURS), 2), strict=True)
        shown = dict(zip(cells, pairs, strict=True))
    facts = {}
    for cell in range(4):
        facts[f"shape_{cell}"], facts[f"colour_{cell}"] = shown.get(cell, ("nothing", "nothing"))
    picture = Picture(scenes.draw_shapes(shown, rng), **facts)
    names = [f"a {colour} {shape}" for shape, colour in shown.values()]
    picture.ask(say, str(len(cells)), f"I see {' and '.join(names)}, so there are {{}}.")
    picture.ask("How many shapes are there?", str(len(cells)), "The number is {}.")
    there = [shape for shape, _ in shown.values()]
    missing = [shape for shape in SHAPES if shape not in there]
    for shape in rng.sample(there, 1) + missing[:1]:
        picture.ask(f"Is there a {shape}?", "yes" if shape in there else "no", "I would say {}.")
    if len(cells) != 2 or cells in ([0, 3], [1, 2]):
        return picture
    (shape, colour), (other, other_colour) = shown.values()
    relation, inverse = ("to the left of", "to the right of") if cells in ([0, 1], [2, 3]) else ("above", "below")
    picture.ask(f"Is the {shape} {relation} the {other}?", "yes", "I would say {}.")
    picture.ask(f"Is the {shape} {inverse} the {other}?", "no", "I would say {}.")
    picture.ask(f"What colour is the shape {relation} the {other}?", colour, "The colour is {}.")
    picture.ask(f"What colour is the shape {inverse} the {shape}?", other_colour, "The colour is {}.")
    picture.ask(f"What is {relation} the {other_colour} shape?", shape, "It is a {}.")
    picture.ask(f"What is {inverse} the {colour} shape?", other, "It is a {}.")
    return picture


def _words(rng: StableRandom) -> Picture:
    """Make questions without a picture, on the kind of thing that a word names."""
    picture = Picture(None)
    for _ in range(4):
        kind = rng.choice(list(KINDS))
        question = f"What is {rng.choice(KINDS[kind])}?"
        picture.ask(question, kind, "It is a {}.")
        picture.choose(question, kind, tuple(KINDS))
    return picture


def vocabulary_texts() -> Iterator[str]:
    """Yield texts that have every word of the data, the prompts and the conversations."""
    yield f" USER: \n ASSISTANT: {', as you can see.'} A B C D E. A. B. C. D. E. {tasks.UNANSWERABLE}"
    for settings in (SINGLE_TYPE, MULTI_TYPE):
        for instructions in settings.values():
            yield from (f"?\n{text} {text}" for text in instructions)
    for names in (COLOURS, DIGITS, OBJECTS, SHAPES, PLACES, COMPANIONS, WORDS, "0123456789"):
        yield from (f" {name}\nB. {name} {name}? {name}." for name in names)
    for task in tasks.TASKS:
        for sample, _ in tasks.samples(task, "vocabulary", 40):
            yield f" {sample.question}\n{sample.question}"
            yield from (f" {text}" for text in (sample.answer, *sample.references))
    for parts in (tasks.SUBJECTS, tasks.SHIRTS, tasks.VERBS, *tasks.WITH.values(), *WHERE.values()):
        yield from (f" {part}." for part in parts)
    for index in range(300):
        for question, _, sentence in draw_picture(StableRandom(f"vocabulary {index}")).turns:
            yield f" {question}\n{question} {sentence}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of words and punctuation, each with or without a leading space.

    Vicuna's system sentence is a single token.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="never", split=True),
            pre_tokenizers.Punctuation(behavior="isolated"),
            pre_tokenizers.Split("\n", behavior="isolated"),
        ]
    )
    words = sorted({word for text in vocabulary_texts() for word, _ in split.pre_tokenize_str(text) if word})
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

    def __init__(self, processor: LlavaProcessor, settings: BaseSettings) -> None:
        self.all = [
            draw_picture(StableRandom(f"{tasks.SEED}, alignment {settings.seed}, {index}"))
            for index in tqdm(range(settings.pictures), desc="drawing", unit="picture")
        ]
        self.seen = [picture for picture in self.all if picture.pixels is not None]
        images = [Image.fromarray(picture.pixels) for picture in self.seen]
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
    with tqdm(range(steps), desc=what, unit="step") as bar:
        for step in bar:
            loss = loss_of_batch()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            if step % 10 == 0:
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
    last = losses[-max(1, steps // 10) :]
    return {"loss": sum(last) / len(last), "seconds": time.perf_counter() - start}


def train_tower(tower: nn.Module, pictures: Pictures, settings: BaseSettings) -> dict[str, float]:
    """Train the vision tower through linear probes, each on the mean of its patches."""
    hidden = settings.vision_hidden
    torch.manual_seed(settings.seed)
    heads = nn.ModuleDict(
        {
            name: nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, len(head.names)))
            for name, head in PROBE_HEADS.items()
        }
    )
    facts = {
        name: torch.tensor([picture.facts.get(name, IGNORED_LABEL) for picture in pictures.seen])
        for name in PROBE_HEADS
    }
    rng = StableRandom(f"{tasks.SEED}, tower {settings.seed}")

    def loss() -> Tensor:
        rows = torch.tensor([rng.below(len(pictures.seen)) for _ in range(settings.vision_batch)])
        patches = tower(pictures.pixels[rows], output_hidden_states=True).hidden_states[-1][:, 1:]
        total = patches.new_zeros(())
        for name, head in PROBE_HEADS.items():
            labels = facts[name][rows]
            if (labels != IGNORED_LABEL).any():
                logits = heads[name](patches[:, head.patches].mean(1))
                total = total + F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
        return total / len(rows)

    trained = [*tower.parameters(), *heads.parameters()]
    return _optimise("training the vision tower", trained, settings.vision_learning_rate, settings.vision_steps, loss)


def align(
    model: LlavaForConditionalGeneration, encoder: PromptEncoder, pictures: Pictures, settings: BaseSettings
) -> dict[str, float]:
    """Train the projector and the language model on conversations about pictures, with the tower frozen."""
    rng = StableRandom(f"{tasks.SEED}, alignment {settings.seed}")

    def loss() -> Tensor:
        chosen = [rng.choice(pictures.all) for _ in range(settings.batch)]
        written = [converse(picture, encoder, rng) for picture in chosen]
        ids, mask = pad([ids for ids, _ in written], encoder.pad_token_id, left=False)
        labels, _ = pad([labels for _, labels in written], IGNORED_LABEL, left=False)
        seen = [picture for picture in chosen if picture.pixels is not None]
        pixels = {"pixel_values": pictures.pixels_of(seen)} if seen else {}
        return model(input_ids=ids, attention_mask=mask, labels=labels, **pixels).loss

    model.model.vision_tower.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    report = _optimise("aligning the base model", trained, settings.learning_rate, settings.steps, loss)
    model.requires_grad_(True)
    return report


def converse(
    picture: Picture, encoder: PromptEncoder, rng: StableRandom, turns: int = 3
) -> tuple[list[int], list[int]]:
    """Write a conversation of at most `turns` turns.

    Returns:
        Token ids, and labels that are ignored except on the answers.
    """
    ids: list[int] = []
    labels: list[int] = []
    for question, answer, sentence in rng.sample(picture.turns, min(turns, len(picture.turns))):
        said = sentence.format(answer) if rng.chance(50) else f"{answer}, as you can see."
        sample = encoder.expand_sample(encoder.sample(question, said, picture.pixels is not None and not ids))
        skip = 2 if ids else 0  # only the first turn has BOS and the system sentence, one token each
        ids += sample.input_ids[skip:]
        labels += sample.labels[skip:]
    return ids, labels


# ---- the folder


def make_base(folder: str | Path, settings: BaseSettings | None = None) -> Path:
    """Train the base model and save it with its processor, unless it is there already.

    Args:
        folder: the destination, which `from_pretrained` reads.
        settings: hyperparameters.

    Returns:
        The folder. Its `base.json` has the settings, the number of parameters, and the losses and seconds of training.

    Raises:
        ValueError: the folder holds something else, or a base model of other settings.
    """
    folder, settings = Path(folder), settings or BaseSettings()
    if not _is_made(folder, settings):
        with locked(folder.with_name(f"{folder.name}.lock"), str(folder), wait=True):  # another run may be making it
            if not _is_made(folder, settings):
                _make_base(folder, settings)
    return folder


def _is_made(folder: Path, settings: BaseSettings) -> bool:
    if not folder.exists() or not any(folder.iterdir()):
        return False
    found = folder / "base.json"
    if not found.is_file():
        raise ValueError(f"{folder} must be empty, or hold a base model of MiniCVIT, got other files")
    made = read_json_object(found)["settings"]
    if made != asdict(settings) | {"data": tasks.SEED}:
        raise ValueError(f"{folder} holds a base model of other settings ({made}): remove it or name another folder")
    return True


def _make_base(folder: Path, settings: BaseSettings) -> None:
    tokenizer = make_tokenizer()
    model, processor = make_model(tokenizer, settings), make_processor(tokenizer)
    encoder = PromptEncoder.for_model(tokenizer, model.config)
    pictures = Pictures(processor, settings)
    model.train()
    report = {
        "tower": train_tower(model.model.vision_tower, pictures, settings),
        "alignment": align(model, encoder, pictures, settings),
    }
    model.eval()
    parameters = sum(p.numel() for p in model.parameters())
    content = {"settings": asdict(settings) | {"data": tasks.SEED}, "parameters": parameters, **report}
    with atomic_folder(folder, "folder") as part:
        model.save_pretrained(part)
        processor.save_pretrained(part)
        write_json(part / "base.json", content)
