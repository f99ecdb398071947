"""MiniCVIT's base model: a small LLaVA (CLIP-like tower, projector, Llama), aligned on pictures of MiniCVIT's kinds.

It plays the part of first-stage LLaVA: it sees what is in the pictures and talks about it, in sentences, in
conversations of several turns. What the benchmark's instructions ask for (a letter, a word, a caption) it has not
learned, and no instruction occurs in its training. Pictures and digits of the test files do not occur in it either.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from ..data import minicvit, scenes
from ..data.instructions import MULTI_TYPE, SINGLE_TYPE
from ..data.minicvit import WHERE, options
from ..data.prompts import IGNORED_LABEL, SYSTEM, PromptEncoder, pad
from ..data.scenes import COLOURS, COMPANIONS, DIGITS, OBJECTS, PLACES, SHAPES, SIDE, WORDS, Dice

PATCH = 12
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")


@dataclass(frozen=True)
class BaseSettings:
    """How the base model is made; another setting is another model."""

    seed: int = 0
    vision_hidden: int = 128
    vision_layers: int = 3
    hidden: int = 128
    layers: int = 4
    steps: int = 500
    batch: int = 32
    learning_rate: float = 2e-3
    pictures: int = 6000


# ---- conversations


class Picture:
    """What is said of a picture (or of none): questions with short answers and sentences.

    Attributes:
        pixels: uint8 (48, 48, 3), or None.
        turns: (question, short answer, sentence).
    """

    def __init__(self, canvas: scenes.Canvas | None) -> None:
        self.pixels = None if canvas is None else canvas.pixels
        self.turns: list[tuple[str, str, str]] = []

    def ask(self, question: str, answer: str, sentence: str) -> None:
        self.turns.append((question, answer, sentence))

    def choose(self, question: str, right: str, pool: Sequence[str], dice: Dice) -> None:
        """The same as a choice between letters."""
        others = dice.sample([word for word in pool if word != right], dice.between(1, 3))
        choices = dice.sample([right, *others], len(others) + 1)
        self.ask(question + options(choices), "ABCDE"[choices.index(right)], "The answer is {}.")


# those that take longer to learn come more often
KINDS_OF_PICTURES = (
    "digit", "digit", "digit", "object", "shape", "grid", "grid", "sign", "sign", "book", "person", "person", "place",
    "list",
)  # fmt: skip


def draw_picture(dice: Dice) -> Picture:
    """A picture of any of MiniCVIT's kinds, with everything that can be asked about it."""
    kind = dice.choice(KINDS_OF_PICTURES)
    colour = dice.choice(list(COLOURS))
    say = "Describe the picture."
    if kind == "digit":
        number = dice.below(10)
        picture = Picture(scenes.digit(number, colour, dice, False))
        name = DIGITS[number]
        picture.ask(say, name, f"I see the number {{}} in {colour}.")
        for question in ("Which number is written here?", "What is this?"):
            picture.ask(question, name, "The number is {}.")
        picture.ask("What number is written here?", str(number), "The number is {}.")
        picture.ask("Is the number larger than 4?", "yes" if number > 4 else "no", "I would say {}.")
        for _ in range(2):
            picture.choose("Which number is written here?", name, DIGITS, dice)
    elif kind == "object":
        name = dice.choice(OBJECTS)
        picture = Picture(scenes.thing(name, colour, dice))
        picture.ask(say, name, f"I see a {{}} with {colour}.")
        for question in ("What is shown in the picture?", "What is this?"):
            picture.ask(question, name, "It is a {}.")
        for _ in range(2):
            picture.choose("What is shown in the picture?", name, OBJECTS, dice)
    elif kind == "shape":
        name = dice.choice(SHAPES)
        picture = Picture(scenes.one_shape(name, colour, dice))
        picture.ask(say, name, f"I see a {{}} in {colour}.")
        picture.ask("Which shape is it?", name, "It is a {}.")
        picture.ask("Which colour is the shape?", colour, "The colour is {}.")
        picture.choose("Which shape is it?", name, SHAPES, dice)
        picture.choose("Which colour is the shape?", colour, tuple(COLOURS), dice)
    elif kind == "grid":
        picture = _grid(say, dice)
    elif kind == "sign":
        word = dice.choice(WORDS)
        picture = Picture(scenes.sign(word, colour, dice))
        picture.ask(say, word, f"I see a {colour} sign that says {{}}.")
        for question in ("What word is on the sign?", "What does the sign say?", "Which word is written here?"):
            picture.ask(question, word, "The word is {}.")
    elif kind == "book":
        words = dice.sample(WORDS, 2)
        picture = Picture(scenes.book(words, colour, dice))
        picture.ask(say, " ".join(words), f"I see a {colour} book with the title {{}}.")
        for question in ("What is the title of this book?", "What is the book called?"):
            picture.ask(question, " ".join(words), "The title is {}.")
    elif kind == "person":
        companion, where = dice.choice(COMPANIONS), dice.choice(PLACES)
        picture = Picture(scenes.person(colour, companion, where, dice))
        picture.ask(say, colour, f"I see someone in {{}}, {_a(companion)} and a {where}.")
        picture.ask("Where is it?", where, "It is a {}.")
        picture.ask("Which colour is the shirt?", colour, "The colour is {}.")
        picture.ask("What is there besides?", companion, "I see {}.")
    elif kind == "place":
        where = dice.choice(PLACES)
        picture = Picture(scenes.place(where, dice))
        picture.ask(say, where, "I see a {}.")
        picture.ask("Where is it?", where, "It is a {}.")
    else:
        picture = _list(dice)
    return picture


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _grid(say: str, dice: Dice) -> Picture:
    """Shapes in the cells: what they are, how many, and where."""
    cells = sorted(dice.sample(range(4), dice.choice([1, 2, 2, 2, 2, 3, 4])))
    shown = {cell: (dice.choice(SHAPES), dice.choice(list(COLOURS))) for cell in cells}
    if len(cells) == 2:
        pairs = zip(dice.sample(SHAPES, 2), dice.sample(list(COLOURS), 2), strict=True)
        shown = dict(zip(cells, pairs, strict=True))
    picture = Picture(scenes.shapes(shown, dice))
    names = [f"a {colour} {shape}" for shape, colour in shown.values()]
    picture.ask(say, str(len(cells)), f"I see {' and '.join(names)}, so there are {{}}.")
    picture.ask("How many shapes are there?", str(len(cells)), "The number is {}.")
    there = [shape for shape, _ in shown.values()]
    missing = [shape for shape in SHAPES if shape not in there]
    for shape in dice.sample(there, 1) + missing[:1]:
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


KINDS = {"colour": tuple(COLOURS), "shape": SHAPES, "number": DIGITS, "place": PLACES, "object": OBJECTS}


def _list(dice: Dice) -> Picture:
    """No picture: words with letters, and which is which."""
    picture = Picture(None)
    for _ in range(4):
        kind = dice.choice(list(KINDS))
        right = dice.choice(KINDS[kind])
        pool = [word for other, words in KINDS.items() if other != kind for word in words]
        question = dice.choice([f"Which of these is a {kind}?", f"Where is {right}?", f"Where is {right}?"])
        picture.choose(question, right, pool, dice)
    return picture


def vocabulary_texts() -> Iterator[str]:
    """Texts with every word that the data, the prompts and the conversations have."""
    yield f" USER: \n ASSISTANT: {', as you can see.'} A B C D E. A. B. C. D. E. {minicvit.UNANSWERABLE}"
    for settings in (SINGLE_TYPE, MULTI_TYPE):
        for instructions in settings.values():
            yield from (f"?\n{text} {text}" for text in instructions)
    for names in (COLOURS, DIGITS, OBJECTS, SHAPES, PLACES, COMPANIONS, WORDS, "0123456789"):
        yield from (f" {name}\nB. {name} {name}? {name}." for name in names)
    for task in minicvit.TASKS:
        for sample, _ in minicvit.samples(task, "vocabulary", 40):
            yield f" {sample.question}\n{sample.question}"
            yield from (f" {text}" for text in (sample.answer, *sample.references))
    for parts in (minicvit.SUBJECTS, minicvit.SHIRTS, minicvit.VERBS, *minicvit.WITH.values(), *WHERE.values()):
        yield from (f" {part}." for part in parts)
    for index in range(300):
        for question, _, sentence in draw_picture(Dice(f"vocabulary {index}")).turns:
            yield f" {question}\n{question} {sentence}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words and punctuation marks, each with or without a space before it; Vicuna's system sentence is one token."""
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
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left", model_max_length=512,
    )  # fmt: skip


# ---- the model


def make_model(tokenizer: PreTrainedTokenizerFast, settings: BaseSettings) -> LlavaForConditionalGeneration:
    """A random LLaVA in float32."""
    vision = CLIPVisionConfig(
        image_size=SIDE, patch_size=PATCH, hidden_size=settings.vision_hidden,
        intermediate_size=2 * settings.vision_hidden, num_hidden_layers=settings.vision_layers, num_attention_heads=4,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=settings.hidden, intermediate_size=8 * round(settings.hidden * 2.7 / 8),
        num_hidden_layers=settings.layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1, vision_feature_select_strategy="default", image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(settings.seed)
    model = LlavaForConditionalGeneration(config)
    # wider than the default, which is meant for large models
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            residual = name.endswith(("o_proj", "out_proj", "down_proj", "fc2"))
            nn.init.normal_(module.weight, std=(0.3 if residual else 0.8) * module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)
    return model


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Tokenizer and image processing, as `AutoProcessor` loads them."""
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip


class Conversations:
    """Batches of conversations about pictures, each of up to `turns` turns."""

    def __init__(self, encoder: PromptEncoder, processor: LlavaProcessor, settings: BaseSettings) -> None:
        self.encoder = encoder
        self.settings = settings
        self.pictures = [
            draw_picture(Dice(f"{minicvit.SEED}, alignment {settings.seed}, {index}"))
            for index in tqdm(range(settings.pictures), desc="drawing", unit="picture")
        ]
        drawn = [picture for picture in self.pictures if picture.pixels is not None]
        images = [Image.fromarray(picture.pixels) for picture in drawn]
        pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        self.pixels = dict(zip(map(id, drawn), pixels, strict=True))

    def batch(self, dice: Dice, turns: int = 3) -> dict[str, Tensor]:
        """The model's inputs, with labels on the answers alone."""
        chosen = [dice.choice(self.pictures) for _ in range(self.settings.batch)]
        written = [self._write(picture, dice, turns) for picture in chosen]
        ids, mask = pad([ids for ids, _ in written], self.encoder.pad_token_id, left=False)
        labels, _ = pad([labels for _, labels in written], IGNORED_LABEL, left=False)
        pixels = [self.pixels[id(picture)] for picture in chosen if picture.pixels is not None]
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return inputs | ({"pixel_values": torch.stack(pixels)} if pixels else {})

    def _write(self, picture: Picture, dice: Dice, turns: int) -> tuple[list[int], list[int]]:
        asked = dice.sample(picture.turns, min(turns, len(picture.turns)))
        ids: list[int] = []
        labels: list[int] = []
        for question, answer, sentence in asked:
            said = sentence.format(answer) if dice.chance(50) else f"{answer}, as you can see."
            sample = self.encoder.expand_sample(
                self.encoder.sample(question, said, picture.pixels is not None and not ids)
            )
            skip = 0 if not ids else 2  # BOS and the system sentence are said once
            ids += sample.input_ids[skip:]
            labels += sample.labels[skip:]
        return ids, labels


def align(
    model: LlavaForConditionalGeneration, conversations: Conversations, settings: BaseSettings
) -> dict[str, float]:
    """Train all of the model on conversations; returns the loss over the last tenth, and the seconds it took."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}],
        settings.learning_rate, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    steps, warm_up = settings.steps, max(1, settings.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * min(1, (step + 1 - warm_up) / steps))),
    )
    dice = Dice(f"{minicvit.SEED}, alignment {settings.seed}")
    model.train()
    start, last = time.perf_counter(), []
    with tqdm(range(steps), desc="aligning the base model", unit="step") as bar:
        for step in bar:
            loss = model(**conversations.batch(dice)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
            if step >= steps - max(1, steps // 10):
                last.append(loss.item())
    model.eval()
    return {"loss": float(np.mean(last)), "seconds": time.perf_counter() - start}


# ---- the folder


def make_base(folder: str | Path, settings: BaseSettings | None = None) -> Path:
    """Make the base model, or find it made: a folder that `from_pretrained` reads, model and processor.

    Args:
        folder: where it lies.
        settings: how it is made.

    Returns:
        The folder. `base.json` in it has the settings, the number of parameters, the last loss and the seconds.

    Raises:
        ValueError: the folder holds something else, or a base model of other settings.
    """
    folder, settings = Path(folder), settings or BaseSettings()
    if folder.exists() and any(folder.iterdir()):
        found = folder / "base.json"
        if not found.is_file():
            raise ValueError(f"{folder} must be empty, or hold a base model of MiniCVIT, got other files")
        made = json.loads(found.read_text())["settings"]
        if made != asdict(settings) | {"data": minicvit.SEED}:
            raise ValueError(
                f"{folder} holds a base model of other settings ({made}): remove it or name another folder"
            )
        return folder
    tokenizer = make_tokenizer()
    model, processor = make_model(tokenizer, settings), make_processor(tokenizer)
    encoder = PromptEncoder.for_model(tokenizer, model.config)
    report = align(model, Conversations(encoder, processor, settings), settings)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    processor.save_pretrained(part)
    parameters = sum(p.numel() for p in model.parameters())
    content = {"settings": asdict(settings) | {"data": minicvit.SEED}, "parameters": parameters, **report}
    (part / "base.json").write_text(json.dumps(content, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)  # empty
    part.replace(folder)
    return folder
