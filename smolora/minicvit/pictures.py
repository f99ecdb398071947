"""Pictures of MiniCVIT's kinds with all that can be said about them: what its base model learns from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..data.format import Message, ask
from ..data.prompts import PromptEncoder
from ..instructions.texts import MULTI_TYPE, SINGLE_TYPE
from . import scenes, tasks
from .files import UNANSWERABLE
from .scenes import COLOURS, COMPANIONS, DIGITS, OBJECTS, PLACES, SHAPES, SIDE, WORDS, StableRandom
from .tasks import KINDS, MINICVIT, QUIZ, WHERE, options

PATCH = 12


class Curriculum(NamedTuple):
    """What a base model learns from.

    Attributes:
        seed: version of the data, from which all pictures are drawn.
        heads: the tower's probes by name.
        draw: draws a picture.
        texts: yields texts with every word that the tokenizer gets.
        numbers: numbers of two decimals, such as 0.25, are single tokens.
        turns: most turns of a conversation about a picture.
    """

    seed: str
    heads: Mapping[str, ProbeHead]
    draw: Callable[[StableRandom], Picture]
    texts: Callable[[], Iterator[str]]
    numbers: bool = False
    turns: int = 3


class ProbeHead(NamedTuple):
    """A linear probe on the tower: it classifies among names from the mean over some patches."""

    names: tuple[str, ...]
    patches: tuple[int, ...]
    weight: float = 1.0  # of its loss


PATCHES = SIDE // PATCH  # along a side
EVERYWHERE = tuple(range(PATCHES * PATCHES))
PROBE_HEADS: dict[str, ProbeHead] = {
    "colour": ProbeHead(tuple(COLOURS), EVERYWHERE),
    "digit": ProbeHead(DIGITS, EVERYWHERE),
    "object": ProbeHead(OBJECTS, EVERYWHERE),
    "shape": ProbeHead(SHAPES, EVERYWHERE),
    "word": ProbeHead(WORDS, EVERYWHERE),
    "place": ProbeHead(PLACES, EVERYWHERE),
    "companion": ProbeHead(COMPANIONS, EVERYWHERE),
    "upper_word": ProbeHead(WORDS, EVERYWHERE[: len(EVERYWHERE) // 2]),
    "lower_word": ProbeHead(WORDS, EVERYWHERE[len(EVERYWHERE) // 2 :]),
}
for _cell in range(4):
    _here = tuple(p for p in EVERYWHERE if (p // PATCHES // 2, p % PATCHES // 2) == divmod(_cell, 2))
    PROBE_HEADS[f"shape_{_cell}"] = ProbeHead((*SHAPES, "nothing"), _here)
    PROBE_HEADS[f"colour_{_cell}"] = ProbeHead((*COLOURS, "nothing"), _here)


class Picture:
    """A picture, or None, with questions and answers about it.

    Attributes:
        canvas: the picture, or None.
        turns: (question, short answer, sentence).
        facts: labels for the probes, one of the names of each.
    """

    def __init__(self, canvas: scenes.Canvas | None, **facts: str) -> None:
        self.canvas = canvas
        self.turns: list[tuple[str, str, str]] = []
        self.facts = facts

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
    return draw_kind(rng.choice(KINDS_OF_PICTURES), rng)


def draw_kind(kind: str, rng: StableRandom) -> Picture:
    """Draw a picture of a kind, one of `KIND_WEIGHTS`, with all questions about it."""
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
    """Yield texts that have every word of MiniCVIT's data, the prompts and the conversations."""
    yield f" USER: \n ASSISTANT: {', as you can see.'} A B C D E. A. B. C. D. E. {UNANSWERABLE}"
    for settings in (SINGLE_TYPE, MULTI_TYPE):
        for instructions in settings.values():
            yield from (f"?\n{text} {text}" for text in instructions)
    for names in (COLOURS, DIGITS, OBJECTS, SHAPES, PLACES, COMPANIONS, WORDS, "0123456789"):
        yield from (f" {name}\nB. {name} {name}? {name}." for name in names)
    for task in MINICVIT.tasks:
        for sample, _ in MINICVIT.samples(task, "vocabulary", 40):
            yield f" {sample.question}\n{sample.question}"
            yield from (f" {text}" for text in (sample.answer, *sample.references))
    for parts in (tasks.SUBJECTS, tasks.SHIRTS, tasks.VERBS, *tasks.WITH.values(), *WHERE.values()):
        yield from (f" {part}." for part in parts)
    for index in range(300):
        for question, _, sentence in draw_picture(StableRandom(f"vocabulary {index}")).turns:
            yield f" {question}\n{question} {sentence}"


MINICVIT_PICTURES = Curriculum(MINICVIT.seed, PROBE_HEADS, draw_picture, vocabulary_texts)


def converse(picture: Picture, encoder: PromptEncoder, rng: StableRandom, turns: int) -> tuple[list[int], list[int]]:
    """Write a conversation of at most `turns` turns in Vicuna's style, each turn after a space.

    Returns:
        Token ids, and labels that are ignored except on the answers.
    """
    ids: list[int] = []
    labels: list[int] = []
    for question, said in _turns(picture, rng, turns):
        sample = encoder.expand_sample(encoder.sample(question, said, picture.canvas is not None and not ids))
        skip = 2 if ids else 0  # only the first turn has BOS and the system sentence, one token each
        ids += sample.input_ids[skip:]
        labels += sample.labels[skip:]
    return ids, labels


def dialogue(picture: Picture, rng: StableRandom, turns: int) -> list[Message]:
    """Write a conversation of at most `turns` turns as messages."""
    messages: list[Message] = []
    for question, said in _turns(picture, rng, turns):
        first = ask(question, picture.canvas is not None and not messages)
        messages += [first, Message("assistant", (said,))]
    return messages


def _turns(picture: Picture, rng: StableRandom, turns: int) -> Iterator[tuple[str, str]]:
    """Draw questions and answers about a picture."""
    for question, answer, sentence in rng.sample(picture.turns, min(turns, len(picture.turns))):
        yield question, sentence.format(answer) if rng.chance(50) else f"{answer}, as you can see."
